"""What the metrics share: cosines in float64, and checks of what comes in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamlora.interfaces import MetricInputs

if TYPE_CHECKING:
    from torch import Tensor


def exact(vectors: Tensor) -> Tensor:
    """``[n, d]`` in float64 on the CPU.

    Raises:
        ValueError: a value is not finite.
    """
    rows = vectors.detach().cpu().double()
    wrong = ~rows.isfinite().all(1)
    if wrong.any():
        raise ValueError(f"the embedding in row {int(wrong.nonzero()[0])} is not finite")
    return rows


def unit(vectors: Tensor) -> Tensor:
    """Rows of length 1, ``[n, d]`` float64 on the CPU.

    Raises:
        ValueError: a row is zero or not finite, so it has no direction.
    """
    rows = vectors.cpu().double()
    lengths = rows.norm(dim=1, keepdim=True)
    wrong = ~(lengths.isfinite() & (lengths > 0)).flatten()
    if wrong.any():
        raise ValueError(f"the embedding in row {int(wrong.nonzero()[0])} is zero or not finite")
    return rows / lengths


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of every row of ``first`` with every row of ``second``, ``[n, m]`` float64 in [-1, 1]."""
    return (unit(first) @ unit(second).T).clamp(-1, 1)


def paired_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of row i with row i, ``[n]`` float64 in [-1, 1].

    Raises:
        ValueError: the two differ in shape.
    """
    if first.shape != second.shape:
        raise ValueError(f"rows must pair up: got {tuple(first.shape)} and {tuple(second.shape)}")
    return (unit(first) * unit(second)).sum(1).clamp(-1, 1)


def of_subject(inputs: MetricInputs) -> Tensor:
    """The generated images whose prompts name the subject, ``[k, d]``.

    Raises:
        ValueError: there are none.
    """
    if not inputs.with_subject.any():
        raise ValueError("no image has a prompt that names the subject")
    return inputs.generated[inputs.with_subject]


def need(name: str, least: int, *counts: int) -> None:
    """Refuse sets that are too small.

    Raises:
        ValueError: one of ``counts`` is below ``least``.
    """
    if min(counts) < least:
        plural = "image" if least == 1 else "images"
        sides = " on each side" if len(counts) > 1 else ""
        got = " and ".join(map(str, counts))
        raise ValueError(f"{name} needs at least {least} {plural}{sides} (got {got})")
