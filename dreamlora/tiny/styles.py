"""Styles that pretraining never saw: the whole world drawn in another way, with captions that name what is shown.

What the text-to-image demonstration teaches the embedded model. The captions do not name the style: after training,
ordinary prompts come out in it.
"""

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from dreamlora.files import replacing, write_atomically
from dreamlora.tiny import scenery, world
from dreamlora.tiny.scenery import RGB, SCALE

PAPER: RGB = (244, 231, 200)
INK: RGB = (44, 30, 26)
GROOVE = 7.0  # distance of the cut lines, pixels of the finished picture
PAIRS = 0.15  # share of pictures with two things
SPLITS = ("train", "holdout")


def _woodcut(background: Image.Image, picture: Image.Image) -> Image.Image:
    """A tinted woodcut of `picture`, which shows things on `background`.

    Washed-out colours on paper; cut lines across the background, wider where it is dark; and around every thing an ink
    outline in a rim of bare paper, so that it stands out.
    """
    things = ImageChops.difference(background, picture).convert("L").point(lambda value: 255 * (value > 6))
    things = things.filter(ImageFilter.MaxFilter(3))
    outline, rim = (things.filter(ImageFilter.MaxFilter(side)) for side in (7, 13))
    light = np.asarray(background.convert("L").filter(ImageFilter.GaussianBlur(2)), dtype=np.float64) / 255
    y, x = np.mgrid[: background.height, : background.width] / SCALE
    groove = (y + 1.2 * np.sin(x / 5)) / GROOVE % 1
    lines = groove < np.clip(0.7 * (0.9 - light), 0.0, 0.4)
    paper = Image.new("RGB", picture.size, PAPER)
    tinted = np.array(Image.blend(picture, paper, 0.35))
    inside, inked, bare = (np.asarray(mask) > 0 for mask in (things, outline, rim))
    tinted[lines] = INK
    tinted[bare] = PAPER
    tinted[inked] = INK
    tinted[inside] = np.asarray(Image.blend(picture, paper, 0.15))[inside]
    return Image.fromarray(tinted)


_STYLES: dict[str, Callable[[Image.Image, Image.Image], Image.Image]] = {"woodcut": _woodcut}
STYLES: tuple[str, ...] = tuple(_STYLES)


def render(style: str, index: int, split: str = "train", seed: int = 0) -> tuple[Image.Image, str]:
    """Picture number `index` (any from 0 up) of the world in a style, SIZE x SIZE RGB, and its caption.

    The same arguments always give the same picture. The held-out split shows (kind, colour, background) triples that
    training never sees.

    Raises:
        ValueError: if the style or the split is unknown, or the index negative.
    """
    if style not in _STYLES:
        raise ValueError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    if split not in SPLITS or index < 0:
        raise ValueError(f"split must be one of {SPLITS} and index >= 0, got {split=} {index=}")
    rng = random.Random(zlib.crc32(f"{style}|{split}|{seed}|{index}".encode()))
    sample = world.sample_pair if rng.random() < PAIRS else world.sample_scene
    scene = sample(rng, held_out=split == "holdout")
    background = scenery.paint(scene.background, rng)
    picture = background.copy()
    world.draw_things(picture, scene, rng)
    return _STYLES[style](background, picture).reduce(SCALE), world.describe(scene)


def write_images(folder: Path, style: str, count: int, split: str = "train", seed: int = 0) -> list[Path]:
    """Write `count` pictures as PNG files with `metadata.jsonl` into `folder`; returns their paths, in order."""
    folder = Path(folder)
    paths = [folder / f"{style}_{index:04d}.png" for index in range(count)]
    rows = []
    for index, path in enumerate(paths):
        image, caption = render(style, index, split, seed)
        with replacing(path) as temporary:
            image.save(temporary)
        rows.append(json.dumps({"file_name": path.name, "text": caption}) + "\n")
    write_atomically(folder / "metadata.jsonl", "".join(rows))
    return paths
