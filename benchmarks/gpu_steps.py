"""A training step alone, in every form that this program can hold a model in: time and peak memory, in one process.

    python benchmarks/gpu_steps.py
    python benchmarks/gpu_steps.py --cases flux-nf4 flux-nf4-offload --minutes 2
    python benchmarks/gpu_steps.py --tiny --device cpu             # tries the program where there is no GPU

Where ``gpu_speed.py`` times whole commands, this makes the steps of many forms in a few minutes: each real architecture
is drawn once, and its forms (fp8, int8, nf4, blocks that wait in host memory, compiled) are made of copies of it.
"ours" is this program's LoRA layer and checkpointing, "bare" diffusers' and PEFT's. The loss of the first steps is
written too: with blocks that wait it must be that of the same form without.

What is not begun within --minutes is left out. Every figure is written at once, to results/gpu_steps_<card>.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _bare_step
import _cli
import _machine
import torch
from _inputs import inputs_of
from _random_pipelines import PIPELINES, Maker
from torch.nn import functional as F

from dreamlora import registry
from dreamlora.config import Lora
from dreamlora.lora.inject import add_lora
from dreamlora.models.checkpointing import enable_checkpointing
from dreamlora.models.compiling import compile_blocks
from dreamlora.models.kernels import avoid_cudnn_attention
from dreamlora.models.offload import Offload, waiting_blocks
from dreamlora.precision import quantize

TOKENS = {"sd15": 77, "sdxl": 77, "klein": 512, "flux": 512}
GIB = 2**30
LOSSES = 3
"""Of the first steps, that are written."""


@dataclass(frozen=True)
class Form:
    """A model, and how it is held and computed; in bf16.

    Attributes:
        model: of ``_random_pipelines``.
        beside: the form that times are compared with.
    """

    model: str
    resolution: int
    batch: int
    rank: int = 16
    checkpointing: bool = True
    base: str | None = None
    offload: int = 0
    compiled: bool = False
    bare: bool = False
    beside: str | None = None


_FLUX = Form("flux", 512, 1, beside="flux")
_KLEIN = Form("klein", 512, 2, 32, beside="klein-bare")
_SDXL = Form("sdxl", 1024, 1, beside="sdxl1-bare")
FORMS: dict[str, Form] = {
    "flux-nf4": replace(_FLUX, base="nf4"),
    "flux-nf4-offload30": replace(_FLUX, base="nf4", offload=30, beside="flux-nf4"),
    "flux-fp8-offload40": replace(_FLUX, base="fp8", offload=40, beside="flux-fp8"),
    "flux-fp8": replace(_FLUX, base="fp8"),
    "flux-int8": replace(_FLUX, base="int8"),
    "flux": replace(_FLUX, beside=None),
    "flux-offload40": replace(_FLUX, offload=40),
    "flux-bare": replace(_FLUX, bare=True),
    "klein": _KLEIN,
    "klein-bare": replace(_KLEIN, bare=True, beside=None),
    "klein-compile": replace(_KLEIN, compiled=True, beside="klein"),
    "sdxl1": _SDXL,
    "sdxl1-bare": replace(_SDXL, bare=True, beside=None),
    "sdxl4": replace(_SDXL, batch=4, beside="sdxl4-bare"),
    "sdxl4-bare": replace(_SDXL, batch=4, bare=True, beside=None),
    "sd15": Form("sd15", 512, 4, checkpointing=False, beside="sd15-bare"),
    "sd15-bare": Form("sd15", 512, 4, checkpointing=False, bare=True),
    "sdxl1-compile": replace(_SDXL, compiled=True, beside="sdxl1"),
}
"""The most telling ones first, for the case that time runs out; those of one model side by side."""
LAYERS = {"sd15": "sd", "sdxl": "sdxl", "klein": "flux2", "flux": "flux"}
"""Families whose own layers get the LoRA; the same as those of diffusers' scripts (``_bare_step.LORA_LAYERS``)."""


class Models:
    """Real architectures with random weights, one at a time."""

    def __init__(self, device: str, tiny: bool) -> None:
        self._maker, self._name, self._model = Maker(device, tiny), "", None

    def get(self, name: str) -> Any:
        """The denoiser, frozen; not to be changed."""
        if name != self._name:
            self._model = None
            gc.collect()
            pipeline = PIPELINES[name](self._maker)
            self._name, self._model = name, getattr(pipeline, "unet", None) or pipeline.transformer
            del pipeline
        return self._model


def measure(form: Form, models: Models, device: str, steps: int) -> dict[str, Any]:
    """Milliseconds of a step, peak memory in GiB (None on a CPU) with the model, and the first losses."""
    master = models.get(form.model)
    _forget(device)
    others = torch.cuda.memory_allocated() if device == "cuda" else 0
    began = time.perf_counter()
    denoiser = _bare(form, master) if form.bare else _ours(form, master, torch.device(device))
    optimizer = torch.optim.AdamW([p for p in denoiser.parameters() if p.requires_grad], lr=1e-4, fused=True)
    torch.manual_seed(0)
    batches = [inputs_of(denoiser, form.batch, form.resolution // 8, TOKENS[form.model]) for _ in range(2)]
    prepared_s = time.perf_counter() - began
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for inputs, target in (batches[step % 2] for step in range(steps)):
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            prediction = denoiser(**inputs, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU, as programs do that show the loss
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    peak = (torch.cuda.max_memory_allocated() - others) / GIB if device == "cuda" else None
    return {
        "median_ms": round(statistics.median(times[steps // 3 :]), 1),
        "first_ms": round(times[0]),
        "prepared_s": round(prepared_s, 1),
        "peak_gib": None if peak is None else round(peak, 3),
        "losses": losses[:LOSSES],
    }


def _ours(form: Form, master: Any, device: torch.device) -> Any:
    denoiser = copy.deepcopy(master)
    waiting = waiting_blocks(denoiser, form.offload)
    if form.base:
        quantize(denoiser, form.base, device, waiting)
    if waiting:
        Offload(waiting, device)
    torch.manual_seed(1)
    add_lora(denoiser, Lora(rank=form.rank), registry.load("families", LAYERS[form.model]).LORA_LAYERS)
    if form.checkpointing:
        enable_checkpointing(denoiser)
    if form.compiled:
        compile_blocks(denoiser, 1)
    return denoiser.train()


def _bare(form: Form, master: Any) -> Any:
    denoiser = copy.deepcopy(master)
    torch.manual_seed(1)
    _bare_step.add_lora(denoiser, form.rank)
    if form.checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser.train()


def _forget(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def compared(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every form with its speed beside another's, and whether its losses are the same to the last bit."""
    for name, one in found.items():
        other = found.get(FORMS[name].beside or "", {})
        if "median_ms" not in one or "median_ms" not in other:
            continue
        facts: dict[str, Any] = {"beside": FORMS[name].beside, "speed": round(other["median_ms"] / one["median_ms"], 3)}
        if FORMS[name].offload:
            facts["same_losses"] = one["losses"] == other["losses"]
        yield name, facts


def main() -> None:
    """Parse the flags, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models: whether the program works")
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of the file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --tiny tries the program without one")
    end = time.monotonic() + 60 * options.minutes
    avoid_cudnn_attention()  # as every run does
    models, found = Models(options.device, options.tiny), {}
    name = _machine.file_name("gpu_steps", _machine.card(options.device)["name"])
    for case in options.cases:
        if time.monotonic() > end:
            print(f"{case:20s} left out: no time was left", flush=True)
            continue
        form = FORMS[case]
        if options.tiny:
            form = replace(form, resolution=64, rank=4, offload=min(1, form.offload))
        try:
            found[case] = measure(form, models, options.device, options.steps)
        except Exception as error:  # what the others have measured is written all the same
            found[case] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        print(f"{case:20s} {json.dumps(found[case])}", flush=True)
        result = {
            "command": _machine.command("gpu_steps.py"),
            "card": _machine.card(options.device),
            "forms": found,
            "compared": dict(compared(found)),
            "machine": _machine.describe(torch.get_num_threads()),
        }
        _machine.write(name, result, options.results)
    for case, facts in compared(found):
        print(f"{case:20s} {facts}")


if __name__ == "__main__":
    _cli.start(main)
