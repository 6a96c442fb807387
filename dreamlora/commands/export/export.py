"""A LoRA read, whatever program wrote it, and written as another one reads it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamlora import registry
from dreamlora.commands.export.flags import ExportConfig
from dreamlora.commands.lora_files import check_output, tell_of_embeddings
from dreamlora.commands.outside import way_in
from dreamlora.commands.trained import TrainedRun, run_of
from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.lora import exporting
from dreamlora.lora.files import LoraFile, read_lora
from dreamlora.lora.formats import FileContent
from dreamlora.lora.names import ModelNames, model_names
from dreamlora.lora.origin import families_of
from dreamlora.lora.peft_folder import tensors_in
from dreamlora.models.loading import family_of, read_config, resolve_source
from dreamlora.models.parts import DTYPES

_BASE = "pretrained_model_name_or_path"

logger = logging.getLogger(__name__)


def export(config: ExportConfig) -> Path:
    """Write the file, or the folder; returns where it is. All that can be wrong is said before anything is written.

    Raises:
        UserError: the LoRA cannot be read, its family is not known, the format or the precision cannot hold it, or
            there is something at ``--output``.
    """
    lora = read_lora(config.lora)
    tell_of_embeddings(lora)
    _refuse_what_lies_there(config, lora)
    model = model_for(config, lora)
    dtype = None if config.dtype is None else DTYPES["no" if config.dtype == "fp32" else config.dtype]
    try:
        content = exporting.converted(config.lora, config.format, model, dtype)
    except ValueError as error:
        raise UserError(f"--format {config.format}: {error}") from None
    return exporting.save(config.output, config.format, content)


def model_for(config: ExportConfig, lora: LoraFile) -> ModelNames | None:
    """Names of the layers of the model that a LoRA is for; None: nobody needs to know them.

    Raises:
        UserError: they are needed, and the model is not known, or has none in other programs.
    """
    run = run_of(config.lora, config.trust_runs)
    told = _told(config, run)
    fitting = [] if told else families_of(FileContent(lora.tensors(), lora.metadata), lora.format)
    family, sizes = told or (_only(fitting, run), {})
    model = model_names(family, sizes) if family else None
    if model is None and not (exporting.is_nameless(config.format) and lora.format == exporting.OWN_FORMAT):
        if family:
            raise UserError(f"--format {config.format}: what other programs call the layers of {family} is not known")
        raise UserError(f"{lora.path}: {_unknown(fitting, run)}")
    return model


def _told(config: ExportConfig, run: TrainedRun | None) -> tuple[str, dict[str, Any]] | None:
    """Family and config of the denoiser (empty: the published one's), by flags or by the run; None: neither says so."""
    if config.pretrained_model_name_or_path:
        return _of_base(config, run)
    if config.family:
        return config.family, {}
    if run and run.options.get(_BASE):
        try:
            return _of_base(config, run)
        except UserError as error:  # it has moved, or the hub is out of reach
            logger.warning("the base model of %s is not looked at: %s", run.name, error)
    family = run and run.options.get("family")
    return (family, {}) if family else None


def _of_base(config: ExportConfig, run: TrainedRun | None) -> tuple[str, dict[str, Any]]:
    """Family of the base model, and config of its denoiser."""
    options = run.options if run else {}
    own = config.pretrained_model_name_or_path is None or config.pretrained_model_name_or_path == options.get(_BASE)
    commit = run.base.get("revision") if run and own else None
    source = resolve_source(
        Model(
            pretrained_model_name_or_path=config.pretrained_model_name_or_path or options[_BASE],
            revision=config.revision or commit or (options.get("revision") if own else None),
            cache_dir=config.cache_dir,
        )
    )
    family = family_of(source, config.family or (options.get("family") if own else None))
    return registry.name_of(family), read_config(source, family.DENOISER)


def _only(families: Sequence[str], run: TrainedRun | None) -> str | None:
    """The only family that has all layers of a file, if one alone has."""
    if len(families) != 1:
        return None
    if run and _BASE in run.outside:
        logger.warning(
            "the base model of %s is not opened (%s): names and sizes are those of the published %s",
            *(run.name, way_in(_BASE, run.outside[_BASE]), families[0]),
        )
    return families[0]


def _unknown(families: Sequence[str], run: TrainedRun | None) -> str:
    told = f"its layers may be those of {', '.join(families)}" if families else "no model that is known has its layers"
    if run and _BASE in run.outside:
        return f"{told}. Its base model is not opened: {way_in(_BASE, run.outside[_BASE])}"
    return f"{told}: give --family or --{_BASE}"


def _refuse_what_lies_there(config: ExportConfig, lora: LoraFile) -> None:
    output = config.output
    if not output.exists() and not output.is_symlink():
        check_output(output)
        return
    if any(output.resolve() in (file.resolve(), *file.resolve().parents) for file in lora.files.values()):
        raise UserError(f"--output {output} is, or holds, the LoRA itself: give another")
    if not config.overwrite:
        raise UserError(f"--output {output} is there already: give another, or --overwrite to replace it")
    if exporting.is_folder(config.format) != output.is_dir():
        raise UserError(f"--output {output} is {'a folder' if output.is_dir() else 'a file'}: give another")
    if output.is_dir() and not (tensors_in(output) or not any(output.iterdir())):
        raise UserError(f"--output {output} is a folder with other things in it, which would be lost: give another")
