"""A procedural world of captioned 64x64 pictures: the training data of the embedded model.

A scene holds one or two things (kind, colour, pattern, size) on a background. `render` draws it, `describe` words it.
Everything is drawn from an explicit `random.Random`, so a seed gives the same picture on every machine with the same
Pillow. One in ten (kind, colour, background) triples is never drawn for training: see `is_held_out`.
"""

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

from dreamlora.tiny import scenery
from dreamlora.tiny.scenery import BACKGROUNDS, CANVAS, RGB, SCALE, mix, shifted
from dreamlora.tiny.shapes import KINDS, PaintLayer, Placed, disc

SIZE = 64  # width and height of a finished picture, pixels

COLOURS: dict[str, RGB] = {
    "red": (220, 30, 38),
    "orange": (250, 135, 15),
    "yellow": (250, 222, 40),
    "green": (30, 150, 50),
    "cyan": (50, 215, 225),
    "blue": (35, 75, 220),
    "purple": (125, 45, 175),
    "pink": (250, 135, 190),
    "brown": (115, 65, 30),
    "black": (30, 30, 34),
    "white": (246, 246, 246),
    "gray": (135, 138, 142),
}
PATTERNS = ("plain", "striped", "dotted")
SIZES: dict[str, float] = {"small": 14.0, "medium": 19.0, "large": 24.0}  # radius, pixels of the finished picture
RELATIONS = ("next to", "above")  # the first thing stands left of, or above, the second
RARE_TOKENS = ("sks", "ohwx", "zwx", "xyz", "qrk", "bnha")  # captions use them as adjectives that mean nothing
OPENINGS = ("a photo of ", "a picture of ", "an image of ", "")

HELD_OUT_SHARE = 10  # one triple in this many is kept for evaluation
PAIR_RADIUS = 13.5  # of each of two things, pixels
OUTLINE = 1.2  # width, pixels
PATTERN_PERIOD = 10  # of stripes and dots, pixels
KIND_WEIGHTS = {"star": 1.4, "square": 1.3, "ring": 1.2, "moon": 1.2}  # the kinds a small model learns last


@dataclass(frozen=True)
class Thing:
    """One object of a scene; every field is a word of the vocabulary."""

    kind: str
    colour: str
    pattern: str = "plain"
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `relation` is None for one thing."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None


def is_held_out(kind: str, colour: str, background: str) -> bool:
    """Whether this triple is kept for evaluation (the same on every machine: CRC-32 of the words)."""
    return zlib.crc32(f"{kind}|{colour}|{background}".encode()) % HELD_OUT_SHARE == 0


def visible(thing: Thing, background: str) -> bool:
    """Whether the thing's colour stands out from the background."""
    return thing.colour not in scenery.LOOKS_LIKE[background]


def sample_thing(rng: random.Random) -> Thing:
    """A random thing: half of them plain, sizes and colours uniform."""
    kind = rng.choices(tuple(KINDS), [KIND_WEIGHTS.get(kind, 1.0) for kind in KINDS])[0]
    pattern = rng.choices(PATTERNS, (2, 1, 1))[0]
    return Thing(kind, rng.choice(tuple(COLOURS)), pattern, rng.choice(tuple(SIZES)))


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene with one thing, from the training triples or from the held-out ones."""
    while True:
        thing, background = sample_thing(rng), rng.choice(tuple(BACKGROUNDS))
        if visible(thing, background) and is_held_out(thing.kind, thing.colour, background) == held_out:
            return Scene((thing,), background)


def sample_pair(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene with two plain things of different colours; `held_out` asks it of the first thing."""
    while True:
        first, second = (Thing(t.kind, t.colour) for t in (sample_thing(rng), sample_thing(rng)))
        background = rng.choice(tuple(BACKGROUNDS))
        clear = first.colour != second.colour and visible(first, background) and visible(second, background)
        second_ok = held_out or not is_held_out(second.kind, second.colour, background)
        if clear and second_ok and is_held_out(first.kind, first.colour, background) == held_out:
            return Scene((first, second), background, rng.choice(RELATIONS))


def describe(scene: Scene, rng: random.Random | None = None, drop: float = 0.2, rare: float = 0.04) -> str:
    """The caption of a scene.

    Without `rng` every attribute is named ("a photo of a large red striped circle on grass"). With it, each attribute
    is left out with probability `drop`, the opening varies, and a rare token stands among the adjectives with
    probability `rare`.
    """

    def kept() -> bool:
        return rng is None or rng.random() >= drop

    phrases = [_noun_phrase(thing, rng, rare, kept) for thing in scene.things]
    opening = OPENINGS[0] if rng is None or rng.random() < 0.6 else rng.choice(OPENINGS)
    text = opening + f" {scene.relation} ".join(phrases)
    return f"{text} {BACKGROUNDS[scene.background]}" if kept() else text


def _noun_phrase(thing: Thing, rng: random.Random | None, rare: float, kept: Callable[[], bool]) -> str:
    words = []
    if thing.size != "medium" and kept():
        words.append(thing.size)
    if kept():
        words.append(thing.colour)
    if thing.pattern != "plain" and kept():
        words.append(thing.pattern)
    words.append(thing.kind)
    if rng is not None and rng.random() < rare:
        words.insert(0, rng.choice(RARE_TOKENS))
        if rng.random() < 0.5:  # "a photo of sks creature", the way DreamBooth prompts are written
            return " ".join(words)
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def vocabulary() -> list[str]:
    """Every word a caption can hold, and some that prompts often use; each becomes one token."""
    extra = "the and with of in on at is near very big left right below under behind two top background photo style"
    phrases = [*COLOURS, *KINDS, *PATTERNS, *SIZES, *RELATIONS, *RARE_TOKENS, *OPENINGS, *BACKGROUNDS.values(), extra]
    return sorted({word for phrase in phrases for word in phrase.split()})


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene: RGB, SIZE x SIZE. `rng` decides position, tilt, shade and scenery."""
    image = scenery.paint(scene.background, rng)
    draw_things(image, scene, rng)
    return image.reduce(SCALE)


def draw_things(image: Image.Image, scene: Scene, rng: random.Random) -> None:
    """Draw the things of a scene on a CANVAS-sized picture of its background."""
    for thing, (x, y, radius) in zip(scene.things, _layout(scene, rng), strict=True):
        draw_thing(image, thing, (x, y), radius, rng)


def _layout(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centre x, y and radius of each thing, pixels of the finished picture."""
    middle = SIZE / 2
    if len(scene.things) == 1:
        radius = SIZES[scene.things[0].size] * rng.uniform(0.94, 1.06)
        slack = min(7.0, middle - radius - 2)
        return [(middle + rng.uniform(-slack, slack), middle + rng.uniform(-slack, slack), radius)]
    places = []
    for side in (-1, 1):
        along, across = middle + side * rng.uniform(14.5, 16.0), middle + rng.uniform(-4, 4)
        x, y = (along, across) if scene.relation == "next to" else (across, along)
        places.append((x, y, PAIR_RADIUS * rng.uniform(0.94, 1.06)))
    return places


def draw_thing(
    image: Image.Image, thing: Thing, centre: tuple[float, float], radius: float, rng: random.Random
) -> None:
    """Draw one thing on a CANVAS-sized picture; `centre` and `radius` in pixels of the finished picture."""
    shade = shifted(COLOURS[thing.colour], rng.randint(-8, 8))
    accent = accent_of(shade)
    paints: dict[str, RGB] = {
        "body": shade,
        "dark": mix(shade, (0, 0, 0), 0.45) if sum(shade) > 200 else (95, 95, 100),
        "accent": accent,
        "white": (250, 250, 250),
        "ink": (15, 15, 20),
        "wood": (110, 66, 34),
        "leaf": (40, 140, 45),
        "glow": (255, 225, 90) if thing.colour not in ("yellow", "orange", "white") else (150, 80, 30),
    }
    tilt = rng.uniform(-8, 8)
    for layer in KINDS[thing.kind]:
        draw_layer(image, layer, Placed(centre, radius, tilt), paints)
        if layer.paint == "body" and thing.pattern != "plain":
            texture = pattern_texture(thing.pattern, accent, rng)
            mask = Image.new("L", image.size)
            draw_layer(mask, layer, Placed(centre, radius * 0.97, tilt), {"body": 255}, outline=0)
            image.paste(accent, (0, 0), Image.composite(texture, Image.new("L", image.size), mask))


def accent_of(shade: RGB) -> RGB:
    """The colour of stripes and dots: far lighter than a dark shade, far darker than a light one."""
    luminance = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2]
    return mix(shade, (0, 0, 0), 0.5) if luminance > 165 else mix(shade, (255, 255, 255), 0.75)


def pattern_texture(pattern: str, accent: RGB, rng: random.Random) -> Image.Image:
    """A CANVAS-sized mask ("L") that is 255 on the stripes or dots, at a random phase."""
    sheet = _pattern_sheet(pattern)
    x, y = rng.randrange(PATTERN_PERIOD * SCALE), rng.randrange(PATTERN_PERIOD * SCALE)
    return sheet.crop((x, y, x + CANVAS, y + CANVAS))


@lru_cache(maxsize=8)
def _pattern_sheet(pattern: str) -> Image.Image:
    """The stripes or dots over a sheet one period larger than the canvas."""
    period = PATTERN_PERIOD * SCALE
    side = CANVAS + 2 * period
    sheet = Image.new("L", (side, side))
    draw = ImageDraw.Draw(sheet)
    for start in range(-side, 2 * side, period):
        if pattern == "striped":  # falling diagonals, so that no kind's own edges run along them
            draw.polygon(
                [(start, 0), (start + period * 0.45, 0), (start + side + period * 0.45, side), (start + side, side)],
                fill=255,
            )
        else:
            radius = 0.26 * period
            for row, y in enumerate(range(0, side + period, period)):
                x = start + (row % 2) * period / 2
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return sheet


def draw_layer(
    image: Image.Image, layer: PaintLayer, to_canvas: Placed, paints: dict, outline: float = OUTLINE
) -> None:
    """Draw the polygons of a layer as one silhouette: all outlines (`outline` pixels wide) first, then all fills."""
    draw = ImageDraw.Draw(image)
    polygons = [to_canvas(points) for points in layer.polygons]
    width = round(2 * outline * SCALE)
    stroke = 0 if layer.stroke is None else round(layer.stroke * to_canvas.scale)
    if outline and layer.outlined:
        for points in polygons:
            draw.line([*points, points[0], points[1]], fill=paints["dark"], width=width + stroke, joint="curve")
    for points in polygons:
        if stroke:
            draw.line([*points, points[0], points[1]], fill=paints[layer.paint], width=stroke, joint="curve")
        else:
            draw.polygon(points, fill=paints[layer.paint])


def abstract(rng: random.Random) -> Image.Image:
    """An uncaptioned picture for the autoencoder alone: random parts, checks, bands and eyes in random colours.

    It keeps unseen subjects, whose parts the world's kinds lack, within what the autoencoder can reconstruct.
    """
    image = scenery.paint(rng.choice(tuple(BACKGROUNDS)), rng)
    if rng.random() < 0.2:
        image.paste(_random_colour(rng), (0, 0, CANVAS, CANVAS))
    for _ in range(rng.randint(1, 5)):
        polygon = _random_part(rng)
        mask = Image.new("L", (CANVAS, CANVAS))
        ImageDraw.Draw(mask).polygon(polygon, fill=255)
        if rng.random() < 0.7:
            width = round(rng.uniform(1.5, 3) * SCALE)
            ImageDraw.Draw(image).line([*polygon, *polygon[:2]], _random_colour(rng), width, joint="curve")
        image.paste(_random_fill(rng), (0, 0), mask)
    for _ in range(rng.randint(0, 3)):
        _random_eye(ImageDraw.Draw(image), rng)
    return image.reduce(SCALE)


def _random_eye(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    x, y, radius = (rng.uniform(low, high) * SCALE for low, high in ((15, 49), (15, 49), (3, 9)))
    for share, colour in ((1.15, (20, 20, 25)), (1.0, (250, 250, 250)), (rng.uniform(0.35, 0.65), (15, 15, 20))):
        r = radius * share
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _random_colour(rng: random.Random) -> RGB:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _random_part(rng: random.Random) -> list[tuple[float, float]]:
    """An ellipse or a star-shaped polygon of 3 to 9 corners (three make a horn), in canvas pixels."""
    x, y = rng.uniform(12, 52) * SCALE, rng.uniform(12, 52) * SCALE
    reach = rng.uniform(4, 26) * SCALE
    if rng.random() < 0.4:
        return Placed((x / SCALE, y / SCALE), reach / SCALE)(disc(rx=1.0, ry=rng.uniform(0.4, 1.0)))
    corners = rng.randint(3, 9)
    angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(corners))
    lengths = [reach * rng.uniform(0.4, 1.0) for _ in range(corners)]
    return [(x + d * math.cos(a), y + d * math.sin(a)) for a, d in zip(angles, lengths, strict=True)]


def _random_fill(rng: random.Random) -> Image.Image:
    """One colour, or two in checks, bands, stripes or dots."""
    first, second = _random_colour(rng), _random_colour(rng)
    fill = Image.new("RGB", (CANVAS, CANVAS), first)
    style = rng.choice((0, 1, 2, 2, 3))
    if style == 1:
        fill.paste(second, (0, 0), pattern_texture(rng.choice(PATTERNS[1:]), second, rng))
    elif style > 1:
        fill.paste(second, (0, 0), checks(rng.uniform(5.5, 11), rng.uniform(-15, 15), bands=style == 3))
    return fill


def checks(cell: float, angle: float = 0.0, bands: bool = False) -> Image.Image:
    """A CANVAS-sized mask of checks (or bands) of `cell` pixels of the finished picture, turned by `angle` degrees."""
    step = round(cell * SCALE)
    cells = CANVAS * 3 // 2 // step + 2
    small = Image.new("L", (cells, cells))
    small.putdata([255 * ((i + (0 if bands else j)) % 2) for j in range(cells) for i in range(cells)])
    big = small.resize((cells * step, cells * step), Image.Resampling.NEAREST)
    if angle:
        big = big.rotate(angle)
    start = (big.width - CANVAS) // 2
    return big.crop((start, start, start + CANVAS, start + CANVAS))
