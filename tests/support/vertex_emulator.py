"""An emulator of the Vertex AI API on loopback: parses each body into the proto and rejects unknown fields.

It keeps jobs, models, endpoints and deployments. A job runs when it is read for the second time and has ended at the third;
an operation is done when it is read for the `operation_reads`-th time, and only then does its result exist.
"""

import contextlib
import dataclasses
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import NamedTuple

from google.cloud import aiplatform_v1 as v1
from google.protobuf import json_format

_JOBS = {
    "customJobs": v1.CustomJob,
    "hyperparameterTuningJobs": v1.HyperparameterTuningJob,
    "batchPredictionJobs": v1.BatchPredictionJob,
}
_PATH = re.compile(r"/v1(?:beta1)?/(projects/[^/]+/locations/[^/]+)/(\w+)(?:/([\w-]+))?(?::(\w+))?")
PENDING, RUNNING, SUCCEEDED, FAILED = (
    v1.JobState[f"JOB_STATE_{name}"].value for name in ("PENDING", "RUNNING", "SUCCEEDED", "FAILED")
)
TYPE = "type.googleapis.com/google.cloud.aiplatform.v1."


class Request(NamedTuple):
    """An accepted request that creates something."""

    path: str
    message: object  # the proto
    authorization: str  # the header


class Rejected(Exception):
    """An error response: the HTTP status, the name of the status, the message."""


@dataclasses.dataclass
class _Operation:
    finish: Callable[[], tuple[str, dict]]  # the type of the response and its fields
    reads: int = 0
    response: dict | None = None


class Service:
    """The state of a region. `job_error` is the message with which every job fails; '' lets them succeed."""

    def __init__(self, *, operation_reads: int = 1, job_error: str = ""):
        self.requests: list[Request] = []
        self.resources: dict[str, object] = {}  # protos by name
        self.operations: dict[str, _Operation] = {}
        self.operation_reads, self.job_error = operation_reads, job_error
        self._reserved: set[str] = set()  # IDs of resources that operations create
        self._ids = itertools.count(1000)

    def post(self, path: str, query: dict[str, str], body: bytes, authorization: str) -> dict:
        """Answers a request that creates something."""
        match = _PATH.fullmatch(path)
        parent, kind, name, verb = match.groups() if match else ("", "", None, None)

        def accept(message):
            self.requests.append(Request(path, message, authorization))
            return message

        if kind in _JOBS and not name:
            job = accept(_parse(body, _JOBS[kind]))
            job.name, job.state = f"{parent}/{kind}/{next(self._ids)}", PENDING
            self.resources[job.name] = job
            return json_format.MessageToDict(job)
        if (kind, name, verb) == ("models", None, "upload"):
            upload = accept(_parse(body, v1.UploadModelRequest))
            upload.model.name = f"{parent}/models/{upload.model_id or next(self._ids)}"
            return self._create(parent, upload.model, "UploadModelResponse", {"model": upload.model.name})
        if (kind, name, verb) == ("endpoints", None, None):
            endpoint = accept(_parse(body, v1.Endpoint))
            endpoint.name = f"{parent}/endpoints/{query.get('endpointId') or next(self._ids)}"
            endpoint.dedicated_endpoint_dns = "pictures.us-central1-1.prediction.vertexai.goog"
            return self._create(parent, endpoint, "Endpoint", {"name": endpoint.name})
        if (kind, verb) == ("endpoints", "deployModel"):
            return self._deploy(parent, f"{parent}/endpoints/{name}", accept(_parse(body, v1.DeployModelRequest)))
        if (kind, verb) == ("endpoints", "undeployModel"):
            return self._undeploy(parent, f"{parent}/endpoints/{name}", accept(_parse(body, v1.UndeployModelRequest)))
        raise Rejected(404, "NOT_FOUND", f"no such path: {path}")

    def get(self, path: str, query: dict[str, str]) -> dict:
        """Answers a request for a resource, an operation or a list."""
        name = path.split("/", 2)[2]  # after /v1/ or, as Google's client reads operations, /ui/
        if name in self.operations:
            return self._read_operation(name)
        if name in self.resources:
            resource = self.resources[name]
            if "state" in resource.DESCRIPTOR.fields_by_name and resource.state in (PENDING, RUNNING):
                self._advance(resource)
            return json_format.MessageToDict(resource)
        kind = name.rpartition("/")[2]
        if kind not in _JOBS:
            raise Rejected(404, "NOT_FOUND", f"{name} is not found")
        label, value = re.fullmatch(r'labels\.(\w+)="(\w+)"', query["filter"]).groups()
        jobs = [one for key, one in self.resources.items() if key.startswith(f"{name}/")]
        return {kind: [json_format.MessageToDict(job) for job in jobs if job.labels.get(label) == value]}

    def _create(self, parent: str, resource, response: str, fields: dict) -> dict:
        if resource.name in self._reserved:
            raise Rejected(409, "ALREADY_EXISTS", f"{resource.name} already exists")
        self._reserved.add(resource.name)

        def finish() -> tuple[str, dict]:
            self.resources[resource.name] = resource
            return response, fields

        return self._start(parent, finish)

    def _deploy(self, parent: str, name: str, request) -> dict:
        deployed, endpoint = request.deployed_model, self.resources.get(name)
        model = self.resources.get(deployed.model)
        if endpoint is None or model is None:
            raise Rejected(404, "NOT_FOUND", f"{name} or {deployed.model} is not found")
        key = f"{name}/{deployed.id}"
        if key in self._reserved:
            raise Rejected(409, "ALREADY_EXISTS", f"{key} already exists")
        self._reserved.add(key)

        def finish() -> tuple[str, dict]:
            endpoint.deployed_models.append(deployed)
            endpoint.traffic_split.clear()
            for target, percent in request.traffic_split.items():
                endpoint.traffic_split[deployed.id if target == "0" else target] = percent
            return "DeployModelResponse", {"deployedModel": json_format.MessageToDict(deployed)}

        return self._start(parent, finish)

    def _undeploy(self, parent: str, name: str, request) -> dict:
        endpoint = self.resources[name]
        kept = [one for one in endpoint.deployed_models if one.id != request.deployed_model_id]
        if len(kept) == len(endpoint.deployed_models):
            raise Rejected(404, "NOT_FOUND", f"{request.deployed_model_id} is not deployed")
        del endpoint.deployed_models[:]
        endpoint.deployed_models.extend(kept)
        return self._start(parent, lambda: ("UndeployModelResponse", {}))

    def _start(self, parent: str, finish: Callable[[], tuple[str, dict]]) -> dict:
        name = f"{parent}/operations/{next(self._ids)}"
        self.operations[name] = _Operation(finish)
        return {"name": name}

    def _read_operation(self, name: str) -> dict:
        operation = self.operations[name]
        operation.reads += 1
        if operation.reads < self.operation_reads:
            return {"name": name}
        if operation.response is None:
            kind, fields = operation.finish()
            operation.response = {"@type": TYPE + kind, **fields}
        return {"name": name, "done": True, "response": operation.response}

    def _advance(self, job) -> None:
        if job.state == PENDING:
            job.state = RUNNING
        elif self.job_error:
            job.state, job.error.message = FAILED, self.job_error
        else:
            job.state = SUCCEEDED
            if "output_info" in job.DESCRIPTOR.fields_by_name:
                prefix = job.output_config.gcs_destination.output_uri_prefix
                job.output_info.gcs_output_directory = f"{prefix}/prediction-first-2026_01_01"


def _parse(body: bytes, kind):
    try:
        return json_format.Parse(body or b"{}", kind.pb()(), ignore_unknown_fields=False)
    except json_format.ParseError as error:
        raise Rejected(400, "INVALID_ARGUMENT", str(error)) from None


@contextlib.contextmanager
def run(*, reject_with: int | None = None, service: Service | None = None) -> Iterator[tuple[str, list[Request]]]:
    """Yields the URL and the accepted requests that create something; with `reject_with`, every answer has that status."""
    state = service or Service()
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            authorization = self.headers.get("Authorization", "")
            self.answer(lambda path, query: state.post(path, query, body, authorization))

        def do_GET(self):
            self.answer(state.get)

        def answer(self, action: Callable[[str, dict[str, str]], dict]) -> None:
            path, _, query = self.path.partition("?")
            try:
                if reject_with:
                    raise Rejected(reject_with, "", "rejected for the test")
                with lock:
                    status, value = 200, action(path, dict(urllib.parse.parse_qsl(query)))
            except Rejected as error:
                status, kind, message = error.args
                value = {"error": {"code": status, "status": kind, "message": message}}
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
        yield f"http://127.0.0.1:{server.server_address[1]}", state.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
