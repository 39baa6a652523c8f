"""The HTTP application: requests are parsed, limited and answered as documented."""

import asyncio
import base64
import json
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest
from starlette.exceptions import HTTPException

from tests.support.tiny_model import make_image
from trainer.serving import app
from trainer.serving.app import Limits, RejectedInstance, ServingApp
from trainer.serving.classifier import Classifier

LIMITS = Limits(max_request_bytes=2**20, max_concurrent_requests=1, max_image_pixels=10**6, timeout_secs=60)


@pytest.mark.parametrize(("body", "status", "message"), [
    (b"", 400, "not JSON"), (b"{", 400, "not JSON"), (b"\xff", 400, "not JSON"), (b"[" * 100000, 400, "not JSON"),
    (b"[]", 400, "no list of instances"), (b"{}", 400, "no list of instances"), (b'{"instances": {}}', 400, "no list"),
    (b'{"instances": []}', 400, "no list of instances"), (b'{"instances": [%s1]}' % (b"1," * 128), 413, "129 instances"),
    (b'{"instances": [1], "parameters": {"explain": 1}}', 400, "parameters are not"),
    (b'{"instances": [1], "parameters": {"explian": true}}', 400, "parameters are not"),
    (b'{"instances": [1], "parameters": [1]}', 400, "parameters are not"),
])  # fmt: skip
def test_an_invalid_request_is_rejected_with_the_expected_form(body, status, message):
    with pytest.raises(HTTPException, match=message) as raised:
        app.read_request(body, 10**6)
    assert raised.value.status_code == status


def test_each_instance_is_accepted_or_rejected_on_its_own():
    instances = [{"bytes": {"b64": "aGk="}}, {"b64": "aGk="}, {"b64": "?"}, {"bytes": "aGk="}, 1, None, {"b64": 1}, []]
    read, explain = app.read_request(json.dumps({"instances": instances, "parameters": None}).encode(), 10**6)
    assert not explain
    assert read[:2] == [b"hi", b"hi"]
    assert read[2].reason.startswith("not base64 (")
    assert read[3:] == [RejectedInstance('not an image as {"bytes": {"b64": "..."}}')] * 5


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares this size and contains little more than its header."""
    return make_image(0, kind="PNG")[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes(100)


def test_batches_stay_below_the_limit_of_pixels_and_images():
    small, large, too_large = png_header(10, 10), png_header(1000, 700), png_header(1001, 1000)
    encoded = [{"b64": base64.b64encode(png).decode()} for png in (small, large, too_large, large, small)]
    instances, _ = app.read_request(json.dumps({"instances": encoded}).encode(), 10**6)
    assert instances[2].reason.startswith("the image has 1 megapixels, more than the limit of 1")
    batches = list(app.batches(instances, 10**6))
    assert [len(batch) for batch in batches] == [3, 2]
    assert [instance for batch in batches for instance in batch] == instances
    assert [len(batch) for batch in app.batches([small] * 20, 10**6)] == [8, 8, 4]


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def send(application, method: str, path: str, body: bytes = b"") -> Response:
    """One request to an ASGI application, without a server."""
    sent = []

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def collect(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"content-length", str(len(body)).encode())],
    }
    await application(scope, receive, collect)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Response(sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent))


def constant_classifier(is_called: threading.Event, may_return: threading.Event) -> Classifier:
    """A classifier without heat maps that waits in its second call; the first is that of the start."""
    calls = []

    def probabilities(contents: list[bytes]) -> np.ndarray:
        calls.append(len(contents))
        if len(calls) > 1:
            is_called.set()
            may_return.wait(60)
        return np.tile(np.array([[0.25, 0.75]], np.float32), [len(contents), 1])

    return Classifier(("cat", "dog"), probabilities)


def make_app(load, on_failure=lambda: None) -> ServingApp:
    return ServingApp(load, LIMITS, predict_route="/predict", health_route="/health", on_failure=on_failure)


def request_of(*contents: bytes, **parameters) -> bytes:
    instances = [{"b64": base64.b64encode(one).decode()} for one in contents]
    return json.dumps({"instances": instances, "parameters": parameters}).encode()


def test_errors_are_json_with_retry_after_where_a_retry_may_help():
    is_called, may_return = threading.Event(), threading.Event()
    serving = make_app(lambda: constant_classifier(is_called, may_return))
    application, body = serving.starlette(), request_of(make_image(0), b"text")

    async def run() -> None:
        loading = await send(application, "POST", "/predict", body)
        assert (loading.status, loading.headers["retry-after"]) == (503, "1")
        assert loading.json() == {"error": "The model is loading: retry later."}
        assert (await send(application, "GET", "/health")).status == 503
        await asyncio.to_thread(serving._start)
        assert (await send(application, "GET", "/health")).json() == {
            "status": "ready",
            "class_names": ["cat", "dog"],
            "explains": False,
            "resize": "stretch",
        }
        first = asyncio.create_task(send(application, "POST", "/predict", body))
        await asyncio.to_thread(is_called.wait, 60)
        busy = await send(application, "POST", "/predict", body)
        assert (busy.status, busy.headers["retry-after"]) == (503, "1")
        assert busy.json() == {"error": "Concurrency limit of 1 requests reached: retry later."}
        may_return.set()
        good, bad = (await first).json()["predictions"]
        assert good == {"label": "dog", "probability": 0.75, "probabilities": [0.25, 0.75]}
        assert bad["error"].startswith("not a JPEG, PNG, GIF, BMP or WebP")
        explained = await send(application, "POST", "/predict", request_of(make_image(0), explain=True))
        assert (explained.status, "heat maps" in explained.json()["error"]) == (400, True)
        too_large = await send(application, "POST", "/predict", bytes(2**20 + 1))
        assert (too_large.status, "retry-after" in too_large.headers) == (413, False)
        assert (await send(application, "GET", "/predict")).status == 405
        assert (await send(application, "GET", "/other")).status == 404

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_reported():
    failed = threading.Event()

    def load() -> Classifier:
        raise OSError("no model")

    serving = make_app(load, failed.set)
    serving._start()
    assert failed.is_set()
    assert str(serving.failure) == "no model"
