"""Collects the images of all clients into batches for the network, which runs in one thread.

Shapes: C classes, [H, W] a heat map.
"""

import asyncio
import collections
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from trainer.serving.classifier import Classifier, Prediction, classify

# Images per call of the network. Larger batches are not faster on a CPU (measured: 99 ms for 1 image, 124 ms per image
# in a batch of 8) and take more memory.
BATCH_SIZE = 8

# How long an image waits for others while the network is idle. While it is busy, images collect without waiting.
PATIENCE_SECS = 0.005


class _Item(NamedTuple):
    image: bytes
    explain: bool
    prediction: asyncio.Future[Prediction]


class ModelQueue:
    """Images that wait for the network, in order of arrival. `on_batch` receives the size and seconds of each call."""

    def __init__(self, classifier: Classifier, *, on_batch: Callable[[int, float], None]):
        self._classifier = classifier
        self._on_batch = on_batch
        self._items: collections.deque[_Item] = collections.deque()
        self._has_items = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")  # one call of TensorFlow uses all cores; other calls wait
        self._secs_per_image = 0.0

    def __len__(self) -> int:
        return len(self._items)

    def expected_wait_secs(self, num_images: int) -> int:
        """Seconds until this many images more are classified, from the time that images took recently; at least 1."""
        return max(1, math.ceil((len(self._items) + num_images) * self._secs_per_image))

    async def classify(self, image: bytes, *, explain: bool) -> Prediction:
        """The prediction for the contents of an image file. An image whose caller was cancelled is not classified."""
        item = _Item(image, explain, asyncio.get_running_loop().create_future())
        self._items.append(item)
        self._has_items.set()
        return await item.prediction

    async def run(self) -> None:
        """Classifies the images that arrive, until it is cancelled."""
        while True:
            self._has_items.clear()
            if not self._items:
                await self._has_items.wait()
                await asyncio.sleep(PATIENCE_SECS)
            batch = self._next_batch()
            if batch:
                await self._classify(batch)

    def _next_batch(self) -> list[_Item]:
        """The first images, as far as all want heat maps or none does."""
        batch: list[_Item] = []
        while self._items and len(batch) < BATCH_SIZE:
            if batch and self._items[0].explain != batch[0].explain:
                break
            item = self._items.popleft()
            if not item.prediction.done():  # cancelled
                batch.append(item)
        return batch

    async def _classify(self, batch: list[_Item]) -> None:
        started = time.monotonic()
        images = [("", item.image) for item in batch]
        work = functools.partial(classify, self._classifier, images, explain=batch[0].explain)
        predictions: Sequence[Prediction | Exception]
        try:
            predictions = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except Exception as error:  # of TensorFlow, as for lack of memory: these requests fail, the server continues
            predictions = [error] * len(batch)
        seconds = time.monotonic() - started
        latest = seconds / len(batch)
        self._secs_per_image = latest if not self._secs_per_image else 0.8 * self._secs_per_image + 0.2 * latest
        self._on_batch(len(batch), seconds)
        for item, prediction in zip(batch, predictions, strict=True):
            if item.prediction.done():
                continue
            if isinstance(prediction, Exception):
                item.prediction.set_exception(prediction)
            else:
                item.prediction.set_result(prediction)
