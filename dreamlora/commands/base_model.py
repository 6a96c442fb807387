"""The models that ``merge`` and ``extract`` work on: folders, hub repositories, and single files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlora import registry
from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.interfaces import Family, ModelSource
from dreamlora.lora.names import ModelNames, model_names
from dreamlora.models import checkpoint
from dreamlora.models.checkpoint import Layers, TensorHeader, headers_of
from dreamlora.models.copying import PipelinePart, pipeline_parts
from dreamlora.models.loading import family_of, read_config, resolve_source
from dreamlora.models.local import is_single_file
from dreamlora.models.single_file.configs import unet_config
from dreamlora.models.single_file.contents import read_contents
from dreamlora.models.single_file.kinds import UNET, prediction_of, recognize
from dreamlora.models.single_file.others import other_kind


@dataclass(frozen=True)
class BaseModel:
    """A model whose layers can be read and changed.

    Attributes:
        path: as it was given.
        family: its name.
        names: of its layers.
        layers: where their weights are, by component: of the denoiser and the text encoders.
        files: of each component, with the headers of their tensors.
        pipeline: of a folder; None: it is a single file.
        parts: of the pipeline.
    """

    path: str
    family: str
    names: ModelNames
    layers: Mapping[str, Layers]
    files: Mapping[str, Mapping[Path, Mapping[str, TensorHeader]]]
    pipeline: ModelSource | None = None
    parts: tuple[PipelinePart, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it has its text encoders, and is no denoiser alone."""
        return len(self.layers) > 1


def open_model(model: Model, as_folder: bool = False) -> BaseModel:
    """A model, looked through; no weights are read.

    Args:
        model: the options.
        as_folder: whether a single file of a whole model is converted to a folder.

    Raises:
        UserError: there is none, or it is quantised, of no known kind, or there as a pickle alone.
    """
    path = model.pretrained_model_name_or_path
    if is_single_file(path) and not as_folder:
        return _single_file(Path(path), model.family)
    source = resolve_source(model)
    family, names = _of_source(source, model.family)
    name = registry.name_of(family)
    parts = pipeline_parts(source)
    wanted = {part.name: part for part in parts if part.name in (family.DENOISER, *family.PARTS["text"])}
    files = {
        component: {file: headers_of(file) for file in part.weights}
        for component, part in wanted.items()
        if part.weights
    }
    layers = {component: checkpoint.layers_of_folder(own) for component, own in files.items()}
    return BaseModel(path, name, names, layers, files, source, tuple(parts))


def names_of_model(model: Model) -> ModelNames:
    """Names of a model's layers; raises as ``open_model``."""
    path = model.pretrained_model_name_or_path
    if is_single_file(path):
        return _single_file(Path(path), model.family).names
    return _of_source(resolve_source(model), model.family)[1]


def _of_source(source: ModelSource, family: str | None) -> tuple[Family, ModelNames]:
    found = family_of(source, family)
    return found, _names(registry.name_of(found), read_config(source, found.DENOISER))


def _names(family: str, config: Mapping[str, Any]) -> ModelNames:
    names = model_names(family, config)
    if names is None:
        raise UserError(f"the names of the layers of {family} are not known")
    return names


def _single_file(file: Path, family: str | None) -> BaseModel:
    contents = read_contents(file)
    headers = headers_of(file)
    if f"{UNET}input_blocks.0.0.weight" not in headers:
        return _denoiser_alone(file, headers, family)
    kind = recognize(contents)
    name = next(
        known for known in registry.names("families") if kind.pipeline in registry.load("families", known).PIPELINES
    )
    names = _names(name, unet_config(contents, kind, prediction_of(contents, kind)))
    layers = {names.denoiser: checkpoint.layers_of_denoiser(file, headers, UNET, names.layers)}
    for encoder in kind.encoders:
        layers[encoder.name] = checkpoint.layers_of_clip(file, headers, encoder)
    prefixes = {names.denoiser: UNET, **{encoder.name: encoder.prefix for encoder in kind.encoders}}
    files = {
        component: {file: {tensor: header for tensor, header in headers.items() if tensor.startswith(prefix)}}
        for component, prefix in prefixes.items()
    }
    return BaseModel(str(file), name, names, layers, files)


_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_NUMBER = re.compile(r"\.(\d{1,4})\.\w+\.")
"""Of a block: the first in a name, with layers in it."""
_FEWEST = 0.6
"""Of the weights of a denoiser, the share that has names; the others are of its ends."""


def _denoiser_alone(file: Path, headers: Mapping[str, TensorHeader], family: str | None) -> BaseModel:
    """A file with the denoiser of a newer model, as ComfyUI has them in diffusion_models/, maybe among other parts.

    Raises:
        UserError: it is none.
    """
    prefix = next(prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in headers))
    own = {name: header for name, header in headers.items() if name.startswith(prefix)}
    depth = 1 + max((int(block[1]) for block in map(_NUMBER.search, own) if block), default=0)
    wide = sum(name.endswith(".weight") and len(header.shape) > 1 for name, header in own.items())
    found: dict[str, tuple[float, ModelNames, Layers]] = {}
    for known in [family] if family else registry.names("families.layers"):
        names = _names(known, {"num_layers": depth})
        if not names.comfyui:
            continue
        try:
            layers = checkpoint.layers_of_denoiser(file, own, prefix, names.layers)
        except UserError:
            continue
        tensors = {place.tensor for place in layers.values()}
        found[known] = (len(tensors) / max(wide, 1), names, layers)
    name = max(found, key=lambda known: found[known][0], default="")
    if not name or found[name][0] < _FEWEST:
        raise UserError(f"{file} {other_kind(read_contents(file))}")
    _, names, layers = found[name]
    return BaseModel(str(file), name, names, {names.denoiser: layers}, {names.denoiser: {file: own}})
