"""How far the Fréchet distance of two samples of one distribution is from its true value, which is 0.

    python benchmarks/frechet_bias.py

Features are drawn from a Gaussian whose covariance has the spectrum 1/i, about that of real encoders; values are in
units of the variance (the sum of the spectrum), medians over --repeats. Beside the true generator stands one that lost
half of the variance in every direction, whose true distance is 1 + ½ - 2√½ = 0.086: where the true one measures worse,
the metric ranks the wrong one first.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import Any

import _cli
import _machine
import torch

from dreamlora.metrics.fid import frechet

IMAGES = (10, 50, 200, 1000, 5000)
DIMENSIONS = (64, 512, 2048)


def distances(images: int, dimensions: int, seed: int) -> tuple[float, float]:
    """Of a second sample of the same distribution, and of one with half the variance, to a first sample."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = 1 / torch.arange(1, dimensions + 1, dtype=torch.float64)
    real, same, poor = (
        torch.randn(images, dimensions, generator=generator, dtype=torch.float64) * spectrum.sqrt() for _ in range(3)
    )
    variance = float(spectrum.sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return frechet(same, real) / variance, frechet(poor * 0.5**0.5, real) / variance


def measure(images: int, dimensions: int, repeats: int) -> dict[str, Any]:
    """Medians over the repeats."""
    same, poor = zip(*(distances(images, dimensions, seed) for seed in range(repeats)), strict=True)
    found = {"same": statistics.median(same), "half_the_variance": statistics.median(poor)}
    rounded = {name: round(value, 4) for name, value in found.items()}
    return {
        "images": images,
        "dimensions": dimensions,
        **rounded,
        "ranks_wrong": found["same"] > found["half_the_variance"],
    }


def main() -> None:
    """Parse the flags, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=_machine.usable_cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for images in IMAGES:
        for dimensions in DIMENSIONS:
            rows.append(measure(images, dimensions, options.repeats))
            print(rows[-1])
    found = {
        "command": _machine.command("frechet_bias.py"),
        "rows": rows,
        "machine": _machine.describe(options.threads),
    }
    print(f"wrote {_machine.write('frechet_bias', found)}")


if __name__ == "__main__":
    _cli.start(main)
