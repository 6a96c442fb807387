"""A single file as a folder in diffusers' format: names by diffusers' own converters, configurations by ``configs``.

No number is changed: what the weights are stored in stays too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.files import replacing, write_atomically
from dreamlora.models.configs import in_one_line
from dreamlora.models.local import INDEX
from dreamlora.models.single_file import clip, configs
from dreamlora.models.single_file.contents import Contents
from dreamlora.models.single_file.kinds import UNET, VAE, ClipEncoder, ModelKind, Prediction
from dreamlora.models.single_file.others import check_autoencoder
from dreamlora.reading import shortened_text

Tensors = dict[str, Tensor]

_LAYER = re.compile(r"encoder\.layers\.(\d{1,4})\.")
_INNER = "text_model."
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""How diffusers once called the layers of an autoencoder's attention."""
_UNUSED = ("text_projection.weight", "logit_scale", "embeddings.position_ids")
"""Of text encoders; the first counts where a projection is expected."""


@dataclass(frozen=True)
class _ToWrite:
    """One part.

    Attributes:
        name: of its folder; "" for an autoencoder alone.
        what: it is, for a person.
        stem: of the file of its weights.
        config: as it is written.
        build: makes the module, for the names and shapes of its tensors.
        convert: the file's own tensors, without their prefix, to those of the module.
        prefix: of the file's tensors.
    """

    name: str
    what: str
    stem: str
    config: Mapping[str, Any]
    build: Callable[[], nn.Module]
    convert: Callable[[Tensors], Tensors]
    prefix: str


def write_pipeline(contents: Contents, kind: ModelKind, prediction: Prediction, folder: Path) -> None:
    """Write the model as a diffusers folder.

    Raises:
        UserError: tensors are missing, or have other shapes than the rest lets expect.
        WriteError: the system refused.
    """
    unet, vae = configs.unet_config(contents, kind, prediction), configs.vae_config(contents, kind)
    parts = [
        _of_diffusers("unet", "UNet", unet, lambda tensors: _unet(tensors, unet), UNET),
        _of_diffusers("vae", "autoencoder", vae, lambda tensors: convert_ldm_vae_checkpoint(tensors, vae), VAE),
        *(_text_encoder(contents, encoder) for encoder in kind.encoders),
    ]
    # all are looked at before gigabytes are written of the first
    for part, tensors in [(part, _converted(contents, part)) for part in parts]:
        _write(part, tensors, folder / part.name)
    index: dict[str, Any] = {"_class_name": kind.pipeline, "_diffusers_version": diffusers.__version__, **kind.settings}
    for encoder in kind.encoders:
        index[encoder.name] = ["transformers", encoder.class_name]
        index[encoder.tokenizer] = ["transformers", "CLIPTokenizer"]
        positions = configs.text_config(contents, encoder)["max_position_embeddings"]
        clip.write_tokenizer(folder / encoder.tokenizer, positions, encoder.pad_token)
    index["unet"], index["vae"] = ["diffusers", unet["_class_name"]], ["diffusers", vae["_class_name"]]
    scheduler = configs.scheduler_config(kind, prediction)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / INDEX, index)


def write_autoencoder(
    contents: Contents, config: Mapping[str, Any], build: Callable[[], nn.Module], folder: Path
) -> None:
    """Write an autoencoder given as a file, with the config of the one that it is to replace; raises as
    ``write_pipeline``.

    Args:
        contents: of the file, which may also be a whole model.
        config: of the model's own autoencoder: the scale of latents is in no file.
        build: makes one.
        folder: to be written.
    """
    prefix = check_autoencoder(contents)
    original = contents.has(f"{prefix}encoder.down.")
    if original and config.get("_class_name") != "AutoencoderKL":
        raise UserError(
            f"{contents.file} is an AutoencoderKL, where the model has an {config.get('_class_name')}: give one that "
            "belongs to the model"
        )
    levels = {f"{side}_block_types": config.get(f"{side}_block_types") or [] for side in ("down", "up")}
    convert = (lambda tensors: convert_ldm_vae_checkpoint(tensors, levels)) if original else _named_anew
    part = _ToWrite("", "autoencoder", _DIFFUSERS, config, build, convert, prefix)
    _write(part, _converted(contents, part), folder)


_DIFFUSERS = "diffusion_pytorch_model"


def _of_diffusers(
    name: str, what: str, config: dict[str, Any], convert: Callable[[Tensors], Tensors], prefix: str
) -> _ToWrite:
    module_class = getattr(diffusers, config["_class_name"])
    return _ToWrite(name, what, _DIFFUSERS, config, lambda: module_class.from_config(config), convert, prefix)


def _text_encoder(contents: Contents, encoder: ClipEncoder) -> _ToWrite:
    config = configs.text_config(contents, encoder)
    module_class = getattr(transformers, encoder.class_name)

    def convert(tensors: Tensors) -> Tensors:
        if encoder.layout == "open_clip":
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
            tensors = convert_open_clip_checkpoint(model, tensors, prefix="")
        return _used(tensors, config["num_hidden_layers"], encoder.class_name.endswith("WithProjection"))

    return _ToWrite(
        encoder.name,
        encoder.name.replace("_", " "),
        "model",
        config,
        lambda: module_class(transformers.CLIPTextConfig(**config)),
        convert,
        encoder.prefix,
    )


def _used(tensors: Tensors, layers: int, projection: bool) -> Tensors:
    """Those of a CLIP that count, each with its first word, which some programs leave out."""
    bare = {name.removeprefix(_INNER): tensor for name, tensor in tensors.items()}
    unused = _UNUSED[1:] if projection else _UNUSED
    return {
        name if name.startswith("text_projection") else _INNER + name: tensor
        for name, tensor in bare.items()
        if name not in unused and not ((layer := _LAYER.match(name)) and int(layer[1]) >= layers)
    }


def _named_anew(tensors: Tensors) -> Tensors:
    """An autoencoder's tensors with today's names."""
    named = {}
    for name, tensor in tensors.items():
        for old, new in _OLD_ATTENTION.items():
            name = name.replace(old, new) if ".attentions." in name else name
        named[name] = tensor
    return named


def _unet(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    converted: Tensors = convert_ldm_unet_checkpoint({f"{UNET}{name}": own for name, own in tensors.items()}, config)
    return converted


def _converted(contents: Contents, part: _ToWrite) -> Tensors:
    """The part's tensors as diffusers has them; raises as ``write_pipeline``."""
    try:
        tensors = part.convert(_read(contents, part.prefix))
        with torch.device("meta"):
            expected = part.build().state_dict()
    except UserError:
        raise
    except Exception as error:  # of many kinds, as the libraries have it
        raise UserError(
            f"{contents.file}: its {part.what} is of no known kind, or damaged; the reason given: {in_one_line(error)}"
        ) from error
    _check_fit(contents.file, part, tensors, expected)
    return tensors


def _write(part: _ToWrite, tensors: Tensors, folder: Path) -> None:
    with replacing(folder / f"{part.stem}.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
    _write_json(folder / "config.json", part.config)


def _read(contents: Contents, prefix: str) -> Tensors:
    """The tensors below a prefix, without it; their numbers come from the disk when they are used."""
    with open_tensors(contents.file) as tensors:
        return {
            name.removeprefix(prefix): tensors.get_tensor(name) for name in contents.shapes if name.startswith(prefix)
        }


def _check_fit(file: Path, part: _ToWrite, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Nothing, if these are the tensors of such a module, of numbers and in their shapes.

    Raises:
        UserError: they are not.
    """
    found = {name.removeprefix(_INNER): tensor for name, tensor in tensors.items()}
    wanted = {name.removeprefix(_INNER): tensor.shape for name, tensor in expected.items()}
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or more:
        what = f"lacks {len(missing)} tensors, {missing[0]} first" if missing else ""
        what += " and " if missing and more else ""
        what += f"has {len(more)} that nothing is known of, {shortened_text(more[0])} first" if more else ""
        raise UserError(
            f"{file} is incomplete or of no known kind: its {part.what} {what} (in diffusers' names). Download it "
            "again, or give the model as a folder in diffusers' format"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape or not found[name].is_floating_point():
            raise UserError(
                f"{file}: in its {part.what} {name} has the shape {list(found[name].shape)} and the type "
                f"{found[name].dtype}, where {list(shape)} of floating-point numbers is expected: it belongs to "
                "another kind of model, or is damaged"
            )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_atomically(file, json.dumps(content, indent=2, sort_keys=True) + "\n")
