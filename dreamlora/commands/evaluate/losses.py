"""The evaluation loss of LoRAs, whoever trained them: each on the same frozen items of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from dreamlora.commands.evaluate.flags import LOSS_METRIC, EvaluateConfig
from dreamlora.commands.under_test import UnderTest
from dreamlora.config import Train
from dreamlora.errors import UserError
from dreamlora.eval_loss.evalset import EvalSet, Measured, evaluate_loss
from dreamlora.eval_loss.items import values_of
from dreamlora.evaluation.embed import Processes
from dreamlora.evaluation.measure import Measurement, Value
from dreamlora.interfaces import Conditioning
from dreamlora.metric_names import EVAL_LOSS, relative
from dreamlora.runfolder import RunFolder

SHOWN = (EVAL_LOSS, relative(EVAL_LOSS))


def measure_losses(
    config: EvaluateConfig, under_test: UnderTest, run: RunFolder | None, processes: Processes
) -> dict[str, Measurement]:
    """Values by label; a note instead where there is nothing to measure on.

    Args:
        config: for the items, and how many are measured at a time.
        under_test: what is measured.
        run: gives the items if no others are given.
        processes: that share the work; all must call with the same arguments.

    Raises:
        UserError: the set that was given cannot be read, or is for another model.
    """
    given = config.evalset
    file = given or (run.evalset_file if run and run.evalset_file.exists() else None)
    labels = [row.label for row in under_test.rows]
    if file is None:
        return dict.fromkeys(labels, _left_out("there is no evaluation set (--evalset outputs/<run>/evalset.json)"))
    items = EvalSet.load(file, inside=None if given or run is None else run.path)
    model = under_test.source.predictor_id
    if items.model_id != model:
        wrong = f"{file} is for the model {items.model_id}, not for {model}"
        if given:
            raise UserError(
                f"--evalset: {wrong}. Values of different models cannot be compared: give that of a run with this model"
            )
        return dict.fromkeys(labels, _left_out(wrong))
    return dict(zip(labels, _values(items, _losses(config, under_test, items, processes)), strict=True))


def _left_out(why: str) -> Measurement:
    return Measurement(notes=[f"{LOSS_METRIC} is left out: {why}"])


def _losses(config: EvaluateConfig, under_test: UnderTest, items: EvalSet, processes: Processes) -> list[list[float]]:
    """Every row's loss of every item, measured as the first run did it; with the family's settings if there is none."""
    parts, family = under_test.parts, under_test.parts.family
    train = Train(guidance_scale=under_test.settings.get("guidance_scale", Train.guidance_scale))

    def predict(noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        denoiser = parts.get("denoiser")[family.DENOISER]
        with under_test.computing():
            return family.predict(denoiser, noisy, times, conditioning, train.guidance_scale)

    objective = family.objective(parts.get("scheduler")["scheduler"], train)
    if not items.suits(objective):
        raise UserError("the evaluation set has other times than this model's schedule: take that of a run with it")
    measured = Measured(predict, objective, under_test.encode, parts.device)

    def encode(image: int) -> None:
        views = {name: view[image : image + 1] for name, view in items.views.items()}
        under_test.encode([items.captions[image]], views)

    batch, images = config.eval_batch_size, range(len(items.captions))
    losses = []
    for row in tqdm(under_test.rows, desc="loss", unit="LoRA", disable=processes.rank > 0):
        with under_test.applied(row, encode, images):
            losses.append(evaluate_loss(measured, items, batch_size=batch, rank=processes.rank, world=processes.world))
    return losses


def _values(items: EvalSet, rows: Sequence[Sequence[float]]) -> list[Measurement]:
    """Of every row, the base model's first, what training logs of a step."""
    table = items.losses()
    for number, losses in enumerate(rows):
        table.put(number, list(losses))
    by, count = f"evalset {items.id}", len(items.noise_keys)
    measurements = []
    for number in table.steps:
        values = values_of(table, number, SHOWN[0])
        if all(math.isfinite(values[name]) for name in SHOWN):
            measurements.append(Measurement([Value(name, values[name], by, count, None) for name in SHOWN]))
        else:
            measurements.append(_left_out("the loss is not finite"))
    return measurements
