"""trainer.serve in a process of its own, and requests to it."""

import base64
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from tests.support.processes import free_ports


class Response(NamedTuple):
    """A response."""

    status: int
    value: Any  # decoded JSON, or text
    headers: http.client.HTTPMessage


class Server:
    """`python -m trainer.serve`; "{port}" in an argument or a variable of the environment becomes its port.

    `max_descriptors` limits the file descriptors that it may open.
    """

    def __init__(
        self,
        *arguments: str,
        health: str = "/health",
        predict: str = "/predict",
        max_descriptors: int | None = None,
        **environment: str,
    ):
        (self.port,) = free_ports(1)
        self.health = health
        self.predict = predict
        arguments = [argument.format(port=self.port) for argument in arguments]
        environment = {name: value.format(port=self.port) for name, value in environment.items()}
        command = [sys.executable, "-m", "trainer.serve", *arguments]
        if max_descriptors:
            command = ["bash", "-c", f'ulimit -n {max_descriptors}; exec "$@"', "bash", *command]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with this object); a pipe that nobody reads would block the server
        self.process = subprocess.Popen(command, stderr=self._log, env={**os.environ, **environment})

    def log(self) -> str:
        """What the server has written to standard error."""
        self._log.seek(0)
        return self._log.read()

    def kill(self) -> None:
        """Ends the server at once."""
        self.process.kill()
        self.process.wait()

    def request(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> Response:
        """`_` in the name of a header stands for `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            contents = response.read()
            is_json = response.headers["Content-Type"] == "application/json"
            return Response(response.status, json.loads(contents) if is_json else contents.decode(), response.headers)
        finally:
            connection.close()

    def classify(self, *contents: bytes, **parameters) -> Response:
        request: dict[str, Any] = {"instances": [{"bytes": {"b64": base64.b64encode(c).decode()}} for c in contents]}
        if parameters:
            request["parameters"] = parameters
        return self.request("POST", self.predict, json.dumps(request))

    def wait_until_ready(self) -> Response:
        statuses = set()
        for _ in range(1800):
            try:
                response = self.request("GET", self.health)
                if response.status == 200:
                    assert statuses <= {503}  # while the model is loading
                    return response
                statuses.add(response.status)
            except ConnectionError:
                assert self.process.poll() is None, self.log()
            time.sleep(0.1)
        raise TimeoutError

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)
