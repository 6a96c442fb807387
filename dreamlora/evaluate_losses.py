"""The evaluation loss of LoRAs, whoever trained them: each on the same frozen items of a run."""

from __future__ import annotations

from tqdm import tqdm

from dreamlora.config import Train
from dreamlora.contestants import UnderTest, applied
from dreamlora.errors import UserError
from dreamlora.evaluate_command import EVAL_LOSS
from dreamlora.evaluation.embed import Processes
from dreamlora.evaluation.loss import LossMeter, values_of_rows
from dreamlora.evaluation.measure import Measurement
from dreamlora.metrics._eval_loss import EvalSet
from dreamlora.occasions import eval_model_id
from dreamlora.runfolder import RunFolder


def measure_losses(under_test: UnderTest, run: RunFolder | None, processes: Processes) -> dict[str, Measurement]:
    """Values by label; a note instead where there is nothing to measure on.

    Args:
        run: gives the items if no others are given.

    Raises:
        UserError: the set that was given cannot be read, or is for another model.
    """
    given = under_test.config.evalset
    file = given or (run.evalset_file if run and run.evalset_file.exists() else None)
    if file is None:
        return _left_out(under_test, "there is no evaluation set (--evalset outputs/<run>/evalset.json)")
    items = EvalSet.load(file)
    model = eval_model_id(under_test.source, under_test.settings.get("prediction_type"))
    if items.model_id != model:
        wrong = f"{file} is for the model {items.model_id}, not for {model}"
        if given:
            raise UserError(
                f"--evalset: {wrong}. Values of different models cannot be compared: give that of a run with this model"
            )
        return _left_out(under_test, wrong)
    meter = _meter(under_test, processes)
    losses = []
    for row in tqdm(under_test.rows, desc="loss", unit="LoRA", disable=processes.rank > 0):
        with applied(meter.pipeline, row):
            losses.append(meter.losses(items))
    labels = [row.label for row in under_test.rows]
    return dict(zip(labels, map(Measurement, values_of_rows(items, losses)), strict=True))


def _left_out(under_test: UnderTest, why: str) -> dict[str, Measurement]:
    return {row.label: Measurement(notes=[f"{EVAL_LOSS} is left out: {why}"]) for row in under_test.rows}


def _meter(under_test: UnderTest, processes: Processes) -> LossMeter:
    """Measures as the first run did, or with the family's own settings where there is none."""
    settings, parts = under_test.settings, under_test.parts
    train = Train(
        prediction_type=settings.get("prediction_type"),
        guidance_scale=settings.get("guidance_scale", Train.guidance_scale),
    )
    return LossMeter(
        pipeline=parts.pipeline(),
        family=parts.family,
        objective=parts.family.objective(parts.get("scheduler")["scheduler"], train),
        prompt_length=settings.get(parts.family.PROMPT_LENGTH),
        guidance_scale=train.guidance_scale,
        batch_size=under_test.config.eval_batch_size,
        processes=processes,
    )
