"""What ``gpu_speed.py`` measures: models and settings, the programs and their command lines, what is wanted of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _children import diffusers_script, has_package

HERE = Path(__file__).parent
OURS, COMPILED, CAPPED, DIFFUSERS, PLAIN, BARE = "ours", "compile", "capped", "diffusers", "diffusers-plain", "bare"
PROGRAMS = {
    OURS: "dreamlora dreambooth",
    COMPILED: "the same with --compile",
    CAPPED: "the same, with no more memory than the card that it should fit on leaves",
    DIFFUSERS: "diffusers' script with the flag that makes it fastest, where it has one",
    PLAIN: "diffusers' script without that flag",
    BARE: "forward, backward and fused AdamW of the LoRA model of diffusers and PEFT, on tensors in memory",
}
ESTIMATE = "estimate"
"""Beside the programs in a result: the peak that dreamlora expects, of the same command."""
CONTEXT_GIB = 0.75
"""Of a card's memory, for the driver and CUDA: what torch does not count."""


@dataclass(frozen=True)
class Case:
    """One training; all in bf16.

    Attributes:
        model: a folder of ``_random_pipelines``.
        warm_up, timed: steps.
        offload: blocks of the denoiser that wait in host memory.
        card_gib: the training should fit on a card of so much.
        bare: the case whose bare step is the limit; None: its own.
        beside: diffusers' script can do this too.
    """

    model: str
    resolution: int
    batch: int
    rank: int
    warm_up: int
    timed: int
    checkpointing: bool = True
    base_precision: str | None = None
    offload: int = 0
    card_gib: float | None = None
    bare: str | None = None
    beside: bool = True

    @property
    def steps(self) -> int:
        """All."""
        return self.warm_up + self.timed

    def tiny(self) -> Case:
        """As small as it can be."""
        return replace(
            self, resolution=64, batch=min(2, self.batch), rank=4, warm_up=2, timed=3, offload=min(1, self.offload)
        )


_FLUX = Case("flux", 512, 1, 16, 5, 15, beside=False)
_NF4 = replace(_FLUX, base_precision="nf4", card_gib=12)
CASES: dict[str, Case] = {
    "sdxl1": Case("sdxl", 1024, 1, 16, 8, 24, card_gib=8),
    "klein": Case("klein", 512, 2, 32, 6, 20),
    "sdxl4": Case("sdxl", 1024, 4, 16, 4, 12),
    "flux-nf4": _NF4,
    "flux-nf4-offload": replace(_NF4, offload=30, card_gib=8, bare="flux-nf4"),
    "flux-fp8-offload": replace(_FLUX, base_precision="fp8", offload=40, card_gib=8, bare="flux-fp8"),
    "flux": replace(_FLUX, beside=True),
    "flux-fp8": replace(_FLUX, base_precision="fp8"),
    "flux-offload": replace(_FLUX, offload=40, card_gib=12, bare="flux"),
    "sd15": Case("sd15", 512, 4, 16, 8, 40, checkpointing=False),
}
"""The most telling ones first, for the case that time runs out."""
SCRIPTS = {
    "sd15": ("train_dreambooth_lora.py", ["--pre_compute_text_embeddings"]),
    "sdxl": ("train_dreambooth_lora_sdxl.py", []),
    "flux": ("train_dreambooth_lora_flux.py", ["--cache_latents", "--guidance_scale", "1"]),
    "klein": ("train_dreambooth_lora_flux2_klein.py", ["--cache_latents", "--skip_final_inference"]),
}
"""diffusers' script for a model, and what it is given besides when it is to be at its fastest."""
OWN_FLAGS = {"klein": ["--text_encoder_out_layers", "0", "1", "1"]}
"""For both programs: the text encoder has one layer."""


@dataclass(frozen=True)
class Places:
    """Folders.

    Attributes:
        models: with the folders of ``_random_pipelines``.
        images: to train on.
        scratch: for what the programs write.
        examples: diffusers' examples/dreambooth, if it is at hand.
    """

    models: Path
    images: Path
    scratch: Path
    examples: Path | None


def is_written(folder: Path) -> bool:
    """Whether a whole model of ``_random_pipelines`` lies there: the index is written last."""
    return (folder / "model_index.json").exists()


def programs_of(case: Case, asked: list[str], examples: Path | None, device: str) -> list[str]:
    """Those that are asked for and can be had in this case."""
    quantized = case.base_precision == "nf4"
    has_form = not quantized or has_package("bitsandbytes")
    theirs = case.beside and examples is not None
    told = {
        OURS: has_form,
        COMPILED: has_form and not case.offload,  # compiled code knows no weights that move
        CAPPED: has_form and case.card_gib is not None,
        DIFFUSERS: theirs,
        PLAIN: theirs and bool(SCRIPTS[case.model][1]),
        BARE: has_form and case.bare is None and not (quantized and device == "cpu"),  # diffusers wants a GPU for it
    }
    return [program for program in asked if told[program]]


def command(case: Case, program: str, places: Places, device: str) -> list[str]:
    """What python is to run."""
    model = str(places.models / case.model)
    if program == BARE:
        own = ["--steps", str(case.steps), "--batch", str(case.batch), "--device", device]
        return [str(HERE / "_bare_step.py"), model, *own, *_form(case)]
    common = [
        *("--pretrained_model_name_or_path", model, "--instance_data_dir", str(places.images), "--seed", "0"),
        *("--instance_prompt", "a photo of sks creature", "--learning_rate", "1e-4"),
        *("--train_batch_size", str(case.batch), "--max_train_steps", str(case.steps)),
        *("--output_dir", str(places.scratch / "output"), *OWN_FLAGS.get(case.model, []), *_form(case)),
    ]
    if program in (DIFFUSERS, PLAIN):
        assert places.examples is not None
        script, fastest = SCRIPTS[case.model]
        own = ["--checkpointing_steps", "1000000", *(fastest if program == DIFFUSERS else [])]
        return [*diffusers_script(places.examples / script), *common, *own]
    own = [
        *("--sample_steps", "0", "--eval_steps", "0", "--checkpointing_steps", "0", "--holdout", "0"),
        *("--no_parity_check", "--optimizer", "adamw", "--latents_cache_dir", str(places.scratch / "cache")),
        *(["--offload_blocks", str(case.offload)] if case.offload else []),
        *(["--compile"] if program == COMPILED else []),
    ]
    return ["-m", "dreamlora", "dreambooth", *common, *own]


def _form(case: Case) -> list[str]:
    """The flags that all programs have; diffusers' scripts are only asked for the precision that they know."""
    return [
        *("--resolution", str(case.resolution), "--rank", str(case.rank), "--mixed_precision", "bf16"),
        *(["--gradient_checkpointing"] if case.checkpointing else []),
        *(["--base_precision", case.base_precision] if case.base_precision else []),
    ]


FASTER, SMALLER, LIMIT, ESTIMATE_ERROR = 1.3, 0.8, 0.95, 0.15
COMPARED = ("sdxl1", "sdxl4", "klein")
"""Where this program is to be faster and smaller than diffusers' script."""

Measured = dict[str, Any]
"""Figures of one run, or why there are none (``failed``)."""
Found = dict[str, dict[str, Measured]]
"""By case and program."""


def ratios(found: Found) -> dict[str, dict[str, float]]:
    """By case: this program's steps per second, peak memory and wall time divided by the others'."""
    every = {}
    for name, case in CASES.items():
        ours = _whole(found, name, OURS)
        if ours is None:
            continue
        one: dict[str, float] = {}
        if bare := _whole(found, case.bare or name, BARE):
            one["steps / bare"] = ours["steps_per_s"] / bare["steps_per_s"]
        for program in (DIFFUSERS, PLAIN):
            if other := _whole(found, name, program):
                one |= {
                    f"steps / {program}": ours["steps_per_s"] / other["steps_per_s"],
                    f"peak / {program}": peak(ours) / peak(other),
                    f"wall time / {program}": ours["wall_s"] / other["wall_s"],
                }
        if "allocated_gib" in (estimated := found[name].get(ESTIMATE, {})) and ours["allocated_gib"]:
            one["peak as estimated / measured"] = estimated["allocated_gib"] / ours["allocated_gib"]
        for program in (COMPILED, CAPPED):
            if other := _whole(found, name, program):
                one[f"steps of {program} / ours"] = other["steps_per_s"] / ours["steps_per_s"]
        every[name] = {what: round(value, 3) for what, value in one.items()}
    return every


def peak(measured: Measured) -> float:
    """GiB: what torch took of the GPU, on a CPU what the process took."""
    gpu = measured["allocated_gib"]
    return float(measured["host_gib"] if gpu is None else gpu)


def _whole(found: Found, case: str, program: str) -> Measured | None:
    measured = found.get(case, {}).get(program)
    return None if measured is None or "failed" in measured else measured


@dataclass(frozen=True)
class Target:
    """What is wanted, found and whether that is met."""

    case: str
    what: str
    wanted: str
    found: float
    met: bool


def targets(found: Found) -> Iterator[Target]:
    """Those that can be judged by what was measured."""
    for name, one in ratios(found).items():
        if "steps / bare" in one:
            yield _least(name, "steps / bare", one, LIMIT)
        if name in COMPARED and f"steps / {DIFFUSERS}" in one:
            yield _least(name, f"steps / {DIFFUSERS}", one, FASTER)
            ratio = one[f"peak / {DIFFUSERS}"]
            yield Target(name, f"peak / {DIFFUSERS}", f"<= {SMALLER}", ratio, ratio <= SMALLER)
        if ratio := one.get("peak as estimated / measured"):
            bounds = f"{1 - ESTIMATE_ERROR} to {1 + ESTIMATE_ERROR}"
            yield Target(name, "peak as estimated / measured", bounds, ratio, abs(ratio - 1) <= ESTIMATE_ERROR)
        ours, card = found[name][OURS], CASES[name].card_gib
        if card is not None and ours["allocated_gib"] is not None:
            room = card - CONTEXT_GIB
            yield Target(name, "peak GiB", f"<= {room} ({card:g} GB card)", peak(ours), peak(ours) <= room)


def _least(name: str, what: str, one: dict[str, float], bound: float) -> Target:
    return Target(name, what, f">= {bound}", one[what], one[what] >= bound)
