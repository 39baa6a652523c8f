"""Processes that decode: the same images as in the model, and none that stops the others."""

import asyncio
import time

import pytest
import tensorflow as tf

from tests.serving.conftest import DECODE_TIMEOUT_SECS
from tests.support import corpus, slow_images
from tests.support.tiny_model import NETWORK_INPUT, make_image
from trainer.data.preprocessing import decode_image


@pytest.mark.slow
def test_a_decoded_image_is_the_one_that_training_sees(decoders):
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WebP"):
        contents = make_image(1, kind=kind, height=300, width=200)
        decoded = asyncio.run(decoders.decode(contents))
        expected = decode_image(tf.constant(contents), NETWORK_INPUT)
        assert decoded.reason == ""
        assert (tf.io.decode_png(decoded.png) == expected).numpy().all()


@pytest.mark.slow
def test_a_bad_image_gets_the_reason_and_its_process_continues(decoders):
    num_killed = len(decoders.killed)
    damaged = corpus.png_claiming(96, 64)  # has too few pixels
    reasons = [asyncio.run(decoders.decode(contents)).reason for contents in (b"", b"text", damaged)]
    assert reasons[:2] == ["empty file", "not a JPEG, PNG, GIF, BMP or WebP image"]
    assert reasons[2].startswith("cannot be decoded: Invalid PNG data")
    assert len(decoders.killed) == num_killed


@pytest.mark.slow
def test_a_slow_image_is_given_up_while_others_are_decoded(decoders):
    num_killed = len(decoders.killed)

    async def decode_all() -> tuple[float, str]:
        """The longest time of a good image while the slow one is decoded, and the reason against that."""
        slow = asyncio.create_task(decoders.decode(slow_images.large_png(side=10000)))
        longest = 0.0
        while not slow.done():
            started = time.monotonic()
            assert (await decoders.decode(make_image(0))).reason == ""
            longest = max(longest, time.monotonic() - started)
        return longest, slow.result().reason

    longest, reason = asyncio.run(decode_all())
    assert reason.startswith(f"cannot be decoded within {DECODE_TIMEOUT_SECS:g} seconds")
    assert longest < DECODE_TIMEOUT_SECS
    assert len(decoders.killed) == num_killed + 1

    async def decode_many() -> list:
        return await asyncio.gather(*[decoders.decode(make_image(0)) for _ in range(20)])

    assert [decoded.reason for decoded in asyncio.run(decode_many())] == [""] * 20
