"""``--vram``: the options with which a training fits into so much memory of a GPU, at the least cost of its quality.

The first row that fits is taken; each keeps what the ones before it have.

| | costs |
|---|---|
| nothing | |
| ``--gradient_checkpointing`` | a third of the speed; the same numbers |
| fewer images at a time, as much more often | speed; the same step, but for rounding |
| ``--base_precision int8`` | weights that are rounded to 1 part in 127 of a row's largest |
| ``--offload_blocks``: a quarter of them, a half, three quarters, all but two | speed, where a copy takes longer than |
| | the blocks in between; the same numbers |
| ``--base_precision nf4``, then offloading again | weights in 16 steps, an error more than ten times that of int8 |

int8 comes before offloading, as it halves what is copied then. fp8 is not among them: it takes as much as int8, and
rounds three times as far. The text encoders, which are there before the training alone, are chosen by themselves: as
they are, then in int8, then on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from dreamlora import precision
from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.errors import UserError
from dreamlora.figures import gibibytes
from dreamlora.memory import GIB
from dreamlora.models.offload import SLOTS
from dreamlora.processes import gather_lists
from dreamlora.run import unsaid_precision
from dreamlora.run.context import RunContext
from dreamlora.run.defaults import resumed_folder
from dreamlora.run.rehearsal import Rehearsal, Stage

Options = Mapping[str, Any]
"""Values by flag."""

DRIVER = int(0.6 * GIB)
"""What CUDA itself and the screen take of a GPU."""
MARGIN = 1.1
"""For gaps between tensors, workspaces of kernels, and what the estimate does not know."""
CARDS = (8, 10, 12, 16, 24)
"""Gigabytes of the GPUs that people own, for the table of ``dreamlora doctor``."""
PROMPT = "a photo of a dog on a beach in the evening sun, " * 4
"""Stands for the longest prompt where the captions are not known yet."""
SMALLER = ("int8", "nf4")
"""Weights in fewer bits, by what they cost in quality."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the blocks that can wait."""
_TEXT = ("text_encoder_precision", "text_encoder_device")
_BASE = (
    "gradient_checkpointing",
    "base_precision",
    "offload_blocks",
    "train_batch_size",
    "gradient_accumulation_steps",
)
_KEPT = ("mixed_precision", "base_precision", *_TEXT)
"""Of an earlier run that is resumed: what changes its numbers."""


@dataclass(frozen=True)
class Means:
    """What there is to choose from.

    Attributes:
        offloaded: blocks that can wait in the computer's memory at most; none where they are compiled.
        words: forms of the base's weights, the best first.
        text_words: the same of the text encoders.
        text_on_cpu: whether some of these need not be on the GPU.
    """

    offloaded: int = 0
    words: Sequence[str] = ()
    text_words: Sequence[str] = ()
    text_on_cpu: bool = True


@dataclass(frozen=True)
class Fitted:
    """What was chosen.

    Attributes:
        options: that change.
        stages: with them.
        room: bytes for what ``Stage`` counts.
    """

    options: Options
    stages: Sequence[Stage] = field(repr=False)
    room: int

    @property
    def largest(self) -> Stage:
        """The stage that needs most."""
        return _largest(self.stages)

    @property
    def fits(self) -> bool:
        """Whether it can run there."""
        return self.largest.needed <= self.room


def base_options(now: Options, fixed: Collection[str], means: Means) -> Iterator[Options]:
    """Whatever can be done about the training and the drawing, in the order in which it is to be tried.

    Args:
        now: all options that ``--vram`` decides.
        fixed: flags that stay as they are.
        means: to choose from.
    """
    yield {}
    checkpointing: Options = {} if now["gradient_checkpointing"] else {"gradient_checkpointing": True}
    if checkpointing and "gradient_checkpointing" in fixed:
        checkpointing = {}
    can_wait = now["gradient_checkpointing"] or bool(checkpointing)
    counts = _counts(now, fixed, means) if can_wait else [now["offload_blocks"]]
    words = [now["base_precision"]]
    if "base_precision" not in fixed and now["base_precision"] in (None, "bf16"):
        words += means.words
    for word in words:
        first_of_several = word is words[0] and len(words) > 1
        for count in counts[:1] if first_of_several else counts:
            for batch in _batches(now, fixed):
                form = {"base_precision": word, "offload_blocks": count, **batch}
                yield {**checkpointing, **{flag: value for flag, value in form.items() if value != now[flag]}}


def _counts(now: Options, fixed: Collection[str], means: Means) -> list[int]:
    """Ever more blocks that wait; so few that the ring holds them all would save nothing."""
    own = now["offload_blocks"]
    if "offload_blocks" in fixed:
        return [own]
    shares = dict.fromkeys(round(share * means.offloaded) for share in SHARES)
    return [own, *(count for count in shares if count > max(own, SLOTS))]


def _batches(now: Options, fixed: Collection[str]) -> Iterator[Options]:
    """Ever fewer images at a time, as many for a step of the optimizer."""
    flags = ("train_batch_size", "gradient_accumulation_steps")
    batch, times = (now[flag] for flag in flags)
    yield dict(zip(flags, (batch, times), strict=True))
    if not set(flags) & set(fixed):
        for fewer in (size for size in range(batch - 1, 0, -1) if batch % size == 0):
            yield dict(zip(flags, (fewer, times * batch // fewer), strict=True))


def text_options(now: Options, fixed: Collection[str], means: Means) -> Iterator[Options]:
    """The same about the encoding of prompts."""
    yield {}
    if "text_encoder_precision" not in fixed and now["text_encoder_precision"] in (None, "bf16"):
        yield from ({"text_encoder_precision": word} for word in means.text_words)
    if "text_encoder_device" not in fixed and means.text_on_cpu and now["text_encoder_device"] is None:
        yield {"text_encoder_device": "cpu"}


def first_that_fits(candidates: Iterable[Options], needed: Callable[[Options], int], room: int) -> Options:
    """The first of the candidates that needs no more than ``room`` bytes; if none does, the one that needs least."""
    least: tuple[int, Options] | None = None
    for options in candidates:
        bytes_needed = needed(options)
        if bytes_needed <= room:
            return options
        if least is None or bytes_needed < least[0]:
            least = bytes_needed, options
    assert least is not None
    return least[1]


def fit(rehearsal: Rehearsal, config: RunConfig, fixed: Collection[str], means: Means, room: int) -> Fitted:
    """What lets a run fit into ``room`` bytes, or comes closest to it.

    Args:
        rehearsal: of the run.
        config: of the run.
        fixed: flags that stay as they are.
        means: to choose from.
    """
    now = options_in(config)

    def stages(options: Options) -> list[Stage]:
        return rehearsal.stages(with_options(config, options))

    def needed(of_prompts: bool) -> Callable[[Options], int]:
        return lambda options: max(
            stage.needed for stage in stages(options) if (stage.name == "encoding prompts") is of_prompts
        )

    def of_training(options: Options) -> int:
        held = rehearsal.held(with_options(config, options))
        return held if held > room else needed(of_prompts=False)(options)  # the rest takes seconds

    chosen = {
        **first_that_fits(text_options(now, fixed, means), needed(of_prompts=True), room),
        **first_that_fits(base_options(now, fixed, means), of_training, room),
    }
    return Fitted(chosen, stages(chosen), room)


def options_in(config: RunConfig) -> Options:
    """The options that ``--vram`` decides."""
    flat = as_flat_dict(config)
    return {flag: flat[flag] for flag in (*_TEXT, *_BASE)}


def with_options(config: RunConfig, options: Options) -> RunConfig:
    """The run with other values of some options of its groups ``model`` and ``train``."""
    names = {one.name for one in fields(config.model)}
    model = {flag: value for flag, value in options.items() if flag in names}
    train = {flag: value for flag, value in options.items() if flag not in names}
    return replace(config, model=replace(config.model, **model), train=replace(config.train, **train))


def in_words(options: Options) -> str:
    """Options as flags."""
    return " ".join(f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in options.items())


def settle(context: RunContext, earlier: Options) -> None:
    """Decide what ``--vram`` leaves to the program, and tell of it.

    Args:
        context: with all that the model decides. Its parts are to be made anew, of its source.
        earlier: what the run had before, if it is resumed (``of_earlier_run``).

    Raises:
        UserError: it does not fit, whatever is done; or this device does not tell what it has free.
    """
    config, vram = context.config, context.config.model.vram or ""
    room = _room(context, vram)
    flat = as_flat_dict(config)
    before = {flag: value for flag, value in earlier.items() if flag not in config.given and value != flat[flag]}
    start = with_options(config, before)
    fixed = config.given | earlier.keys()
    rehearsal = rehearsal_of(context)
    found = fit(rehearsal, start, fixed, means_of(context, rehearsal), room)
    chosen = {**unsaid_precision.chosen(config), **before, **found.options}
    if not found.fits:
        raise UserError(_does_not_fit(context, vram, found, chosen))
    context.config = with_options(config, chosen)
    context.chosen = chosen
    known = {one.name for one in fields(context.source)} & {*_TEXT, *_BASE}
    context.source = replace(context.source, **{name: getattr(context.config.model, name) for name in known})
    context.tell(_told(vram, found, chosen, rehearsal.stages(config)))


def of_earlier_run(config: RunConfig) -> Options:
    """What the run that is resumed has its numbers from; empty: none is resumed. Main process only.

    Raises:
        UserError: see ``run_folder``.
    """
    folder = resumed_folder(config)
    saved = folder.config() if folder else {}
    return {flag: saved[flag] for flag in _KEPT if flag in saved}


def flags_that_fit(context: RunContext, total_bytes: int) -> str | None:
    """The flags with which a run that found too little memory would fit into a GPU; None: none would be enough.

    Whatever was given for them, they only take less. If the estimate says that the run should have fitted, those are
    named that take at least a tenth less.

    Args:
        context: of the run.
        total_bytes: of the GPU.
    """
    rehearsal = rehearsal_of(context)
    now = max(stage.needed for stage in rehearsal.stages())
    room = min(room_of(total_bytes), int(now / MARGIN))
    found = fit(rehearsal, context.config, (), means_of(context, rehearsal), room)
    return in_words(found.options) if found.fits and found.options else None


def rehearsal_of(context: RunContext) -> Rehearsal:
    """Of a run whose images are not known yet: of square ones, and a prompt of usual length."""
    config, side = context.config, context.config.data.resolution or 0
    images = 0 if config.sample.sample_steps == 0 else config.data.sample_batch_size
    return Rehearsal(context, PROMPT, (side, side), images)


def table(context: RunContext, rehearsal: Rehearsal) -> Iterator[dict[str, Any]]:
    """What ``--vram`` chooses for GPUs of several sizes, as JSON can say it; of the one that was given it has chosen.

    Args:
        context: with all that the model decides.
        rehearsal: of the run.
    """
    config = context.config
    if config.model.vram:
        yield _row(config.model.vram, context.chosen, rehearsal.stages(), fits=True)
        return
    bf16 = config.model.mixed_precision == "no" and "mixed_precision" not in config.given
    own: Options = {"mixed_precision": "bf16"} if bf16 else {}
    config = with_options(config, own)
    rehearsal = rehearsal.of(config)
    means = means_of(context, rehearsal)
    for gigabytes in CARDS:
        found = fit(rehearsal, config, config.given, means, room_of(gigabytes * GIB))
        yield _row(str(gigabytes), {**own, **found.options}, found.stages, found.fits)


def _row(gigabytes: str, options: Options, stages: Sequence[Stage], fits: bool) -> dict[str, Any]:
    largest = _largest(stages)
    flags = in_words(options)
    return {"vram": gigabytes, "fits": fits, "flags": flags, "stage": largest.name, "needed": largest.needed}


def _largest(stages: Sequence[Stage]) -> Stage:
    return max(stages, key=lambda stage: stage.needed)


def means_of(context: RunContext, rehearsal: Rehearsal) -> Means:
    """What can be chosen from with this model, on this device."""
    words = [word for word in SMALLER if precision.is_available(word, context.accelerator.device.type)]
    frozen = set(rehearsal.passes.text_encoders) - set(context.family.TEXT_ENCODERS)
    on_cpu = bool(frozen) or not context.config.encodes_in_training
    offloaded = 0 if context.config.model.compile else rehearsal.most_offloaded  # they exclude each other
    return Means(offloaded, words, words[:1], on_cpu)


def room_of(total_bytes: float) -> int:
    """Bytes for what ``Stage`` counts, on a GPU of so many."""
    return int((total_bytes - DRIVER) / MARGIN)


def _room(context: RunContext, vram: str) -> int:
    if vram != "auto":
        return room_of(float(vram) * GIB)
    device = context.accelerator.device
    if device.type != "cuda":
        raise UserError(
            f"--vram auto: {device.type} does not tell how much of its memory is free: give the gigabytes, such as "
            "--vram 8"
        )
    return int(min(gather_lists([torch.cuda.mem_get_info(device)[0]])) / MARGIN)  # CUDA has taken its own already


def _told(vram: str, found: Fitted, chosen: Options, before: Sequence[Stage]) -> str:
    flags = in_words(chosen) or "no other options than were given"
    amounts = {stage.name: stage.needed for stage in before}
    stages = ", ".join(
        f"{stage.name} {gibibytes(amounts[stage.name])} -> {gibibytes(stage.needed)}"
        if amounts[stage.name] != stage.needed
        else f"{stage.name} {gibibytes(stage.needed)}"
        for stage in found.stages
    )
    return f"--vram {vram} chooses: {flags}. Estimated for the {gibibytes(found.room)} that this leaves: {stages}"


def _does_not_fit(context: RunContext, vram: str, found: Fitted, chosen: Options) -> str:
    stage, config = found.largest, context.config
    with_them = f"with {in_words(chosen)} " if chosen else ""
    remedy = f"a smaller --resolution (now {config.data.resolution}) or --rank (now {config.lora.rank})"
    given = sorted(config.given & {*_TEXT, *_BASE, "compile"})
    if given:
        remedy += f", or leave out {' and '.join(f'--{flag}' for flag in given)}"
    return (
        f"--vram {vram}: this does not fit. {with_them}{stage.name} takes about {gibibytes(stage.needed)}, and beside "
        f"the driver there is room for {gibibytes(found.room)}: give {remedy}; or leave out --vram to try it all "
        "the same"
    )
