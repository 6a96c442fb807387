"""The types and bounds of what a run folder's files hold. What does not fit is named and left out, the rest is used.

A field that is not declared here is not read. The options of config.yaml are declared in ``config``.
"""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Le, MaxLen, Predicate
from typing_extensions import TypedDict

from dreamlora.reading import LARGEST, Schema

Step = Annotated[int, Ge(0), Le(10**9)]
Count = Annotated[int, Ge(0), Le(LARGEST)]
Seed = Annotated[int, Ge(0), Le(2**64)]
Seconds = Annotated[float, Ge(0), Le(10**12)]
Rate = Annotated[float, Ge(0), Le(1e9)]
Gib = Annotated[float, Ge(0), Le(10**6)]
Name = Annotated[str, MaxLen(1000)]
Text = Annotated[str, MaxLen(2**16)]
"""Prompts, captions, sentences."""
Number = float | None
"""None for one that was not finite."""


def lies_below(name: str) -> bool:
    """Whether a file's name leads to no other place than below the folder that it is relative to."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    odd = hidden or path.is_absolute() or not name.isprintable() or "\\" in name or PureWindowsPath(name).drive
    return bool(path.parts) and not odd


def _is_digest(text: str) -> bool:
    return text.isalnum() and len(text) <= 64


FileName = Annotated[Name, Predicate(lies_below)]
"""Of a file below a folder of the run."""


class MetricRow(TypedDict):
    """A line of metrics.jsonl."""

    v: NotRequired[Count]
    run: NotRequired[str]
    wall_s: NotRequired[Number]
    step: Step
    name: Name
    value: Number
    n: NotRequired[Count | None]
    n_other: NotRequired[Count | None]
    evalset_id: NotRequired[Name | None]
    images_id: NotRequired[Name | None]
    encoder_id: NotRequired[Name | None]
    se: NotRequired[Number]
    at_end: NotRequired[bool]


def _is_run_id(text: str) -> bool:
    return len(text) == 8 and set(text) <= set("0123456789abcdef")


class SampleRow(TypedDict):
    """A line of samples.jsonl."""

    step: Step
    prompt_index: Count
    image_index: Count
    prompt: Text
    seed: Seed
    file: FileName
    num_inference_steps: NotRequired[Count]
    guidance_scale: NotRequired[Annotated[float, Ge(0), Le(1e300)]]
    lora_scale: NotRequired[Number]
    sha256: NotRequired[Name]
    scheduler: NotRequired[Name]
    negative_prompt: NotRequired[Text | None]
    conditioning: NotRequired[Annotated[str, Predicate(_is_digest)]]
    problem: NotRequired[Text]
    vae_tiling: NotRequired[bool]


class ImageRow(TypedDict):
    """A line of images.jsonl."""

    name: Name
    role: Name
    sha256: Name
    captions: Annotated[list[str], MaxLen(1000)]
    mask: NotRequired[Name]
    conditioning: NotRequired[Name]


class Compared(TypedDict, total=False):
    """A step of a run, and how it lies against the selected one."""

    step: Step
    value: Number
    difference: Number
    standard_error: Number
    standard_errors: Number


class SelectionFile(TypedDict):
    """best/selection.json."""

    schema_version: NotRequired[Count]
    step: Step
    reason: NotRequired[Text]
    rule: NotRequired[Text]
    metric: NotRequired[Name]
    value: NotRequired[Number]
    n: NotRequired[Count]
    evalset_id: NotRequired[Name]
    lowest: NotRequired[Compared | None]
    runner_up: NotRequired[Compared | None]
    base: NotRequired[Compared | None]
    last: NotRequired[Compared | None]
    vetoed: NotRequired[dict[Name, Text]]
    vetoes_passed_over: NotRequired[bool]
    best_product: NotRequired[dict[str, Any] | None]


class TriedRate(TypedDict):
    """A short run of a range test: its loss, and how far that lies above the loss before the first step."""

    learning_rate: Rate
    value: Number
    difference: Number
    standard_error: Number


class RangeTestFile(TypedDict):
    """learning_rate_test.json."""

    schema_version: NotRequired[Count]
    learning_rate: Rate
    reason: NotRequired[Text]
    metric: NotRequired[Name]
    evalset_id: NotRequired[Name]
    n: NotRequired[Count]
    steps: NotRequired[Step]
    length: NotRequired[Annotated[float, Ge(0), Le(10**9)]]
    exponent: NotRequired[Annotated[float, Ge(0), Le(10)]]
    start: NotRequired[Number]
    tried: NotRequired[Annotated[list[TriedRate], MaxLen(100)]]
    share: NotRequired[Annotated[float, Ge(0), Le(10**9)]]
    seconds: NotRequired[Seconds]


class OutcomeFile(TypedDict):
    """outcome.json."""

    status: NotRequired[Literal["finished", "diverged", "failed"]]
    message: NotRequired[Text]
    method: NotRequired[Name | None]


class BaseModelFile(TypedDict):
    """base_model.json."""

    id: NotRequired[Name]
    revision: NotRequired[Name | None]
    vae_revision: NotRequired[Name | None]
    init_lora: NotRequired[Name | None]


class NoEffect(TypedDict):
    """One call of the denoiser, to which the LoRA made no difference."""

    effect: float


class CallFigures(NoEffect):
    """... to which it made one, in training and in a stock pipeline."""

    error: float
    rounding: float
    scale: float


class ParityFigures(TypedDict, total=False):
    """Whether the saved file does what training showed."""

    reason: Text
    psnr_db: float
    max_abs: float
    mean_abs: float
    call: CallFigures | NoEffect | None
    kind: Name
    base_changed: bool


class EvalPrice(TypedDict):
    """What the evaluation loss cost."""

    sentence: Text
    seconds: Seconds


class Made(TypedDict):
    """What a run is, for a resume that has nothing left to do."""

    steps: Step
    settings: dict[str, Any]
    wanted: dict[str, Any]


class SummaryFile(TypedDict, total=False):
    """summary.json, as far as it is read again."""

    parity: ParityFigures
    timings: Annotated[dict[Name, Seconds], MaxLen(100)]
    versions: Annotated[dict[Name, Name], MaxLen(100)]
    device: Name | None
    peak_memory_gib: Gib | None
    peak_memory: Annotated[dict[Name, Annotated[dict[Name, Gib], MaxLen(10)]], MaxLen(100)]
    git_commit: Name | None
    warnings: Annotated[list[Text], MaxLen(1000)]
    data: Annotated[dict[Name, Count], MaxLen(1000)]
    lora: dict[Name, Count]
    eval_price: EvalPrice | Annotated[dict[str, Any], MaxLen(0)]
    ended_early: Text | None
    made: Made
    command: Annotated[str, MaxLen(2**20)] | None


METRIC_ROW = Schema(MetricRow)
SAMPLE_ROW = Schema(SampleRow)
IMAGE_ROW = Schema(ImageRow)
SELECTION = Schema(SelectionFile)
RANGE_TEST = Schema(RangeTestFile)
OUTCOME = Schema(OutcomeFile)
BASE_MODEL = Schema(BaseModelFile)
SUMMARY = Schema(SummaryFile)
TRACKERS = Schema(Annotated[dict[Name, Annotated[str, Predicate(_is_run_id)]], MaxLen(20)])
OUTLINE = Schema(Annotated[dict[Name, Text], MaxLen(1000)])
OPTIONS = Schema(Annotated[dict[str, Any], MaxLen(1000)])
"""config.yaml, whose options ``config`` declares; there are some two hundred."""
OBJECT = Schema(Annotated[dict[str, Any], MaxLen(10_000)])
"""A file whose fields are checked elsewhere."""
