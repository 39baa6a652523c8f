"""The HTTP application: a page for people, predictions as JSON, health, metrics. Its limits bound memory and time.

A request passes access.AccessControl, is read by request_body.read_request in a thread, its images are decoded by
decoding.Decoders in processes, and model_queue.ModelQueue classifies them together with those of other requests.
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from trainer import formatting
from trainer.reporting import html
from trainer.serving import decoding, request_body
from trainer.serving.access import AccessControl
from trainer.serving.classifier import Classifier, Prediction, classify
from trainer.serving.decoding import BLACK_PIXEL, Decoders
from trainer.serving.model_queue import ModelQueue
from trainer.serving.monitoring import ServerMetrics
from trainer.serving.request_body import Instance, PredictRequest, RejectedInstance

# Images of one request that are decoded or classified at a time; those of other requests come in between.
IMAGES_IN_PROGRESS = 8

# The routes of TensorFlow Serving's REST API. A server has one model, whatever its name and version.
TF_SERVING_STATUS_ROUTES = ("/v1/models/{name}", "/v1/models/{name}/versions/{version:int}")
TF_SERVING_PREDICT_ROUTES = tuple(f"{route}:predict" for route in TF_SERVING_STATUS_ROUTES)

# The page may use its own script and style and send requests to this server, nothing else.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of what requests hold in memory, and for how long."""

    max_request_bytes: (
        int  # of one request; all requests that are read or answered hold max_concurrent_requests times this
    )
    max_concurrent_requests: int  # that have arrived and are not yet answered
    max_image_pixels: int  # of one image; num_decoders are decoded at a time. A small PNG can declare a huge size
    timeout_secs: float  # for a request to arrive, and then to be answered
    decode_timeout_secs: float  # for one image
    num_decoders: int = 2


@dataclasses.dataclass(frozen=True)
class Access:
    """Where requests are answered, for whom, and in which language the page is; see access.AccessControl."""

    predict_route: str = "/predict"
    health_route: str = "/health"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    language: str = "en"  # one of formatting.LANGUAGES


@dataclasses.dataclass(frozen=True)
class _Model:
    """What answers requests once the model is loaded."""

    classifier: Classifier
    decoders: Decoders
    queue: ModelQueue


class ServingApp:
    """A model behind HTTP. A thread loads it when the server starts, so that the health route answers at once.

    If the model cannot be loaded, the exception is in `failure` and `on_failure` is called in that thread.
    """

    def __init__(
        self, load: Callable[[], Classifier], limits: Limits, access: Access, *, on_failure: Callable[[], None]
    ):
        self.failure: BaseException | None = None
        self.metrics = ServerMetrics()
        self._load = load
        self._limits = limits
        self._access = access
        self._on_failure = on_failure
        self._decoders: Decoders | None = None
        self._model: _Model | None = None  # once all of it can answer
        self._is_stopped = False
        self._num_requests = 0  # that have arrived
        self._bytes_held = 0  # of the bodies of requests that arrive or are answered
        self._reader = ThreadPoolExecutor(
            1, "reader"
        )  # one body at a time: each may take memory of several times its size
        self.metrics.observe("requests_in_progress", "Requests that have arrived.", lambda: self._num_requests)
        self.metrics.observe(
            "request_bytes", "Bytes of requests that arrive or are answered.", lambda: self._bytes_held
        )
        self.metrics.observe(
            "queue_images", "Decoded images that wait.", lambda: len(self._model.queue) if self._model else 0
        )

    def starlette(self) -> Starlette:
        """The application for an ASGI server."""
        access = self._access
        routes = []
        for path in dict.fromkeys([access.predict_route, *TF_SERVING_PREDICT_ROUTES]):
            routes += [Route(path + slash, self._predict, methods=["POST"]) for slash in ("", "/")]
        routes.append(Route(access.health_route, self._health))
        routes += [Route(path, self._tf_serving_status) for path in TF_SERVING_STATUS_ROUTES]
        routes += [Route("/metrics", self._metrics), Route("/", self._page)]
        middleware = [
            Middleware(AccessControl, allowed_hosts=access.allowed_hosts, allowed_origins=access.allowed_origins),
            Middleware(
                CORSMiddleware,
                allow_origins=access.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Content-Type", "Content-Encoding"],
                expose_headers=["Retry-After"],
                allow_private_network=True,
            ),
        ]
        return Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={HTTPException: self._error_response},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, application: Starlette) -> AsyncIterator[None]:
        # A daemon thread: a signal ends the process at once while the model is loading.
        threading.Thread(target=self._start, args=[asyncio.get_running_loop()], daemon=True).start()
        yield
        self._is_stopped = True
        if self._decoders:
            self._decoders.stop()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Loads the model and calls it once, which takes seconds, before the server reports ready."""
        started = time.monotonic()
        try:
            decoding.start_importing()
            classifier = self._load()
            self._decoders = Decoders(
                classifier.image_size or 224,
                classifier.resize,
                num_processes=self._limits.num_decoders,
                timeout_secs=self._limits.decode_timeout_secs,
                on_kill=self.metrics.killed_decoders.inc,
            )
            self._decoders.start()
            classify(classifier, [("", BLACK_PIXEL)])
            if classifier.explain:
                classify(classifier, [("", BLACK_PIXEL)], explain=True)
        except BaseException as error:
            if not self._is_stopped:  # which ends the decoders
                self.failure = error
                self._on_failure()
        else:
            loop.call_soon_threadsafe(self._set_ready, classifier, self._decoders)
            logging.info("Ready after %.0f s.", time.monotonic() - started)

    def _set_ready(self, classifier: Classifier, decoders: Decoders) -> None:
        queue = ModelQueue(classifier, on_batch=self._on_batch)
        self._worker = asyncio.get_running_loop().create_task(queue.run())
        self._model = _Model(classifier, decoders, queue)

    def _on_batch(self, num_images: int, seconds: float) -> None:
        self.metrics.batch_images.observe(num_images)
        self.metrics.batch_seconds.observe(seconds)

    async def _page(self, request: Request) -> Response:
        settings = {
            "predict": self._access.predict_route,
            "health": self._access.health_route,
            "max_request_bytes": self._limits.max_request_bytes,
        }
        with formatting.in_language(self._access.language):
            text = html.render("serve.html", settings=settings)
        return HTMLResponse(
            text, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}
        )

    async def _health(self, request: Request) -> Response:
        if self._model is None:
            return JSONResponse({"status": "loading"}, 503, headers={"Retry-After": "2"})
        classifier = self._model.classifier
        return JSONResponse(
            {
                "status": "ready",
                "class_names": classifier.class_names,
                "explains": classifier.explain is not None,
                "resize": classifier.resize,
                "accuracy": classifier.accuracy,
                "model": classifier.about,
            }
        )

    async def _tf_serving_status(self, request: Request) -> Response:
        """As TensorFlow Serving reports the state of a model, which its clients and probes ask for."""
        state = {
            "version": str(request.path_params.get("version", 1)),
            "state": "AVAILABLE" if self._model else "LOADING",
            "status": {"error_code": "OK", "error_message": ""},
        }
        return JSONResponse({"model_version_status": [state]}, 200 if self._model else 503)

    async def _metrics(self, request: Request) -> Response:
        return self.metrics.response()

    async def _predict(self, request: Request) -> Response:
        started = time.monotonic()
        status = 500
        try:
            predictions = await self._predictions(request)
            status = 200
        except ClientDisconnect:
            status = 499  # nobody reads it
            return Response(status_code=status)
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self.metrics.requests.labels(status).inc()
            self.metrics.request_seconds.observe(time.monotonic() - started)
        num_errors = sum("error" in prediction for prediction in predictions)
        self.metrics.images.labels("error").inc(num_errors)
        self.metrics.images.labels("classified").inc(len(predictions) - num_errors)
        milliseconds = 1000 * (time.monotonic() - started)
        logging.info("%d images, %d errors, %.0f ms", len(predictions), num_errors, milliseconds)
        return JSONResponse({"predictions": predictions})

    async def _predictions(self, request: Request) -> list[dict]:
        model, limits = self._model, self._limits
        if model is None:
            raise _unavailable("The model is loading: retry later.")
        body_format = request_body.body_format(
            request.headers.get("content-type", ""), request.headers.get("content-encoding", "")
        )
        explain = request_body.read_flag("explain", request.query_params.get("explain", ""))
        self._check_capacity(model)  # before a body is sent in vain
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(limits.timeout_secs):
                    body = await self._body(request, held)
            except TimeoutError:
                raise HTTPException(
                    408, f"The request did not arrive within {limits.timeout_secs:g} seconds."
                ) from None
            self._check_capacity(model)
            held.enter_context(self._counted())
            try:
                async with asyncio.timeout(limits.timeout_secs):
                    read = await self._read(body, body_format, explain=explain)
                    del body  # frees it: the instances are copies
                    if read.explain and not model.classifier.explain:
                        raise HTTPException(
                            400, "This model was exported without heat maps: omit the parameter explain."
                        )
                    return await self._classify(model, read)
            except TimeoutError:
                seconds = f"{limits.timeout_secs:g} seconds"
                raise self._busy(model, f"The model was busy for {seconds}: retry later.") from None

    def _check_capacity(self, model: _Model) -> None:
        """Raises HTTPException 503 if the request would wait in vain."""
        limits = self._limits
        if self._num_requests >= limits.max_concurrent_requests:
            limit = limits.max_concurrent_requests
            raise self._busy(model, f"Concurrency limit of {limit} requests reached: retry later.")
        if model.queue.expected_wait_secs(1) > limits.timeout_secs:
            raise self._busy(model, f"{len(model.queue)} images wait for the model: retry later.")

    def _busy(self, model: _Model, detail: str) -> HTTPException:
        return _unavailable(detail, model.queue.expected_wait_secs(0))

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    async def _body(self, request: Request, held: contextlib.AsyncExitStack) -> bytearray:
        """The body. Its bytes count as held until the request is answered."""
        limit = self._limits.max_request_bytes
        max_bytes_held = limit * self._limits.max_concurrent_requests
        body = bytearray()
        content_length = int(request.headers.get("content-length", "0"))  # uvicorn rejects what is not a number
        num_held = 0
        held.callback(lambda: self._hold(-num_held))
        if content_length <= limit:
            async for chunk in request.stream():
                if self._bytes_held + len(chunk) > max_bytes_held:
                    raise _unavailable(f"Other requests hold {max_bytes_held // 2**20} MiB: retry later.")
                body += chunk
                self._hold(len(chunk))
                num_held += len(chunk)
                if len(body) > limit:
                    break
        if max(content_length, len(body)) > limit:
            raise HTTPException(413, f"The request is larger than {limit // 2**20} MiB: send fewer or smaller images.")
        return body

    def _hold(self, num_bytes: int) -> None:
        self._bytes_held += num_bytes

    async def _read(self, body: bytearray, body_format: request_body.BodyFormat, *, explain: bool) -> PredictRequest:
        def read() -> PredictRequest:
            return request_body.read_request(
                body,
                body_format,
                explain=explain,
                max_bytes=self._limits.max_request_bytes,
                max_image_pixels=self._limits.max_image_pixels,
            )

        return await asyncio.get_running_loop().run_in_executor(self._reader, read)

    async def _classify(self, model: _Model, request: PredictRequest) -> list[dict]:
        """The JSON value of each instance, in order."""
        slots = asyncio.Semaphore(IMAGES_IN_PROGRESS)

        async def classify_one(instance: Instance) -> dict:
            if isinstance(instance, RejectedInstance):
                return {"error": instance.reason}
            async with slots:
                decoded = await model.decoders.decode(instance)
                if decoded.reason:
                    return {"error": decoded.reason}
                # A model that does not say its size resizes the image itself; it has just been decoded in time.
                image = decoded.png if model.classifier.image_size else instance
                prediction = await model.queue.classify(image, explain=request.explain)
            return _as_json(prediction, model.classifier.class_names)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(classify_one(instance)) for instance in request.instances]
        return [task.result() for task in tasks]

    async def _error_response(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = error.detail
        if error.status_code in (404, 405):
            detail = (
                f"No such route: {request.method} {request.url.path[:100]}. POST {self._access.predict_route} takes "
                f"{request_body.EXPECTED_REQUEST}; GET {self._access.health_route}, GET /metrics."
            )
        logging.info("%d: %s", error.status_code, detail)
        return JSONResponse({"error": detail}, error.status_code, headers=error.headers)


def _unavailable(detail: str, retry_after_secs: int = 1) -> HTTPException:
    return HTTPException(503, detail, headers={"Retry-After": str(retry_after_secs)})


def _as_json(prediction: Prediction, class_names: tuple[str, ...]) -> dict:
    if prediction.probabilities is None:
        return {"error": prediction.error}
    index, probability = prediction.top
    value: dict[str, Any] = {
        "label": class_names[index],
        "probability": probability,
        "probabilities": prediction.probabilities.tolist(),
    }
    if prediction.novelty is not None:
        value |= {"novelty": prediction.novelty, "is_novel": prediction.is_novel}
    if prediction.heatmap is not None:
        value["heatmap"] = [[round(float(heat), 3) for heat in row] for row in prediction.heatmap]
    return value
