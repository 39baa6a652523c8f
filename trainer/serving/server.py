"""Runs the HTTP application on a socket until a signal arrives or the model cannot be loaded."""

import os
import signal
import socket
from collections.abc import Callable

import uvicorn

from trainer.errors import UserError
from trainer.serving.app import Limits, ServingApp
from trainer.serving.classifier import Classifier


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError if the address cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: cannot listen there ({os.strerror(error.errno or 0)}): pass another address."
        ) from None


def run(
    listening: socket.socket,
    load: Callable[[], Classifier],
    limits: Limits,
    *,
    predict_route: str,
    health_route: str,
) -> None:
    """Serves the model that `load` returns; after SIGTERM or SIGINT, requests in progress are completed.

    Raises what `load` raised.
    """

    def stop() -> None:
        server.should_exit = True

    application = ServingApp(load, limits, predict_route=predict_route, health_route=health_route, on_failure=stop)
    server = uvicorn.Server(
        uvicorn.Config(
            application.starlette(),
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(limits.timeout_secs) + 1,
        )
    )
    # uvicorn handles these signals while it runs and raises them again at its end, which would end the process as killed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore_signal)
    server.run(sockets=[listening])
    if application.failure:
        raise application.failure


def _ignore_signal(number: int, frame: object) -> None:
    """Ends neither the process nor the server; uvicorn has done that already."""
