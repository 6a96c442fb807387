"""``--save_format``: the result in the formats of other programs, and before any long work whether they can hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.interfaces import Family, ModelSource
from dreamlora.lora import exporting
from dreamlora.lora.names import ModelNames, names_of
from dreamlora.lora.saving import weights_of
from dreamlora.lora.weights import AdapterWeights, LayerWeights, lora_weights
from dreamlora.models.loading import read_config
from dreamlora.reading import is_regular
from dreamlora.run.context import RunContext
from dreamlora.runfolder import RunFolder
from dreamlora.training.loop import Run


def require_names(context: RunContext, denoiser: nn.Module, layers: Sequence[str]) -> None:
    """Nothing, if the formats have names for all layers that are to be trained, and hold the kind of adapter.

    Args:
        context: with all options.
        denoiser: its numbers do not matter.
        layers: of it, by name.

    Raises:
        UserError: one has not.
    """
    config, family = context.config, context.family
    if not config.train.save_format:
        return
    kind = config.lora.adapter
    shapes = {name: cast(Tensor, denoiser.get_submodule(name).weight).shape for name in layers}
    weights = {family.DENOISER: {name: _thin(kind, shape) for name, shape in shapes.items()}}
    for encoder in family.TEXT_ENCODERS if config.lora.train_text_encoder else ():
        weights[encoder] = {"encoder.layers.0.mlp.fc1": _thin(kind, (4, 4))}
    require(config.train.save_format, weights, family, context.source)


def _thin(kind: str, shape: Sequence[int]) -> LayerWeights:
    """An adapter of rank 1 that does nothing.

    Args:
        kind: name of the adapter.
        shape: of the layer's weight.
    """
    rows, *columns = shape
    if kind == "loha":
        up, down = torch.zeros(rows, 1), torch.zeros(1, math.prod(columns))
        return LayerWeights("loha", {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}, 1.0)
    if kind == "lokr":
        up, down = torch.zeros(rows, 1), torch.zeros(1, math.prod(columns))
        return LayerWeights("lokr", {"lokr_w1": torch.zeros(1, 1), "lokr_w2_a": up, "lokr_w2_b": down}, 1.0)
    up = torch.zeros(rows, 1, *(1 for _ in columns[1:]))
    return lora_weights(torch.zeros(1, *columns), up, magnitude=torch.zeros(rows) if kind == "dora" else None)


def require_held(context: RunContext, run: Run) -> None:
    """Nothing, if the formats can hold the run's LoRA, as far as it begins. Every process finds the same.

    Raises:
        UserError: one cannot.
    """
    if run.config.train.save_format:
        model = run.accelerator.unwrap_model(run.model)
        modules = {run.family.DENOISER: model.denoiser, **dict(model.encoders.items())}
        require(run.config.train.save_format, weights_of(modules), run.family, context.source)


def require(forms: tuple[str, ...], weights: AdapterWeights, family: Family, source: ModelSource) -> None:
    """Nothing, if formats can hold weights: what they would write is thrown away.

    Raises:
        UserError: one cannot.
    """
    model = _names(family, source)
    for form in forms:
        try:
            exporting.written(weights, form, model)
        except ValueError as error:
            raise UserError(f"--save_format {form}: {error}") from None


def write(context: RunContext, folder: RunFolder) -> None:
    """The LoRA and the best one in all formats that were asked for. Main process only."""
    model = _names(context.family, context.source)
    for form in context.config.train.save_format:
        for place in (folder.path, folder.best):
            file = place / folder.lora_file.name
            if form == exporting.OWN_FORMAT or not is_regular(file, folder.path):
                continue
            try:
                exporting.save(folder.exported(form, place), form, exporting.converted(file, form, model))
            except ValueError as error:  # of what it has become in training; the rest of the run is not lost
                context.warn(f"--save_format {form}: {file} cannot be written so: {error}")


def _names(family: Family, source: ModelSource) -> ModelNames:
    return names_of(family, read_config(source, family.DENOISER))
