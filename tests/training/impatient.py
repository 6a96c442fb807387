"""The training program whose collectives wait for a few seconds only, while one process takes longer in many places.

What takes long is what one process does alone: the main one claims the folder, draws the grid, keeps the best
checkpoint and compares the saved file; the other one loads its model.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import nn
from torch.distributed import distributed_c10d

from dreamlora.__main__ import main
from dreamlora.callbacks import sample
from dreamlora.callbacks.best import BestCallback
from dreamlora.models.parts import Parts
from dreamlora.run import opening
from dreamlora.runfolder import RunFolder
from dreamlora.training import parity

LIMIT = 3.0
"""Seconds that a collective waits."""
NAP = 4.5
"""Seconds that a process takes alone."""


def slow(owner: Any, name: str, rank: int, when: Callable[..., bool] = lambda *_: True) -> None:
    """Make one process take long the first time it calls this, if the arguments are those that count."""
    original, taken = getattr(owner, name), []

    @functools.wraps(original)
    def wrapper(*args: Any, **options: Any) -> Any:
        if not taken and int(os.environ["RANK"]) == rank and when(*args):
            taken.append(True)
            time.sleep(NAP)
            sys.stdout.write(f"process {rank} took long in {name}\n")
        return original(*args, **options)

    setattr(owner, name, wrapper)


def only_the_base_is_left(parts: Parts) -> bool:
    """Whether this process holds no parameter but the denoiser's own, which DDP and accelerate might."""
    own = set(map(id, parts.get("denoiser")[parts.family.DENOISER].parameters()))
    return not any(isinstance(item, nn.Parameter) and id(item) not in own for item in gc.get_objects())


def impatient(make: Callable[..., Any]) -> Callable[..., Any]:
    """The accelerator with the limit on all collectives that come after its start."""

    def wrapper(*args: Any) -> Any:
        accelerator = make(*args)
        distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT))
        return accelerator

    return wrapper


if __name__ == "__main__":
    opening.accelerator_of = impatient(opening.accelerator_of)
    slow(RunFolder, "lock", rank=0)
    slow(Parts, "get", rank=1, when=lambda _, role: role == "denoiser")
    slow(sample, "grid_of_run", rank=0)
    slow(BestCallback, "on_step", rank=0, when=lambda _, run, result: result.step == 1)
    slow(parity, "check", rank=0, when=lambda parts, _: only_the_base_is_left(parts))
    sys.exit(main(["dreambooth", *sys.argv[1:]]))
