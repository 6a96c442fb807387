"""Every random draw is a pure function of (seed, purpose, position): nothing has to be saved or kept in step.

Training noise, times, order and crops are drawn per *sample position* in the run, not per process or per call. So a
resumed run draws what the uninterrupted one draws, one process with batch 4 draws what two with batch 2 draw, and
evaluating or sampling cannot disturb training, because no stream is shared.
"""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator for ``key``, e.g. ``generator(seed, "noise", position)``.

    CPU, whatever the device that trains: the same numbers then come out on every machine.
    """
    return torch.Generator("cpu").manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """The seed that ``generator`` gives for ``key``, below 2^63."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def permutation(length: int, *key: int | str) -> list[int]:
    """A random order of ``range(length)``."""
    return torch.randperm(length, generator=generator(*key)).tolist()
