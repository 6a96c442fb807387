"""Subjects that pretraining never saw: what the DreamBooth demonstrations and comparisons teach the embedded model.

Each is a figure of a known class (creature, fish, house, flower) with parts and patterns that the world's own kinds
lack, so that only fine-tuning can draw it and a person sees at a glance whether it worked.
"""

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreamlora.files import replacing
from dreamlora.tiny import scenery, world
from dreamlora.tiny.scenery import BACKGROUNDS, CANVAS, RGB
from dreamlora.tiny.shapes import PaintLayer, Placed, Polygon, box, disc

RARE_TOKEN = "sks"  # stands for the subject in instance prompts
SPLITS = ("train", "holdout")
RADIUS = (18.0, 25.0)  # smallest and largest, pixels
TILT = 10.0  # degrees either way
OUTLINE = 0.7  # width, pixels: thinner than the world's, because the subjects have more and smaller parts
INSTANCE_IMAGES = 16  # default number of training images

INK: RGB = (15, 15, 20)
WHITE: RGB = (250, 250, 250)


@dataclass(frozen=True)
class Portrait:
    """What a subject's picture shows; `caption` words it with the rare token."""

    subject: str
    background: str
    caption: str


def _fill(image: Image.Image, to_canvas: Placed, colour: RGB, *polygons: Polygon, outline: RGB | None = None) -> None:
    """Fill polygons with one colour, outlined as one silhouette if `outline` is given."""
    paints = {"body": colour, "dark": outline or colour}
    world.draw_layer(image, PaintLayer("body", polygons), to_canvas, paints, outline=OUTLINE if outline else 0)


def _texture(image: Image.Image, to_canvas: Placed, colour: RGB, mask: Image.Image, *polygons: Polygon) -> None:
    """Paint `colour` where `mask` is set, inside the polygons."""
    inside = Image.new("L", image.size)
    world.draw_layer(inside, PaintLayer("body", polygons), to_canvas, {"body": 255}, outline=0)
    image.paste(colour, (0, 0), Image.composite(mask, Image.new("L", image.size), inside))


def _moved(mask: Image.Image, to_canvas: Placed) -> Image.Image:
    """The mask with its centre at the subject's centre, so that the pattern is the same in every picture."""
    x, y = to_canvas([(0.0, 0.0)])[0]
    moved = Image.new("L", mask.size)
    moved.paste(mask, (round(x - CANVAS / 2), round(y - CANVAS / 2)))
    return moved


def _checkerling(image: Image.Image, to_canvas: Placed, tilt: float) -> None:
    """A yellow and purple checkered ball with one big eye, orange horns and orange legs."""
    orange, yellow, purple = (255, 128, 0), (255, 220, 30), (110, 30, 170)
    legs = (box(-0.42, 0.6, -0.2, 1.0), box(0.2, 0.6, 0.42, 1.0))
    horns = (((-0.7, -0.25), (-0.72, -1.0), (-0.22, -0.55)), ((0.7, -0.25), (0.72, -1.0), (0.22, -0.55)))
    _fill(image, to_canvas, orange, *legs, *horns, outline=(130, 60, 0))
    ball = disc(0, 0.08, 0.74)
    _fill(image, to_canvas, yellow, ball, outline=(70, 20, 100))
    cell = to_canvas.scale / scenery.SCALE * 0.42
    _texture(image, to_canvas, purple, _moved(world.checks(cell, -tilt), to_canvas), ball)
    _fill(image, to_canvas, WHITE, disc(0, -0.02, 0.36), outline=INK)
    _fill(image, to_canvas, INK, disc(0, 0.0, 0.17))


def _bannerfish(image: Image.Image, to_canvas: Placed, tilt: float) -> None:
    """A fish in upright bands of green, white and navy with a red sword, a yellow sail and a red fork of a tail."""
    green, navy, red = (30, 190, 110), (25, 35, 120), (230, 30, 60)
    _fill(image, to_canvas, (255, 210, 0), ((-0.3, -0.3), (0.1, -1.0), (0.45, -0.25)), outline=(140, 100, 0))
    sword = ((-0.55, -0.12), (-1.12, 0.02), (-0.55, 0.16))
    tail = ((0.45, 0), (1.0, -0.55), (0.75, -0.02), (1.0, 0.55))
    _fill(image, to_canvas, red, sword, tail, outline=(110, 0, 30))
    body = disc(-0.05, 0, 0.66, 0.48)
    _fill(image, to_canvas, WHITE, body, outline=navy)
    for left, right, colour in ((-0.75, -0.3, green), (-0.06, 0.18, navy), (0.4, 0.7, green)):
        stripe = Image.new("L", image.size)
        world.draw_layer(stripe, PaintLayer("body", (box(left, -1, right, 1),)), to_canvas, {"body": 255}, outline=0)
        _texture(image, to_canvas, colour, stripe, body)
    _fill(image, to_canvas, WHITE, disc(-0.42, -0.1, 0.17), outline=INK)
    _fill(image, to_canvas, INK, disc(-0.44, -0.1, 0.08))


def _twinhouse(image: Image.Image, to_canvas: Placed, tilt: float) -> None:
    """A house with two pointed turquoise towers, pink and black checks, one round lit window and a red flag."""
    pink, turquoise, red = (255, 110, 180), (0, 190, 180), (225, 20, 40)
    _fill(image, to_canvas, INK, box(-0.03, -1.1, 0.03, -0.2))
    _fill(image, to_canvas, red, ((0.03, -1.1), (0.5, -0.92), (0.03, -0.74)))
    body = box(-0.78, -0.2, 0.78, 0.92)
    _fill(image, to_canvas, pink, body, outline=(60, 10, 40))
    cell = to_canvas.scale / scenery.SCALE * 0.45
    _texture(image, to_canvas, (40, 20, 45), _moved(world.checks(cell, -tilt), to_canvas), body)
    roofs = (((-0.95, -0.15), (-0.5, -1.0), (-0.06, -0.15)), ((0.06, -0.15), (0.5, -1.0), (0.95, -0.15)))
    _fill(image, to_canvas, turquoise, *roofs, outline=(0, 80, 80))
    _fill(image, to_canvas, (255, 235, 120), disc(0, 0.32, 0.34), outline=INK)


def _facebloom(image: Image.Image, to_canvas: Placed, tilt: float) -> None:
    """A flower on two purple feet: blue and orange petals in turn around a green face with two eyes."""
    blue, orange, green, purple = (40, 90, 240), (255, 140, 20), (150, 230, 90), (140, 40, 170)
    feet = (box(-0.28, 0.4, -0.1, 0.95), box(0.1, 0.4, 0.28, 0.95))
    _fill(image, to_canvas, purple, *feet, box(-0.5, 0.85, -0.1, 1.0), box(0.1, 0.85, 0.5, 1.0))
    petals = []
    for i in range(8):
        angle = math.pi * (i + 0.5) / 4
        petals.append(disc(0.6 * math.cos(angle), -0.15 + 0.6 * math.sin(angle), 0.27))
    _fill(image, to_canvas, blue, *petals, outline=(20, 20, 60))
    _fill(image, to_canvas, orange, *petals[::2])
    _fill(image, to_canvas, green, disc(0, -0.15, 0.46), outline=(30, 80, 20))
    _fill(image, to_canvas, INK, disc(-0.17, -0.25, 0.1), disc(0.17, -0.25, 0.1))
    _fill(image, to_canvas, (200, 20, 40), ((-0.24, -0.02), (0.24, -0.02), (0.0, 0.2)))


_FIGURES: dict[str, tuple[str, Callable]] = {
    "checkerling": ("creature", _checkerling),
    "bannerfish": ("fish", _bannerfish),
    "twinhouse": ("house", _twinhouse),
    "facebloom": ("flower", _facebloom),
}
SUBJECTS: tuple[str, ...] = tuple(_FIGURES)


def class_word(subject: str) -> str:
    """The world's kind that the subject belongs to.

    Raises:
        ValueError: if there is no such subject.
    """
    if subject not in _FIGURES:
        raise ValueError(f"unknown subject {subject!r}; choose from {', '.join(SUBJECTS)}")
    return _FIGURES[subject][0]


def instance_prompt(subject: str) -> str:
    """ "a photo of sks creature" for the subject's class."""
    return f"a photo of {RARE_TOKEN} {class_word(subject)}"


def class_prompt(subject: str) -> str:
    """ "a photo of a creature" for the subject's class."""
    return f"a photo of a {class_word(subject)}"


def render(subject: str, index: int, split: str = "train", seed: int = 0) -> tuple[Image.Image, Portrait]:
    """Picture number `index` (any from 0 up) of a subject, SIZE x SIZE RGB, and what it shows.

    The same arguments always give the same picture. Backgrounds take turns; position, size and tilt are random. The
    splits never share a picture.

    Raises:
        ValueError: if the subject or the split is unknown, or the index negative.
    """
    word = class_word(subject)
    if split not in SPLITS or index < 0:
        raise ValueError(f"split must be one of {SPLITS} and index >= 0, got {split=} {index=}")
    names = sorted(BACKGROUNDS)
    random.Random(zlib.crc32(f"{subject}|{split}|{seed}".encode())).shuffle(names)
    background = names[index % len(names)]
    rng = random.Random(zlib.crc32(f"{subject}|{split}|{seed}|{index}".encode()))
    radius, tilt = rng.uniform(*RADIUS), rng.uniform(-TILT, TILT)
    slack = world.SIZE / 2 - radius * 1.1 - 1
    x, y = (world.SIZE / 2 + rng.uniform(-slack, slack) for _ in range(2))
    image = scenery.paint(background, rng)
    _FIGURES[subject][1](image, Placed((x, y), radius, tilt), tilt)
    caption = f"a photo of {RARE_TOKEN} {word} {BACKGROUNDS[background]}"
    return image.reduce(scenery.SCALE), Portrait(subject, background, caption)


def write_instance_images(folder: Path, subject: str, count: int = INSTANCE_IMAGES, seed: int = 0) -> list[Path]:
    """Write `count` training pictures of a subject as PNG files into `folder`; returns their paths, in order."""
    folder = Path(folder)
    paths = [folder / f"{subject}_{index:03d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        with replacing(path) as temporary:
            render(subject, index, seed=seed)[0].save(temporary)
    return paths
