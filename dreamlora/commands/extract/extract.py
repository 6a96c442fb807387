"""A LoRA of what a fine-tuned model has changed: the best of its rank, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamlora.commands.base_model import BaseModel, open_model
from dreamlora.commands.extract.comparison import Differences, compare, opened_tensors
from dreamlora.commands.extract.flags import ExtractConfig
from dreamlora.commands.headers import of_extracted
from dreamlora.commands.lora_files import bytes_at, check_lora_output, content_of
from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.lora import exporting
from dreamlora.lora.low_rank import Cut


def extract(config: ExtractConfig) -> dict[str, Any]:
    """Write the LoRA; what is in it and what is not, as JSON can say it.

    Raises:
        UserError: a model cannot be read, they are of different architectures or the same, or the LoRA cannot be
            written so.
        WriteError: the system refused.
    """
    form = config.written.format or exporting.OWN_FORMAT
    check_lora_output(config.written, form)
    base, tuned = _open(config)
    _check_alike(base, tuned)
    content_of({}, config.written, form, base.names, {})  # whether the format has this model at all
    kept = config.kept
    with opened_tensors() as read:
        found = compare(base, tuned, Cut(kept.rank, kept.energy, kept.sv_ratio), read)
    if not found.layers.rows:
        raise UserError(_nothing(base, tuned, found))
    header = of_extracted(config.written.output, base.names, Path(base.path).name, Path(tuned.path).name)
    content = content_of(found.layers.weights, config.written, form, base.names, header)
    exporting.save(config.written.output, form, content)
    return {
        "base": base.path,
        "tuned": tuned.path,
        "output": str(config.written.output),
        "format": form,
        **found.layers.summary(),
        "equal_layers": found.equal,
        "not_held": found.others,
        "all_compared": bool(base.pipeline) == bool(tuned.pipeline),
        "bytes": bytes_at(config.written.output),
    }


def _nothing(base: BaseModel, tuned: BaseModel, found: Differences) -> str:
    if not found.others:
        return f"{tuned.path} does not differ from {base.path}: there is nothing to extract"
    names = ", ".join(other["tensor"] for other in found.others[:3])
    return (
        f"{tuned.path} differs from {base.path} only in what no LoRA can hold ({len(found.others)} tensors: {names}"
        f"{', ...' if len(found.others) > 3 else ''}): there is nothing to extract"
    )


def _open(config: ExtractConfig) -> tuple[BaseModel, BaseModel]:
    """Both; single files of whole models as folders where the other is one."""
    given = (
        Model(
            pretrained_model_name_or_path=config.pretrained_model_name_or_path,
            family=config.family,
            revision=config.revision,
            variant=config.variant,
            cache_dir=config.cache_dir,
        ),
        Model(
            pretrained_model_name_or_path=config.tuned,
            family=config.family,
            revision=config.tuned_revision,
            variant=config.tuned_variant,
            cache_dir=config.cache_dir,
        ),
    )
    base, tuned = map(open_model, given)
    if base.pipeline and not tuned.pipeline and tuned.whole:
        tuned = open_model(given[1], as_folder=True)
    elif tuned.pipeline and not base.pipeline and base.whole:
        base = open_model(given[0], as_folder=True)
    return base, tuned


def _check_alike(base: BaseModel, tuned: BaseModel) -> None:
    """Raises UserError for models that are of other families, or have layers of other sizes."""
    if base.family != tuned.family:
        raise UserError(f"{base.path} is of the family {base.family}, and {tuned.path} of {tuned.family}")
    for component, layers in base.layers.items():
        for layer, place in layers.items():
            its = tuned.layers.get(component, {}).get(layer)
            if its is not None and its.shape != place.shape:
                raise UserError(
                    f"{base.path} and {tuned.path} are of different architectures: the weights of {component}.{layer} "
                    f"are {place.shape} in the one and {its.shape} in the other"
                )
    denoiser = base.names.denoiser
    lacking = base.layers[denoiser].keys() ^ tuned.layers[denoiser].keys()
    if lacking:
        raise UserError(
            f"{base.path} and {tuned.path} are of different architectures: only one of them has {denoiser}."
            f"{min(lacking)} ({len(lacking)} such layers)"
        )
