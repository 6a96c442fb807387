"""The fields of compare.json, schema version 2: what the statistics write and the report reads.

Numbers are JSON numbers; infinity is written as the text "inf" (a target that was never reached; the loss of a run that
diverged or failed, which is worse than any other) or "-inf", and what could not be computed as null. Losses are those
of ``metric``, on one frozen evaluation set. Percentages are signed changes against the baseline: negative is better,
since a loss is compared. Folders and files are relative to the folder of compare.json where they lie in it.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypeVar

from annotated_types import Ge, Le, MaxLen
from typing_extensions import TypedDict

from dreamlora.reading import Schema
from dreamlora.schemas import Count, Name, Seed, Step, Text

COMPARE_FILE = "compare.json"
SCHEMA_VERSION = 2

Number = Annotated[float, Ge(-1e300), Le(1e300)] | Literal["inf", "-inf"] | None
"""A number, infinity, or null for "not computed"."""
Rate = Annotated[float, Ge(0), Le(1e300)]
Element = TypeVar("Element")
Few = Annotated[list[Element], MaxLen(10**4)]
Many = Annotated[list[Element], MaxLen(10**6)]
Command = Annotated[str, MaxLen(2**20)]
Word = Literal["better", "worse", "equivalent", "inconclusive", "insufficient seeds"]
Status = Literal["finished", "diverged", "failed", "unfinished", "planned"]
Edge = Literal["low", "high"]


class Spread(TypedDict):
    """A number over seeds. ``n`` counts the values that went in, also those that are inf."""

    median: Number
    min: Number
    max: Number
    n: Count


class Interval(TypedDict):
    """A mean over seeds with its 95 % Student-t interval; ``low`` and ``high`` are null below three seeds."""

    mean: Number
    low: Number
    high: Number
    n: Count


class Pair(TypedDict):
    """One seed of a method against the same seed of the baseline.

    ``pct`` is "inf" where only the baseline has a loss, "-inf" where only the method has one, null where neither has.
    """

    seed: Seed
    pct: Number


class Delta(TypedDict):
    """Final loss against the baseline, both at their own best learning rate, paired by seed.

    The mean is that of log ratios, told as a percentage, so that swapping the two methods swaps the sign and no more.

    Attributes:
        pct: over all seeds in which one of the two has a loss; "inf" or "-inf" if the other has none in some of them.
        ended: over the seeds in which both have a loss: flatters who failed in the others.
        images_se_pct: standard error over the images that were measured, which the interval over seeds cannot contain;
            null where the last point of the curve is compared, or there is one image.
        wins: pairs in which the method has the lower loss, or alone has one, of ``pct["n"]``.
        word: the verdict; see ``stats.paired_verdict`` for how failures count.
        suffixes: what qualifies it, such as "LR grid edge", "not tuned", "2 of 5 seeds diverged".
        verdict: word and suffixes in one text.
        sentence: the whole finding, such as "sgd: loss −2.1 % [−3.0, −1.2] against adamw, lower in 5 of 5 seeds".
    """

    pct: Interval
    ended: Interval
    images_se_pct: Number
    wins: Count
    pairs: Few[Pair]
    word: Word
    suffixes: Few[Text]
    verdict: Text
    sentence: Text


class ToTarget(TypedDict):
    """Steps (or seconds of training) until the loss first is at the target; "inf" for runs that never were.

    Attributes:
        reached: runs that reached it, of ``spread["n"]``.
        speedup: the baseline's median over this method's median; above 1 is faster.
    """

    spread: Spread
    reached: Count
    speedup: Number


class Basin(TypedDict):
    """Learning rates whose loss lies within ``tolerance`` of the best median over all methods.

    Attributes:
        tolerance: 0.05 stands for 5 %.
        low, high: the ends, interpolated between the rates that were tried; null if no rate is good enough.
        decades: log10(high / low).
        censored_low, censored_high: the basin goes on beyond the lowest (highest) rate that was tried.
    """

    tolerance: Rate
    low: Number
    high: Number
    decades: Number
    censored_low: bool
    censored_high: bool


class RatePoint(TypedDict):
    """One learning rate of a method, over its tuning seeds.

    Attributes:
        final: "inf" for runs that diverged or failed.
        score: its median: what the best rate is chosen by.
        n_diverged: runs that diverged or failed.
        added: whether the rate was added because the best lay at an edge of the grid.
        dw_norm: Frobenius norm of all weight changes B·A·scale together, of the final LoRA.
        update_rms: root mean square of the optimizer's last update, where the runs logged it.
        runs: ids.
    """

    lr: Rate
    score: Number
    final: Spread
    n_diverged: Count
    n_runs: Count
    added: bool
    dw_norm: Spread
    update_rms: Spread
    runs: Few[Text]


class Band(TypedDict):
    """The loss by step over the headline runs that neither diverged nor failed; the lists are of the same length."""

    steps: Many[Step]
    median: Many[Number]
    mean: Many[Number]
    low: Many[Number]
    high: Many[Number]
    min: Many[Number]
    max: Many[Number]


class Octile(TypedDict):
    """The delta on one eighth of the timesteps: 0 is the least noisy eighth, 7 the noisiest."""

    octile: Annotated[int, Ge(0), Le(7)]
    pct: Interval


class ComparedImageMetric(TypedDict):
    """An image metric (img/clip_t, img/dino, ...) of a method's headline runs.

    Attributes:
        at: the last step, or the step with the lowest loss.
        images: how many images one value is of.
    """

    name: Name
    at: Literal["final", "best"]
    value: Interval
    encoder_id: Text | None
    images: Count | None


class Cell(TypedDict):
    """One sample image. ``file`` is relative to the folder of compare.json; null if it was not drawn.

    Those with the same prompt, seed and settings show the same thing, whatever their numbers.
    """

    step: Step
    prompt_index: Count
    image_index: Count
    prompt: Text
    seed: Seed
    settings: Few[Text]
    file: Text | None


class Samples(TypedDict):
    """Sample images of one headline run of a method.

    Attributes:
        run: its id.
        losses: loss by step (the step as text), where it was measured at a step that was drawn.
    """

    run: Name
    lr: Rate
    training_seed: Seed
    steps: Many[Step]
    prompts: Few[Text]
    losses: Annotated[dict[Name, Number], MaxLen(10**5)]
    cells: Many[Cell]
    references: Few[Text]


class Method(TypedDict):
    """An optimizer with its settings: all that compare.json tells about it.

    Attributes:
        label: as on the command line: "adamw", "scaled_adamw:variant=split", "adamw+init=lora_ga".
        optimizer_args: settings of the optimizer itself.
        options: flags that this method has besides those that all share.
        tuned: whether more than one learning rate was tried.
        rates: ascending.
        best_lr: the lowest ``score``; null if that is infinite at every rate, and where ``rates`` is empty.
        found_lrs: where every run found a rate of its own, these, ascending. There is no rate that was tried then.
        at_grid_edge: the best rate is the lowest ("low") or the highest ("high") that was tried.
        suggested_lrs: rates to try next, if it is.
        n_diverged: of all runs, tuning and headline, those that diverged or failed.
        headline_seeds: seeds of the runs at ``best_lr`` that the comparison is made of.
        headline_diverged: how many of those diverged or failed.
        final: loss at the end of the headline runs; "inf" for those.
        vs_base_pct: its median against the base model without LoRA.
        delta: null for the baseline.
        log_auc: mean over evaluations of ln(loss / base loss): lower is earlier and deeper; "inf" for those.
        peak_memory_gib: of the device, while training; null on CPUs.
    """

    label: Text
    optimizer: Text
    optimizer_args: Annotated[dict[Text, Text], MaxLen(1000)]
    options: Annotated[dict[Text, Text], MaxLen(1000)]
    is_baseline: bool
    tuned: bool
    rates: Few[RatePoint]
    best_lr: Rate | None
    found_lrs: NotRequired[Few[Rate]]
    at_grid_edge: Edge | None
    suggested_lrs: Few[Rate]
    n_runs: Count
    n_diverged: Count
    tuning_seeds: Few[Seed]
    headline_seeds: Few[Seed]
    headline_diverged: Count
    final: Spread
    vs_base_pct: Number
    delta: Delta | None
    steps_to_target: ToTarget
    seconds_to_target: ToTarget
    seconds_per_step: Spread
    peak_memory_gib: Spread
    log_auc: Spread
    lr_basin: Few[Basin]
    octiles: Few[Octile]
    images: Few[ComparedImageMetric]
    curve: Band
    samples: Samples | None


class RunRow(TypedDict):
    """One run.

    Attributes:
        id: its folder, relative to compare.json's where it lies in it.
        status: "diverged" is a loss that is not finite. One above the base model's is a loss like others.
        message: why it failed; empty otherwise.
        seconds: of training at each of ``steps``, without evaluations and samples.
    """

    id: Name
    method: Text
    lr: Rate
    seed: Seed
    role: Literal["tuning", "headline"]
    status: Status
    message: Text
    base: Number
    final: Number
    best: Number
    best_step: Step | None
    steps_to_target: Number
    seconds_to_target: Number
    seconds_per_step: Number
    log_auc: Number
    dw_norm: Number
    steps: Many[Step]
    losses: Many[Number]
    seconds: Many[Number]
    report: Text | None
    command: Command | None


class SameRate(TypedDict):
    """A method against the baseline at one learning rate that both tried: instructive, but no fair comparison."""

    method: Text
    lr: Rate
    pct: Interval
    method_diverged: Count
    baseline_diverged: Count


class Dropped(TypedDict):
    """A run that is left out, and why."""

    run: Name
    reason: Text


class Task(TypedDict):
    """What all runs have in common.

    Attributes:
        evalset_id: of the curves.
        eval_items, eval_images: how many items, of how many images, the verdicts are about.
        final_evalset_id: of the larger set that they are about; null if it is the last point of the curves.
    """

    model: Text
    data: Text
    instance_prompt: Text | None
    steps: Step | None
    evalset_id: Annotated[str, MaxLen(1000)]
    eval_items: Count
    eval_images: Count
    final_evalset_id: Text | None
    options: Annotated[dict[Text, Text], MaxLen(1000)]
    device: Text | None
    git_commit: Text | None
    versions: Annotated[dict[Text, Text], MaxLen(1000)]


class Comparison(TypedDict):
    """compare.json.

    Attributes:
        complete: whether all planned runs have ended.
        metric: "eval/loss", or "eval/loss_train" where no image was held out.
        held_out: false: overfitting cannot be seen.
        sentence: the verdict in one sentence, for the top of the page.
        base_loss: of the base model, before any training.
        target: median over the baseline's headline seeds of their best loss, times 1.01.
        fresh_seeds: whether the headline runs have seeds that no learning rate was chosen by.
        budget: fixed text: how many runs, what was selected on what, and what one comparison cannot show.
        warnings: what a reader must know before believing the numbers.
        methods: the baseline first, then as given.
        prompts: of the samples.
        command: that makes this comparison again; null if it was made of runs that existed.
    """

    schema_version: Count
    name: Name
    complete: bool
    metric: Name
    held_out: bool
    sentence: Text
    task: Task
    baseline: Text
    base_loss: Number
    target: Number
    fresh_seeds: bool
    budget: Few[Text]
    warnings: Few[Text]
    methods: Few[Method]
    same_lr: Few[SameRate]
    runs: Few[RunRow]
    dropped: Few[Dropped]
    command: Command | None


COMPARISON = Schema(Comparison)
