"""An emulator of the Vertex AI API on loopback: parses each body into the proto and rejects unknown fields."""

import contextlib
import http.server
import itertools
import json
import re
import threading
from collections.abc import Iterator
from typing import NamedTuple

from google.cloud import aiplatform_v1
from google.protobuf import json_format

_KINDS = {
    "customJobs": aiplatform_v1.CustomJob,
    "hyperparameterTuningJobs": aiplatform_v1.HyperparameterTuningJob,
}
_CREATE = re.compile(r"/v1(?:beta1)?/(projects/[^/]+/locations/[^/]+)/(\w+)")
_UPLOAD = re.compile(r"/v1(?:beta1)?/(projects/[^/]+/locations/[^/]+)/models:upload")


class Request(NamedTuple):
    """An accepted request."""

    path: str
    message: object  # the proto
    authorization: str  # the header


@contextlib.contextmanager
def run(*, reject_with: int | None = None) -> Iterator[tuple[str, list[Request]]]:
    """Yields the URL and the list of accepted requests; with `reject_with`, responds to all with that status."""
    requests: list[Request] = []
    ids = itertools.count(1000)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            match = _CREATE.fullmatch(path)
            if reject_with:
                self.respond(reject_with, {"error": {"code": reject_with, "message": "rejected for the test"}})
            elif match and match[2] in _KINDS:
                job = self.parse(body, _KINDS[match[2]].pb()())
                if job is not None:
                    requests.append(Request(path, job, self.headers.get("Authorization", "")))
                    job.name, job.state = f"{match[1]}/{match[2]}/{next(ids)}", 2
                    self.respond(200, json_format.MessageToDict(job))
            elif match := _UPLOAD.fullmatch(path):
                upload = self.parse(body, aiplatform_v1.UploadModelRequest.pb()())
                if upload is not None:
                    requests.append(Request(path, upload, self.headers.get("Authorization", "")))
                    kind = "type.googleapis.com/google.cloud.aiplatform.v1.UploadModelResponse"
                    response = {"@type": kind, "model": f"{match[1]}/models/{next(ids)}"}
                    name = f"{match[1]}/operations/{next(ids)}"
                    self.respond(200, {"name": name, "done": True, "response": response})
            else:
                self.respond(404, {"error": {"code": 404, "message": f"no such path: {path}"}})

        def parse(self, body: bytes, message):
            try:
                return json_format.Parse(body or b"{}", message, ignore_unknown_fields=False)
            except json_format.ParseError as error:
                self.respond(400, {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": str(error)}})
                return None

        def respond(self, status: int, value) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
