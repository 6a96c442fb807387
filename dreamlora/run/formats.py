"""``--save_format``: the result in the formats of other programs, and before any long work whether they can hold it."""

from __future__ import annotations

from typing import Any

import torch

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.interfaces import Family, ModelSource
from dreamlora.lora import exporting
from dreamlora.lora.inject import add_lora
from dreamlora.lora.names import ModelNames, model_names
from dreamlora.lora.pairs import adapted_layers
from dreamlora.lora.saving import weights_of
from dreamlora.lora.weights import AdapterWeights, LayerWeights, lora_weights
from dreamlora.models.footprint import META
from dreamlora.models.loading import read_config
from dreamlora.reading import is_regular
from dreamlora.run.context import RunContext
from dreamlora.runfolder import RunFolder
from dreamlora.training.loop import Run


def require_names(context: RunContext, denoiser: Any) -> None:
    """Nothing, if the formats have names for all layers that are to be trained.

    Args:
        context: with all options.
        denoiser: without numbers; it gets a LoRA.

    Raises:
        UserError: one has not.
    """
    config, family = context.config, context.family
    if not config.train.save_format:
        return
    with META:
        add_lora(denoiser, config.lora, config.lora.lora_layers or family.LORA_LAYERS)
    weights = {family.DENOISER: {layer.name: _thin(*layer.factors()) for layer in adapted_layers(denoiser)}}
    for encoder in family.TEXT_ENCODERS if config.lora.train_text_encoder else ():
        weights[encoder] = {"encoder.layers.0.mlp.fc1": lora_weights(torch.zeros(1, 1), torch.zeros(1, 1))}
    require(config.train.save_format, weights, family, context.source)


def _thin(down: torch.Tensor, up: torch.Tensor) -> LayerWeights:
    """A LoRA of rank 1 of the same layer, on the CPU."""
    return lora_weights(torch.zeros(1, *down.shape[1:]), torch.zeros(len(up), 1, *up.shape[2:]))


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
        if model is None and not exporting.is_nameless(form):
            raise UserError(
                f"--save_format {form}: what other programs call the layers of {registry.name_of(family)} is not known"
            )
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
            if form != exporting.OWN_FORMAT and is_regular(file, folder.path):
                content = exporting.converted(file, form, model)
                exporting.save(folder.exported(form, place), form, content)


def _names(family: Family, source: ModelSource) -> ModelNames | None:
    return model_names(registry.name_of(family), read_config(source, family.DENOISER))
