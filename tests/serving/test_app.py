"""The HTTP application without a server: what it answers before the model, without heat maps, and under load."""

import asyncio
import base64
import json
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.support.tiny_model import make_image
from trainer.serving.app import Access, Limits, ServingApp
from trainer.serving.classifier import Classifier, Outputs

LIMITS = Limits(
    max_request_bytes=2**20,
    max_concurrent_requests=2,
    max_image_pixels=10**6,
    timeout_secs=60,
    decode_timeout_secs=10,
)


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def send(application, method: str, path: str, body: bytes = b"", **headers: str) -> Response:
    """One request to an ASGI application, without a server. `_` in the name of a header stands for `-`."""
    sent = []

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def collect(message: dict) -> None:
        sent.append(message)

    headers = {"content-length": str(len(body)), **headers}
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    await application(scope, receive, collect)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Response(sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent))


def request_of(*contents: bytes, **parameters) -> bytes:
    instances = [{"b64": base64.b64encode(one).decode()} for one in contents]
    return json.dumps({"instances": instances, "parameters": parameters}).encode()


class SlowClassifier:
    """A classifier without heat maps, and without the size of its input, that waits in each call."""

    def __init__(self) -> None:
        self.is_called, self.may_return = threading.Event(), threading.Event()

    def classifier(self) -> Classifier:
        return Classifier(("cat", "dog"), self._predict)

    def _predict(self, contents: list[bytes]) -> Outputs:
        self.is_called.set()
        assert self.may_return.wait(60)
        return Outputs(np.tile(np.array([[0.25, 0.75]], np.float32), [len(contents), 1]))


def make_app(access: Access = Access()) -> ServingApp:  # noqa: B008 (it is frozen)
    return ServingApp(SlowClassifier().classifier, LIMITS, access, on_failure=lambda: None)


@pytest.mark.slow
def test_errors_are_json_with_retry_after_where_a_retry_may_help(decoders):
    serving, slow = make_app(), SlowClassifier()
    application, body = serving.starlette(), request_of(make_image(0), b"text")

    async def run() -> None:
        loading = await send(application, "POST", "/predict", body)
        assert (loading.status, loading.headers["retry-after"]) == (503, "1")
        assert loading.json() == {"error": "The model is loading: retry later."}
        assert (await send(application, "GET", "/health")).status == 503
        assert (await send(application, "GET", "/v1/models/m")).status == 503
        serving._set_ready(slow.classifier(), decoders)
        assert (await send(application, "GET", "/health")).json() == {
            "status": "ready",
            "class_names": ["cat", "dog"],
            "model": {},
            "explains": False,
            "resize": "stretch",
            "accuracy": None,
        }
        running = [asyncio.create_task(send(application, "POST", "/predict", body)) for _ in range(2)]
        await asyncio.to_thread(slow.is_called.wait, 60)
        busy = await send(application, "POST", "/predict", body)
        assert (busy.status, busy.headers["retry-after"]) == (503, "1")
        assert busy.json() == {"error": "Concurrency limit of 2 requests reached: retry later."}
        slow.may_return.set()
        for response in await asyncio.gather(*running):
            good, bad = response.json()["predictions"]
            assert good == {"label": "dog", "probability": 0.75, "probabilities": [0.25, 0.75]}
            assert bad["error"].startswith("not a JPEG, PNG, GIF, BMP or WebP")
        for sent in (request_of(make_image(0), explain=True), request_of(make_image(0))):
            path = "/predict" if b"explain" in sent else "/predict?explain=true"
            explained = await send(application, "POST", path, sent)
            assert (explained.status, "heat maps" in explained.json()["error"]) == (400, True)
        wrong = await send(application, "POST", "/predict?explain=maybe", body)
        assert (wrong.status, wrong.json()["error"]) == (400, "explain is 'maybe': send true or false.")
        too_large = await send(application, "POST", "/predict", bytes(2**20 + 1))
        assert (too_large.status, "retry-after" in too_large.headers) == (413, False)
        for method, path, status in [("GET", "/predict", 405), ("GET", "/other", 404), ("POST", "/v1/models/m", 405)]:
            response = await send(application, method, path)
            assert response.status == status
            assert 'POST /predict takes {"instances"' in response.json()["error"]
        serving._model.queue._secs_per_image = 100.0
        shed = await send(application, "POST", "/predict", body)
        assert (shed.status, shed.headers["retry-after"]) == (503, "1")

    asyncio.run(run())


def test_the_page_is_in_the_language_of_the_server():
    for language, title in (("en", "Image classifier"), ("es", "Clasificador de imágenes")):
        page = asyncio.run(send(make_app(Access(language=language)).starlette(), "GET", "/"))
        assert f'<html lang="{language}">' in page.body.decode()
        assert f"<h1>{title}</h1>" in page.body.decode()


def test_allowed_origins_get_cors_headers_and_others_none():
    application = make_app(Access(allowed_origins=("https://a.example",))).starlette()
    preflight = {"access_control_request_method": "POST", "access_control_request_headers": "content-type"}

    async def run() -> None:
        for origin, status in [("https://a.example", 200), ("https://b.example", 403)]:
            response = await send(application, "OPTIONS", "/predict", origin=origin, **preflight)
            assert response.status == status
            assert response.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
        response = await send(application, "POST", "/predict", b"{}", origin="https://a.example")
        assert (response.status, response.headers["access-control-allow-origin"]) == (503, "https://a.example")

    asyncio.run(run())
