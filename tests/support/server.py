"""trainer.serve in a process of its own, and requests to it."""

import base64
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from tests.support.processes import free_ports


class Response(NamedTuple):
    """A response with its JSON decoded."""

    status: int
    value: Any
    headers: http.client.HTTPMessage


class Server:
    """`python -m trainer.serve`; "{port}" in an argument or a variable of the environment becomes its port."""

    def __init__(self, *arguments: str, health: str = "/health", predict: str = "/predict", **environment: str):
        (self.port,) = free_ports(1)
        self.health = health
        self.predict = predict
        arguments = [argument.format(port=self.port) for argument in arguments]
        environment = {name: value.format(port=self.port) for name, value in environment.items()}
        command = [sys.executable, "-m", "trainer.serve", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})

    def request(self, method: str, path: str, body: bytes | str | None = None) -> Response:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return Response(response.status, json.loads(response.read()), response.headers)
        finally:
            connection.close()

    def classify(self, *contents: bytes, **parameters) -> Response:
        request: dict[str, Any] = {"instances": [{"bytes": {"b64": base64.b64encode(c).decode()}} for c in contents]}
        if parameters:
            request["parameters"] = parameters
        return self.request("POST", self.predict, json.dumps(request))

    def wait_until_ready(self) -> Response:
        statuses = set()
        for _ in range(600):
            try:
                response = self.request("GET", self.health)
                if response.status == 200:
                    assert statuses <= {503}  # while the model is loading
                    return response
                statuses.add(response.status)
            except ConnectionError:
                assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.1)
        raise TimeoutError

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)
