"""Backgrounds of the procedural world, drawn at SCALE times the finished size so that edges come out smooth."""

import random

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
SCALE = 3  # drawing scale
CANVAS = 64 * SCALE  # width and height while drawing, pixels

PLAIN: dict[str, RGB] = {
    "white": (243, 243, 243),
    "gray": (160, 163, 168),
    "black": (22, 22, 26),
    "blue": (70, 120, 235),
    "pink": (250, 175, 210),
    "yellow": (250, 232, 120),
}
# background -> how a caption words it
BACKGROUNDS: dict[str, str] = {name: f"on a {name} background" for name in PLAIN} | {
    "grass": "on grass",
    "beach": "on the beach",
    "snow": "in the snow",
    "night": "at night",
    "forest": "in the forest",
    "water": "in the water",
    "sunset": "at sunset",
    "bricks": "in front of a brick wall",
}
# background -> colours of things that would not stand out from it
LOOKS_LIKE: dict[str, tuple[str, ...]] = {name: (name,) for name in PLAIN} | {
    "grass": (),
    "beach": (),
    "snow": ("white",),
    "night": ("black",),
    "forest": (),
    "water": ("blue",),
    "sunset": (),
    "bricks": (),
}


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """`first` with `share` of `second`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def shifted(colour: RGB, shift: int) -> RGB:
    """`colour` made lighter or darker in all channels alike, which changes the shade and not the hue."""
    red, green, blue = (max(0, min(255, channel + shift)) for channel in colour)
    return red, green, blue


def paint(name: str, rng: random.Random) -> Image.Image:
    """A CANVAS x CANVAS RGB picture of the background called `name`."""
    if name in PLAIN:
        return Image.new("RGB", (CANVAS, CANVAS), shifted(PLAIN[name], rng.randint(-8, 8)))
    image = Image.new("RGB", (CANVAS, CANVAS))
    _SCENES[name](ImageDraw.Draw(image), rng)
    return image


def _bands(draw: ImageDraw.ImageDraw, *bands: tuple[float, RGB]) -> None:
    """Fill from top to bottom; each band starts at its height (pixels of the finished picture)."""
    for top, colour in bands:
        draw.rectangle((0, top * SCALE, CANVAS, CANVAS), fill=colour)


def _specks(
    draw: ImageDraw.ImageDraw, rng: random.Random, count: int, radius: float, colour: RGB, bottom: float = 64
) -> None:
    """Round specks anywhere above `bottom`; lengths in pixels of the finished picture."""
    size = radius * SCALE
    for _ in range(count):
        x, y = rng.uniform(0, CANVAS), rng.uniform(0, bottom * SCALE)
        draw.ellipse((x - size, y - size, x + size, y + size), fill=colour)


def _grass(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    horizon = rng.uniform(17, 24)
    _bands(draw, (0, (150, 205, 250)), (horizon, (105, 195, 75)))
    for _ in range(8):  # tufts
        x, y = rng.uniform(0, CANVAS), rng.uniform((horizon + 6) * SCALE, CANVAS)
        draw.polygon([(x - 5, y), (x, y - 13), (x + 5, y)], fill=(70, 160, 50))


def _beach(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    sea = rng.uniform(14, 19)
    _bands(draw, (0, (190, 228, 250)), (sea, (40, 145, 200)), (sea + rng.uniform(13, 16), (238, 212, 155)))


def _snow(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _bands(draw, (0, (150, 170, 198)), (rng.uniform(30, 38), (236, 241, 248)))
    _specks(draw, rng, 9, 1.6, (250, 252, 255), bottom=38)


def _night(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    ground = rng.uniform(46, 52)
    _bands(draw, (0, (22, 26, 78)), (ground, (14, 40, 42)))
    _specks(draw, rng, 10, 1.3, (250, 240, 190), bottom=ground - 3)


def _forest(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _bands(draw, (0, (38, 88, 48)), (rng.uniform(48, 53), (66, 58, 34)))
    x = rng.uniform(0, 6)
    while x < 64:
        draw.rectangle((x * SCALE, 0, (x + 4.5) * SCALE, 52 * SCALE), fill=(72, 48, 30))
        x += rng.uniform(11, 15)
    _specks(draw, rng, 9, 5.0, (48, 118, 56), bottom=9)


def _water(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _bands(draw, (0, (30, 105, 190)))
    for row in range(6, 66, 11):
        y, shift = row * SCALE, rng.uniform(0, 16) * SCALE
        points = [(x * 8 * SCALE - shift, y + (3 if x % 2 else -3) * SCALE / 2) for x in range(12)]
        draw.line(points, fill=(120, 190, 240), width=5, joint="curve")


def _sunset(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    top, bottom, ground = (95, 55, 130), (255, 150, 60), rng.uniform(48, 53)
    steps = 12
    _bands(draw, *((ground * i / steps, mix(top, bottom, i / (steps - 1))) for i in range(steps)))
    _bands(draw, (ground, (60, 35, 50)))


def _bricks(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _bands(draw, (0, (205, 190, 178)))
    shift, lift = rng.uniform(0, 16), rng.uniform(0, 8)
    for row in range(-1, 9):
        y = (row * 8 + lift) * SCALE
        for column in range(-1, 6):
            x = (column * 16 + (row % 2) * 8 - shift + 4) * SCALE
            draw.rectangle((x, y, x + 14.4 * SCALE, y + 6.4 * SCALE), fill=(168, 84, 66))


_SCENES = {
    "grass": _grass,
    "beach": _beach,
    "snow": _snow,
    "night": _night,
    "forest": _forest,
    "water": _water,
    "sunset": _sunset,
    "bricks": _bricks,
}
