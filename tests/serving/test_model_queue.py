"""Images of several clients share calls of the network; their answers do not mix."""

import asyncio
import threading

import numpy as np
import pytest

from tests.support.tiny_model import make_image
from trainer.serving.classifier import Classifier, Outputs
from trainer.serving.model_queue import ModelQueue

IMAGES = [make_image(0, seed=seed, height=20, width=20) for seed in range(20)]


class CountingClassifier:
    """Gives image i of IMAGES the probability i / 20, and remembers the size of each call."""

    def __init__(self, may_return: threading.Event | None = None):
        self.calls: list[tuple[str, int]] = []
        self._may_return = may_return

    def classifier(self) -> Classifier:
        return Classifier(("cat", "dog"), self._predict, self._explain)

    def _predict(self, contents: list[bytes]) -> Outputs:
        self.calls.append(("plain", len(contents)))
        if self._may_return:
            assert self._may_return.wait(60)
        rows = [IMAGES.index(one) / 20 for one in contents]
        return Outputs(np.array([[value, 1 - value] for value in rows], np.float32))

    def _explain(self, contents: list[bytes]) -> Outputs:
        outputs = self._predict(contents)
        self.calls[-1] = ("explain", len(contents))
        return outputs._replace(heatmaps=np.zeros([len(contents), 2, 2], np.float32))


def run_queue(counting: CountingClassifier, use) -> ModelQueue:
    """Runs `use(queue)` while the queue works."""

    async def run() -> ModelQueue:
        queue = ModelQueue(counting.classifier(), on_batch=lambda num_images, seconds: None)
        worker = asyncio.create_task(queue.run())
        await use(queue)
        worker.cancel()
        return queue

    return asyncio.run(run())


def test_images_of_several_clients_share_calls():
    counting = CountingClassifier()

    async def use(queue: ModelQueue) -> None:
        predictions = await asyncio.gather(*[queue.classify(image, explain=False) for image in IMAGES])
        values = [prediction.probabilities[0] for prediction in predictions]
        np.testing.assert_allclose(values, np.arange(20) / 20, atol=1e-6)

    run_queue(counting, use)
    assert counting.calls == [("plain", 8), ("plain", 8), ("plain", 4)]


def test_heat_maps_are_computed_only_for_those_who_want_them():
    counting = CountingClassifier()

    async def use(queue: ModelQueue) -> None:
        wants = [False, False, True, True, True, False]
        predictions = await asyncio.gather(
            *[queue.classify(image, explain=want) for image, want in zip(IMAGES, wants, strict=False)]
        )
        assert [prediction.heatmap is not None for prediction in predictions] == wants

    run_queue(counting, use)
    assert counting.calls == [("plain", 2), ("explain", 3), ("plain", 1)]


def test_an_image_whose_client_has_left_is_not_classified():
    may_return = threading.Event()
    counting = CountingClassifier(may_return)

    async def use(queue: ModelQueue) -> None:
        first = asyncio.create_task(queue.classify(IMAGES[0], explain=False))
        while not counting.calls:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(queue.classify(image, explain=False)) for image in IMAGES[1:4]]
        await asyncio.sleep(0)
        others[0].cancel()
        others[1].cancel()
        may_return.set()
        await first
        assert (await others[2]).probabilities[0] == pytest.approx(3 / 20)

    run_queue(counting, use)
    assert counting.calls == [("plain", 1), ("plain", 1)]


def test_an_error_of_the_network_fails_its_batch_and_no_other():
    counting = CountingClassifier()

    async def use(queue: ModelQueue) -> None:
        with pytest.raises(ValueError, match="not in list"):  # of CountingClassifier
            await queue.classify(make_image(1), explain=False)
        assert (await queue.classify(IMAGES[5], explain=False)).probabilities[0] == pytest.approx(0.25)

    run_queue(counting, use)


def test_the_expected_wait_grows_with_the_queue():
    may_return = threading.Event()
    counting = CountingClassifier(may_return)

    async def use(queue: ModelQueue) -> None:
        assert queue.expected_wait_secs(100) == 1  # nothing is known yet
        threading.Timer(0.5, may_return.set).start()
        await queue.classify(IMAGES[0], explain=False)
        assert queue.expected_wait_secs(0) == 1
        assert 50 <= queue.expected_wait_secs(100) < 200

    run_queue(counting, use)
