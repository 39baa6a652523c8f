"""The HTTP application: a page for people, predictions as JSON, health. Its limits bound memory and time of requests.

Shapes: C classes, [H, W] a heat map.
"""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import functools
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from trainer.data import formats
from trainer.reporting import html
from trainer.serving.classifier import Classifier, Prediction, classify

MAX_INSTANCES = 128  # per request

# Images per call of the network. Larger batches are not faster on a CPU (measured: 99 ms for 1 image, 124 ms per image
# in a batch of 8) and take more memory.
BATCH_SIZE = 8

EXPECTED_REQUEST = '{"instances": [{"bytes": {"b64": "..."}}, ...]}'

# The page may use its own script and style and send requests to this server, nothing else.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# A PNG of one pixel. The first call of a model takes seconds, so the server makes it before it reports ready.
BLACK_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mNgYGAAAAAEAAHI6uv5AAAAAElFTkSuQmCC"
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of what requests hold in memory, and for how long."""

    max_request_bytes: int
    max_concurrent_requests: int
    max_image_pixels: int  # of one image, and of all that are decoded at once; a small PNG can declare a huge size
    timeout_secs: float


@dataclasses.dataclass(frozen=True)
class RejectedInstance:
    """An instance of a request that is not an image within the limits."""

    reason: str


Instance = bytes | RejectedInstance  # bytes: the contents of an image file


class ServingApp:
    """A model behind HTTP. A thread loads it when the server starts, so that the health route answers at once.

    If the model cannot be loaded, the exception is in `failure` and `on_failure` is called in that thread.
    """

    def __init__(
        self,
        load: Callable[[], Classifier],
        limits: Limits,
        *,
        predict_route: str,
        health_route: str,
        on_failure: Callable[[], None],
    ):
        self.failure: BaseException | None = None
        self._load = load
        self._limits = limits
        self._predict_route = predict_route
        self._health_route = health_route
        self._on_failure = on_failure
        self._classifier: Classifier | None = None
        self._num_requests = 0
        self._model_thread = ThreadPoolExecutor(1)  # one call of TensorFlow uses all cores; other calls wait

    def starlette(self) -> Starlette:
        """The application for an ASGI server."""
        json_errors = Middleware(ExceptionMiddleware, handlers={HTTPException: _error_response})
        routes = [
            Route(self._health_route, self._health),
            Route(self._predict_route, self._predict, methods=["POST"], middleware=[json_errors]),
        ]
        if "/" not in (self._health_route, self._predict_route):
            routes.append(Route("/", self._page))
        return Starlette(routes=routes, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, application: Starlette) -> AsyncIterator[None]:
        # A daemon thread: a signal ends the process at once while the model is loading.
        threading.Thread(target=self._start, daemon=True).start()
        yield

    def _start(self) -> None:
        started = time.monotonic()
        try:
            classifier = self._load()
            classify(classifier, [("", BLACK_PIXEL)])
            if classifier.explain:
                classify(classifier, [("", BLACK_PIXEL)], explain=True)
        except BaseException as error:
            self.failure = error
            self._on_failure()
        else:
            self._classifier = classifier
            logging.info("Ready after %.0f s.", time.monotonic() - started)

    async def _page(self, request: Request) -> Response:
        settings = {
            "predict": self._predict_route,
            "health": self._health_route,
            "max_request_bytes": self._limits.max_request_bytes,
        }
        text = html.render("serve.html", settings=settings)
        return HTMLResponse(
            text, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}
        )

    async def _health(self, request: Request) -> Response:
        classifier = self._classifier
        if classifier is None:
            return JSONResponse({"status": "loading"}, 503, headers={"Retry-After": "2"})
        return JSONResponse(
            {
                "status": "ready",
                "class_names": classifier.class_names,
                "explains": classifier.explain is not None,
                "resize": classifier.resize,
            }
        )

    async def _predict(self, request: Request) -> Response:
        started = time.monotonic()
        try:
            predictions = await self._predictions(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        num_errors = sum("error" in prediction for prediction in predictions)
        milliseconds = 1000 * (time.monotonic() - started)
        logging.info("%d images, %d errors, %.0f ms", len(predictions), num_errors, milliseconds)
        return JSONResponse({"predictions": predictions})

    async def _predictions(self, request: Request) -> list[dict]:
        classifier, limits = self._classifier, self._limits
        if classifier is None:
            raise _unavailable("The model is loading: retry later.")
        if self._num_requests >= limits.max_concurrent_requests:
            raise _unavailable(f"Concurrency limit of {limits.max_concurrent_requests} requests reached: retry later.")
        self._num_requests += 1
        has_arrived = False
        try:
            async with asyncio.timeout(limits.timeout_secs):
                body = await self._body(request)
                has_arrived = True
                instances, explain = await asyncio.to_thread(read_request, body, limits.max_image_pixels)
                del body  # frees it: the instances are copies
                if explain and not classifier.explain:
                    raise HTTPException(400, "This model was exported without heat maps: omit the parameter explain.")
                return await self._classify(classifier, instances, explain=explain)
        except TimeoutError:
            if has_arrived:
                raise _unavailable(f"The model was busy for {limits.timeout_secs:g} seconds: retry later.") from None
            raise HTTPException(408, f"The request did not arrive within {limits.timeout_secs:g} seconds.") from None
        finally:
            self._num_requests -= 1

    async def _body(self, request: Request) -> bytearray:
        limit = self._limits.max_request_bytes
        body = bytearray()
        content_length = int(request.headers.get("content-length", "0"))  # uvicorn rejects what is not a number
        if content_length <= limit:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    break
        if max(content_length, len(body)) > limit:
            raise HTTPException(413, f"The request is larger than {limit // 2**20} MiB: send fewer or smaller images.")
        return body

    async def _classify(self, classifier: Classifier, instances: list[Instance], *, explain: bool) -> list[dict]:
        """The JSON value of each instance, in order. Batches of several requests alternate."""
        values = []
        for batch in batches(instances, self._limits.max_image_pixels):
            images = [("", instance) for instance in batch if isinstance(instance, bytes)]
            work = functools.partial(classify, classifier, images, explain=explain)
            predictions = iter(await asyncio.get_running_loop().run_in_executor(self._model_thread, work))
            for instance in batch:
                if isinstance(instance, RejectedInstance):
                    values.append({"error": instance.reason})
                else:
                    values.append(_as_json(next(predictions), classifier.class_names))
        return values


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    logging.info("%d: %s", error.status_code, error.detail)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def _unavailable(detail: str) -> HTTPException:
    return HTTPException(503, detail, headers={"Retry-After": "1"})


def _as_json(prediction: Prediction, class_names: tuple[str, ...]) -> dict:
    if prediction.probabilities is None:
        return {"error": prediction.error}
    index, probability = prediction.top
    value = {
        "label": class_names[index],
        "probability": probability,
        "probabilities": prediction.probabilities.tolist(),
    }
    if prediction.heatmap is not None:
        value["heatmap"] = [[round(float(heat), 3) for heat in row] for row in prediction.heatmap]
    return value


def batches(instances: list[Instance], max_pixels: int) -> Iterator[list[Instance]]:
    """The instances in order, at most BATCH_SIZE at a time, and at most `max_pixels` pixels if there are several."""
    batch: list[Instance] = []
    batch_pixels = 0
    for instance in instances:
        pixels = _num_pixels(instance) if isinstance(instance, bytes) else 0
        if batch and (len(batch) == BATCH_SIZE or batch_pixels + pixels > max_pixels):
            yield batch
            batch, batch_pixels = [], 0
        batch.append(instance)
        batch_pixels += pixels
    yield batch


def _num_pixels(contents: bytes) -> int:
    """As declared in the header of the file; 0 if it has none."""
    size = formats.header_size(contents)
    return size.width * size.height if size else 0


def read_request(body: bytes | bytearray, max_image_pixels: int) -> tuple[list[Instance], bool]:
    """The instances of a request, and whether heat maps are requested.

    Raises HTTPException for a body that is not such a request.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The request is not JSON ({error}): send {EXPECTED_REQUEST}") from None
    instances = request.get("instances") if isinstance(request, dict) else None
    if not isinstance(instances, list) or not instances:
        raise HTTPException(400, f"The request has no list of instances: send {EXPECTED_REQUEST}")
    if len(instances) > MAX_INSTANCES:
        raise HTTPException(413, f"The request has {len(instances)} instances: send {MAX_INSTANCES} or fewer.")
    parameters = request.get("parameters") or {}
    explain = parameters.get("explain", False) if isinstance(parameters, dict) else None
    if not isinstance(explain, bool) or set(parameters) - {"explain"}:
        raise HTTPException(400, 'The request\'s parameters are not {"explain": true} or {"explain": false}.')
    return [_read_instance(instance, max_image_pixels) for instance in instances], explain


def _read_instance(instance: object, max_image_pixels: int) -> Instance:
    """The contents in {"bytes": {"b64": "..."}} or {"b64": "..."}, the two forms that TensorFlow Serving takes."""
    value = instance.get("bytes", instance) if isinstance(instance, dict) else None
    text = value.get("b64") if isinstance(value, dict) else None
    if not isinstance(text, str):
        return RejectedInstance('not an image as {"bytes": {"b64": "..."}}')
    try:
        contents = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return RejectedInstance(f"not base64 ({error})")
    pixels = _num_pixels(contents)
    if pixels > max_image_pixels:
        return RejectedInstance(
            f"the image has {pixels / 1e6:.0f} megapixels, more than the limit of {max_image_pixels / 1e6:g} of this "
            "server: scale it down"
        )
    return contents
