"""What the server answers: the page, predictions, health. It holds no more than its limits allow, whoever asks.

Shapes: C classes, [H, W] places of a heat map.
"""

import asyncio
import base64
import binascii
import contextlib
import functools
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from absl import logging
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from trainer.data import formats
from trainer.reporting import html
from trainer.serving.classifier import Classifier, Prediction, classify

MAX_INSTANCES = 128  # of one request


# Pictures that the network sees at once: more are not faster on a CPU (measured: 99 ms for 1, 124 ms each of 8), and take
# memory.
BATCH_SIZE = 8


EXPECTED_REQUEST = '{"instances": [{"bytes": {"b64": "..."}}, ...]}'


# What the page may do, said by the server: nothing but its own script and style, and requests to this server.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


# A picture of one pixel, to try the model on before others do: its first call takes seconds.
BLACK_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mNgYGAAAAAEAAHI6uv5AAAAAElFTkSuQmCC"
)


class Limits(NamedTuple):
    """Of what is held in memory and for how long."""

    request_bytes: int
    requests: int
    pixels: int  # of one picture, and of all that are decoded at a time; a few bytes of a PNG may claim very many
    seconds: float


class HTTPException(Exception):
    """The request as a whole cannot be answered."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class ServingApp:
    """A model behind HTTP; it is loaded when the server starts, in a thread, so that /health answers at once."""

    def __init__(self, load: Callable[[], Classifier], limits: Limits, predict_route: str, health_route: str):
        self._load, self._limits = load, limits
        self._predict_route, self._health_route = predict_route, health_route
        self._labeller: Classifier | None = None
        self._num_requests = 0
        self._model_thread = ThreadPoolExecutor(1)  # TensorFlow takes all cores for one call; the others wait in line
        self.failure: BaseException | None = None
        self.on_failure = lambda: None

    def starlette(self) -> Starlette:
        """The application for an ASGI server."""
        routes = [
            Route(self._health_route, self._health),
            Route(self._predict_route, self._predict, methods=["POST"]),
        ]
        if "/" not in (self._health_route, self._predict_route):
            routes.append(Route("/", self._page))
        return Starlette(routes=routes, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, application: Starlette) -> AsyncIterator[None]:
        # A daemon: a signal while the model is loaded ends the process at once.
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
            self.on_failure()
        else:
            self._labeller = classifier
            logging.info("Ready after %.0f s.", time.monotonic() - started)

    async def _page(self, request: Request) -> Response:
        settings = {
            "predict": self._predict_route,
            "health": self._health_route,
            "max_request_bytes": self._limits.request_bytes,
        }
        text = html.render("serve.html", settings=settings)
        return HTMLResponse(
            text, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}
        )

    async def _health(self, request: Request) -> Response:
        if self._labeller is None:
            return JSONResponse({"status": "loading"}, 503, headers={"Retry-After": "2"})
        names, explains = self._labeller.class_names, self._labeller.explain is not None
        return JSONResponse({"status": "ready", "class_names": names, "explains": explains})

    async def _predict(self, request: Request) -> Response:
        started = time.monotonic()
        try:
            predictions = await self._predictions(request)
        except HTTPException as refused:
            logging.info("%d: %s", refused.status, refused)
            headers = {"Retry-After": "1"} if refused.status == 503 else {}
            return JSONResponse({"error": str(refused)}, refused.status, headers=headers)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        bad = sum("error" in prediction for prediction in predictions)
        logging.info("%d pictures, %d bad, %.0f ms", len(predictions), bad, 1000 * (time.monotonic() - started))
        return JSONResponse({"predictions": predictions})

    async def _predictions(self, request: Request) -> list[dict]:
        classifier = self._labeller
        if classifier is None:
            raise HTTPException(503, "The model is being loaded: come again.")
        if self._num_requests >= self._limits.requests:
            raise HTTPException(
                503, f"{self._limits.requests} requests are being worked on, as many as may be: come again."
            )
        self._num_requests += 1
        doing = "The request did not arrive"
        try:
            async with asyncio.timeout(self._limits.seconds):
                body = await self._body(request)
                doing = "The model was not free"
                contents, explain = await asyncio.to_thread(read_request, body, self._limits.pixels)
                del body
                if explain and not classifier.explain:
                    raise HTTPException(
                        400, "This model was exported without heat maps: leave out the parameter explain."
                    )
                return await self._ask(classifier, contents, explain)
        except TimeoutError:
            status = 408 if doing.startswith("The request") else 503
            raise HTTPException(status, f"{doing} within {self._limits.seconds:g} seconds.") from None
        finally:
            self._num_requests -= 1

    async def _body(self, request: Request) -> bytearray:
        limit = self._limits.request_bytes
        body = bytearray()
        claimed = request.headers.get("content-length", "0")
        if int(claimed) <= limit:  # the HTTP library has seen to it that it is a number
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    break
        if max(int(claimed), len(body)) > limit:
            raise HTTPException(
                413, f"The request is larger than {limit // 2**20} MiB: send fewer or smaller pictures."
            )
        return body

    async def _ask(self, classifier: Classifier, contents: list[bytes | HTTPException], explain: bool) -> list[dict]:
        """A prediction for each of the contents; between batches others may have their turn."""
        predictions = []
        for batch in batches(contents, self._limits.pixels):
            good = [("", content) for content in batch if not isinstance(content, HTTPException)]
            work = functools.partial(classify, classifier, good, explain=explain)
            answers = iter(await asyncio.get_running_loop().run_in_executor(self._model_thread, work))
            predictions += [
                {"error": str(content)}
                if isinstance(content, HTTPException)
                else _as_json(next(answers), classifier.class_names)
                for content in batch
            ]
        return predictions


def _as_json(prediction: Prediction, class_names: tuple[str, ...]) -> dict:
    if prediction.probabilities is None:
        return {"error": prediction.error}
    probabilities = [float(value) for value in prediction.probabilities]
    best = int(prediction.probabilities.argmax())
    answer = {
        "label": class_names[best],
        "probability": probabilities[best],
        "probabilities": probabilities,
    }
    if prediction.heatmap is not None:
        answer["heatmap"] = [[round(float(value), 3) for value in row] for row in prediction.heatmap]
    return answer


def batches(contents: list[bytes | HTTPException], max_pixels: int) -> Iterator[list[bytes | HTTPException]]:
    """The contents in order, BATCH_SIZE or fewer at a time, and no more pixels together than `max_pixels`."""
    batch: list[bytes | HTTPException] = []
    pixels = 0
    for content in contents:
        more = 0 if isinstance(content, HTTPException) else _pixels(content)
        if batch and (len(batch) == BATCH_SIZE or pixels + more > max_pixels):
            yield batch
            batch, pixels = [], 0
        batch.append(content)
        pixels += more
    yield batch


def _pixels(content: bytes) -> int:
    claimed = formats.header_size(content)
    return claimed.width * claimed.height if claimed else 0


def read_request(body: bytes | bytearray, max_pixels: int) -> tuple[list[bytes | HTTPException], bool]:
    """The bytes of each picture, or what is wrong with it, and whether heat maps are asked for.

    Raises Refused for what is no such request.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The request is no JSON ({error}): send {EXPECTED_REQUEST}") from None
    instances = request.get("instances") if isinstance(request, dict) else None
    if not isinstance(instances, list) or not instances:
        raise HTTPException(400, f"The request has no list of instances: send {EXPECTED_REQUEST}")
    if len(instances) > MAX_INSTANCES:
        raise HTTPException(413, f"The request has {len(instances)} instances: send {MAX_INSTANCES} or fewer.")
    parameters = request.get("parameters") or {}
    explain = parameters.get("explain", False) if isinstance(parameters, dict) else None
    if not isinstance(explain, bool) or set(parameters) - {"explain"}:
        raise HTTPException(400, 'The request\'s parameters are not {"explain": true} or {"explain": false}.')
    return [_contents(instance, max_pixels) for instance in instances], explain


def _contents(instance: object, max_pixels: int) -> bytes | HTTPException:
    """The bytes in {"bytes": {"b64": "..."}}, or in {"b64": "..."}, as TensorFlow Serving takes them too."""
    value = instance.get("bytes", instance) if isinstance(instance, dict) else None
    text = value.get("b64") if isinstance(value, dict) else None
    if not isinstance(text, str):
        return HTTPException(400, 'not a picture as {"bytes": {"b64": "..."}}')
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return HTTPException(400, f"not base64 ({error})")
    pixels = _pixels(content)
    if pixels > max_pixels:
        taken = f"more than the {max_pixels / 1e6:g} that this server takes"
        return HTTPException(413, f"the picture has {pixels / 1e6:.0f} megapixels, {taken}: scale it down")
    return content
