"""Fréchet distance: what people ask for. Below thousands of images it is precise and wrong, so it selects nothing."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._vectors import exact, need, of_subject

if TYPE_CHECKING:
    from torch import Tensor

NAME = "img/fd"
ABOUT = "FID, the Fréchet distance. Far too large on few images: it selects nothing"
ENCODER: EncoderRole = "features"
NEEDS: frozenset[Need] = frozenset({"references"})
HIGHER_IS_BETTER = False
SELECTS = False
COMPARES_SETS = True

ENOUGH = 2000


def frechet(first: Tensor, second: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians fitted to the rows (Heusel et al. 2017,
    arXiv 1706.08500): ``|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)``, in float64.

    With centred rows X and Y, ``tr((Σ₁ Σ₂)^½)`` is the nuclear norm of ``X Yᵀ / sqrt((n - 1)(m - 1))``: no matrix root,
    and exact for fewer images than dimensions. Where there are more, their triangular QR factors stand in for X and Y.

    Args:
        first: ``[n, d]``.
        second: ``[m, d]``.

    Raises:
        ValueError: fewer than two images on a side, or a value that is not finite.

    Warns:
        UserWarning: fewer images than dimensions, or than 2,000: the value is too large, and prefers copies.
    """
    import torch

    n, m = len(first), len(second)
    need("fd", 2, n, m)
    fewest, dim = min(n, m), first.shape[1]
    if fewest < dim:
        warnings.warn(f"fd of {n} and {m} images in {dim} dimensions is rank-deficient: biased upward", stacklevel=2)
    elif fewest < ENOUGH:
        warnings.warn(f"fd of {n} and {m} images is biased upward: {ENOUGH:,} on each side are needed", stacklevel=2)
    x, y = exact(first), exact(second)
    apart = (x.mean(0) - y.mean(0)).square().sum()
    x, y = _centred(x), _centred(y)
    shared = torch.linalg.matrix_norm(x @ y.T, ord="nuc")
    return float((apart + x.square().sum() + y.square().sum() - 2 * shared).clamp_min(0))


def _centred(rows: Tensor) -> Tensor:
    """A matrix F with ``Fᵀ F`` the covariance of the rows, with as few rows as possible."""
    import torch

    scaled = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    return torch.linalg.qr(scaled, mode="r").R if len(rows) > rows.shape[1] else scaled


def compute(inputs: MetricInputs) -> Reading:
    """Of the images whose prompts name the subject."""
    assert inputs.references is not None
    images = of_subject(inputs)
    return Reading(frechet(images, inputs.references), len(images), len(inputs.references))
