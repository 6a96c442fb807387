"""The evaluation loss of LoRAs, whoever trained them, on the frozen items of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreamlora.evaluation.embed import Processes
from dreamlora.evaluation.measure import Value
from dreamlora.interfaces import Conditioning, Family, Objective
from dreamlora.item_losses import ItemLosses
from dreamlora.metrics._eval_loss import EvalSet, Measured, evaluate_loss

BASE_ROW = 0


@dataclass(frozen=True)
class LossMeter:
    """Measures a pipeline, with whatever LoRA it has at the time.

    Attributes:
        pipeline: stock pipeline of ``family``; its text encoders encode the captions anew for every LoRA.
        objective: of the model's training.
        prompt_length: tokens of a caption; None: the family's own.
        guidance_scale: guidance embedding, for models that have it.
        batch_size: items per forward pass.
        processes: that share the work; all must call with the same arguments.
    """

    pipeline: Any
    family: Family
    objective: Objective
    prompt_length: int | None
    guidance_scale: float
    batch_size: int
    processes: Processes

    def losses(self, items: EvalSet) -> list[float]:
        """Mean squared error of every item, as training measures it (``callbacks.evaluate``)."""
        parts, device = self.pipeline.components, self.pipeline.device
        denoiser = parts[self.family.DENOISER]

        def conditioning(captions: Sequence[str]) -> Conditioning:
            tokens = self.family.tokenize(parts, captions, self.prompt_length)
            return self.family.encode_tokens(parts, {name: value.to(device) for name, value in tokens.items()})

        def predict(noisy: torch.Tensor, times: torch.Tensor, embedded: Conditioning) -> torch.Tensor:
            return self.family.predict(denoiser, noisy, times, embedded, self.guidance_scale)

        measured = evaluate_loss(
            Measured(predict, self.objective, conditioning, device),
            items,
            batch_size=self.batch_size,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        return [loss for _, loss in sorted(self.processes.gather(list(measured.items())))]


def values_of_rows(items: EvalSet, rows: Sequence[list[float]]) -> list[list[Value]]:
    """What is shown of the items' losses, the base model's first: their mean; the mean ratio to the base model's."""
    table: ItemLosses = items.losses()
    for number, losses in enumerate(rows):
        table.put(number, losses)
    base = table.rows[BASE_ROW]
    by, count = f"evalset {items.id}", len(items.noise_keys)
    return [
        [
            Value("eval/loss", table.mean(number), by, count, None),
            Value("eval/loss_rel", float((table.rows[number] / base).mean()), by, count, None),
        ]
        for number in range(len(rows))
    ]
