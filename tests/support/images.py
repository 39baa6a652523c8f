"""Small folders of drawn images."""

import pathlib

import numpy as np
from PIL import Image


def write_images(
    directory: pathlib.Path, counts: dict[str, int], *, size: int = 40, seed: int = 0, noise: float = 20
) -> pathlib.Path:
    """Noise around a color of its own for each class, as JPEG files: easy to classify unless `noise` is large."""
    rng = np.random.default_rng(seed)
    colors = rng.permutation(np.linspace(30, 225, 3 * len(counts))).reshape(-1, 3)
    for color, (name, count) in zip(colors, counts.items(), strict=True):
        (directory / name).mkdir(parents=True)
        for i in range(count):
            shade = color + rng.normal(0, noise / 2, 3)
            pixels = np.clip(shade + rng.normal(0, noise, (size, size + 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(directory / name / f"{name}_{i:03d}.jpg", quality=90)
    return directory
