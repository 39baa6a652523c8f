r"""Serves a trained model over HTTP: a page to drop pictures on, and JSON as Vertex AI and TensorFlow Serving have it.

    python -m trainer.serve --model_dir=J/saved_model
        then open http://127.0.0.1:8080 and drop pictures on it
    curl http://127.0.0.1:8080/predict --data "{\"instances\": [{\"bytes\": {\"b64\": \"$(base64 -w0 photo.jpg)\"}}]}"

POST /predict takes {"instances": [{"bytes": {"b64": "..."}}, ...]} and answers {"predictions": [...]}, each with label,
probability and probabilities, or with error, which says what is wrong with that picture; the others are not harmed.
{"instances": [...], "parameters": {"explain": true}} adds heatmap, rows of 0 to 1: where the network saw that.
GET /health answers 200 once the model is loaded, with the class names, and 503 before.

As a container for custom predictions of Vertex AI it listens on all addresses at AIP_HTTP_PORT, answers on
AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE, and takes the model from AIP_STORAGE_URI. SIGTERM lets it finish what it works on.
"""

import os
import signal
import socket
from collections.abc import Mapping

from absl import flags, logging

from trainer import cli
from trainer.errors import UserError
from trainer.serving import classifier
from trainer.storage import files


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_string("model_dir", "", "A saved_model folder, or the job_dir of a run. Default: AIP_STORAGE_URI.")
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to listen on; 0.0.0.0: all, also by default if AIP_HTTP_PORT is set."
    )
    flags.DEFINE_integer(
        "port", 8080, "Port to listen on. Default: AIP_HTTP_PORT, else 8080.", lower_bound=0, upper_bound=65535
    )
    flags.DEFINE_integer(
        "max_request_mb", 32, "Largest request, in MiB; base64 makes a picture a third larger.", lower_bound=1
    )
    flags.DEFINE_integer("max_requests", 16, "Requests held at once; more are told to come again (503).", lower_bound=1)
    flags.DEFINE_integer(
        "max_megapixels", 50, "Largest picture; a transparent PNG takes 25 bytes a pixel.", lower_bound=1
    )
    flags.DEFINE_float(
        "timeout_secs", 60, "A request that takes longer ends with an error (408, 503).", lower_bound=0.1
    )


def with_environment(values: dict, given: set[str], environment: Mapping[str, str]) -> dict:
    """The flags, but for those not given what Vertex AI sets in a prediction container; and the routes."""
    values = {**values, "predict_route": "/predict", "health_route": "/health"}
    if "model_dir" not in given:
        values["model_dir"] = environment.get("AIP_STORAGE_URI", "").rstrip("/")
    if "port" not in given and "AIP_HTTP_PORT" in environment:
        values["port"] = int(environment["AIP_HTTP_PORT"])
    if "host" not in given and "AIP_HTTP_PORT" in environment:
        values["host"] = "0.0.0.0"
    for name in ("predict_route", "health_route"):
        values[name] = environment.get(f"AIP_{name.upper()}", values[name])
    return values


def main(arguments: list[str]) -> int:
    """Serves until a signal comes."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --model_dir={arguments[0]} if it is the model.")
    names = ("model_dir", "host", "port", "max_request_mb", "max_requests", "max_megapixels", "timeout_secs")
    values = cli.flag_values(names)
    given = {name for name in names if flags.FLAGS[name].present}
    values = with_environment(values, given, os.environ)
    model_dir = values["model_dir"]
    if not model_dir:
        cli.require("model_dir")
    if not files.is_remote(model_dir):
        classifier.check_model_dir(model_dir)  # now, and not after TensorFlow's import
    listening = _listen(values["host"], values["port"])

    import uvicorn

    from trainer.serving import app

    limits = app.Limits(
        request_bytes=values["max_request_mb"] * 2**20,
        requests=values["max_requests"],
        pixels=values["max_megapixels"] * 10**6,
        seconds=values["timeout_secs"],
    )

    def load() -> classifier.Classifier:
        cli.import_tensorflow()
        return classifier.load(model_dir)

    application = app.ServingApp(load, limits, values["predict_route"], values["health_route"])
    server = uvicorn.Server(
        uvicorn.Config(
            application.starlette(),
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(values["timeout_secs"]) + 1,
        )
    )
    application.on_failure = lambda: setattr(server, "should_exit", True)
    host, port = listening.getsockname()[:2]
    logging.info("Loading %s; then the page is at http://%s:%d (Ctrl+C ends).", model_dir, host, port)
    # The server takes the signals while it runs and raises them once more when it has ended, which would look like a crash.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listening])
    if application.failure:
        raise application.failure
    logging.info("Ended.")
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError if it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port} cannot be listened on ({os.strerror(error.errno or 0)}): pass another."
        ) from None


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
