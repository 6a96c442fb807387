"""The kinds of things in the world, as layers of polygons in unit coordinates (x right, y down, radius 1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dreamlora.tiny.scenery import SCALE

Point = tuple[float, float]
Polygon = tuple[Point, ...]


@dataclass(frozen=True)
class PaintLayer:
    """Polygons that share a paint and, if `outlined`, one outline around their union.

    With `stroke` (unit length) each polygon is a closed line of that width instead of a filled area.
    """

    paint: str
    polygons: tuple[Polygon, ...]
    outlined: bool = True
    stroke: float | None = None


class Placed:
    """Map unit coordinates to canvas pixels: scale by `radius`, turn by `tilt` degrees, move to `centre`."""

    def __init__(self, centre: Point, radius: float, tilt: float = 0.0) -> None:
        self.scale = radius * SCALE
        self._cos, self._sin = (f(math.radians(tilt)) * self.scale for f in (math.cos, math.sin))
        self._x, self._y = centre[0] * SCALE, centre[1] * SCALE

    def __call__(self, points: Sequence[Point]) -> list[Point]:
        return [(self._x + self._cos * x - self._sin * y, self._y + self._sin * x + self._cos * y) for x, y in points]


def curve(point_at: Callable[[float], Point], steps: int = 28) -> Polygon:
    """`point_at` sampled at `steps` angles from 0 to 2 pi."""
    return tuple(point_at(2 * math.pi * i / steps) for i in range(steps))


def disc(x: float = 0.0, y: float = 0.0, rx: float = 1.0, ry: float | None = None) -> Polygon:
    """An ellipse around (x, y)."""
    height = rx if ry is None else ry
    return curve(lambda a: (x + rx * math.cos(a), y + height * math.sin(a)))


def box(left: float, top: float, right: float, bottom: float) -> Polygon:
    """An upright rectangle."""
    return (left, top), (right, top), (right, bottom), (left, bottom)


def star(points: int, inner: float) -> Polygon:
    """A star with one point up; `inner` is the radius of its notches."""
    angles = [(-0.5 + i / points) * math.pi for i in range(2 * points)]
    return tuple(
        (math.cos(a) * (1 if i % 2 == 0 else inner), math.sin(a) * (1 if i % 2 == 0 else inner))
        for i, a in enumerate(angles)
    )


def crescent() -> Polygon:
    """A moon open to the right: the unit circle less a circle of radius 0.8 around (0.5, 0)."""
    edge = math.radians(49)  # where the two circles meet, seen from the centre of the large one
    outer = [edge + (2 * math.pi - 2 * edge) * i / 30 for i in range(31)]
    tip = (math.cos(edge), math.sin(edge))
    inner_edge = math.atan2(-tip[1], tip[0] - 0.45)
    start = 2 * math.pi + inner_edge  # the upper tip, seen from the small circle's centre
    radius = math.hypot(tip[0] - 0.45, tip[1])
    inner = [start + (math.atan2(tip[1], tip[0] - 0.45) - start) * i / 20 for i in range(1, 20)]
    return tuple((math.cos(a), math.sin(a)) for a in outer) + tuple(
        (0.45 + radius * math.cos(a), radius * math.sin(a)) for a in inner
    )


def _heart(a: float) -> Point:
    """The classic heart curve, scaled to the unit circle."""
    x = 16 * math.sin(a) ** 3
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return x / 16.5, -y / 16.5 - 0.1


def _petals(count: int = 6) -> tuple[Polygon, ...]:
    angles = [2 * math.pi * i / count for i in range(count)]
    return tuple(disc(0.48 * math.cos(a), -0.28 + 0.48 * math.sin(a), 0.29) for a in angles)


def _eye(x: float, y: float, radius: float) -> tuple[PaintLayer, PaintLayer]:
    return (
        PaintLayer("white", (disc(x, y, radius),), outlined=False),
        PaintLayer("ink", (disc(x, y, radius * 0.55),), outlined=False),
    )


CREATURE = (
    PaintLayer("dark", (box(-0.5, 0.6, -0.18, 1.0), box(0.18, 0.6, 0.5, 1.0)), outlined=False),
    PaintLayer("body", (disc(0, 0.1, 0.82, 0.72), disc(-0.55, -0.62, 0.28, 0.38), disc(0.55, -0.62, 0.28, 0.38))),
    *_eye(-0.3, -0.08, 0.23),
    *_eye(0.3, -0.08, 0.23),
    PaintLayer("ink", (((-0.28, 0.36), (0.28, 0.36), (0.0, 0.58)),), outlined=False),
)

FISH = (
    PaintLayer("body", (disc(-0.2, 0, 0.78, 0.56), ((0.35, 0), (1.0, -0.62), (0.86, 0), (1.0, 0.62)))),
    PaintLayer("dark", (((-0.1, 0.12), (0.28, 0.0), (0.28, 0.34)),), outlined=False),
    *_eye(-0.58, -0.14, 0.19),
)

HOUSE = (
    PaintLayer("body", (box(-0.72, -0.15, 0.72, 0.92),)),
    PaintLayer("dark", (((-1.0, -0.12), (0, -0.98), (1.0, -0.12)),)),
    PaintLayer("ink", (box(-0.5, 0.3, -0.08, 0.92),), outlined=False),
    PaintLayer("glow", (box(0.14, 0.14, 0.52, 0.52),), outlined=False),
)

KINDS: dict[str, tuple[PaintLayer, ...]] = {
    "circle": (PaintLayer("body", (disc(rx=0.92),)),),
    "square": (PaintLayer("body", (box(-0.82, -0.82, 0.82, 0.82),)),),
    "triangle": (PaintLayer("body", (((0, -0.95), (0.98, 0.8), (-0.98, 0.8)),)),),
    "star": (PaintLayer("body", (star(5, 0.45),)),),
    "heart": (PaintLayer("body", (curve(_heart, 40),)),),
    "ring": (PaintLayer("body", (disc(rx=0.7),), stroke=0.46),),
    "moon": (PaintLayer("body", (crescent(),)),),
    "creature": CREATURE,
    "flower": (
        PaintLayer("leaf", (box(-0.09, 0.1, 0.09, 1.0), ((0.05, 0.85), (0.55, 0.5), (0.5, 0.82))), outlined=False),
        PaintLayer("body", _petals()),
        PaintLayer("glow", (disc(0, -0.28, 0.25),), outlined=False),
    ),
    "house": HOUSE,
    "fish": FISH,
    "tree": (
        PaintLayer("wood", (box(-0.17, 0.4, 0.17, 1.0),), outlined=False),
        PaintLayer(
            "body",
            (
                ((0, -1.0), (0.5, -0.4), (-0.5, -0.4)),
                ((0, -0.75), (0.66, 0.05), (-0.66, 0.05)),
                ((0, -0.4), (0.82, 0.58), (-0.82, 0.58)),
            ),
        ),
    ),
}
