"""Where a pipeline's parts come from: a folder, the hub or an embedded model. Safetensors only by default."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import diffusers
import torch
import transformers
from annotated_types import Len
from diffusers.utils import DummyObject
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils.logging import disable_progress_bar

from dreamlora import registry, tiny
from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.interfaces import Classes, Components, Family, ModelSource, Role, Settings
from dreamlora.models import configs
from dreamlora.models.building import CONFIG, SCHEDULER_CONFIG, Form, check_config, load_part
from dreamlora.models.fetching import Place, commit_of, find_file, identity
from dreamlora.models.local import INDEX, is_single_file, vae_file
from dreamlora.models.schedules import as_trained
from dreamlora.models.single_file.resolve import autoencoder_of, pipeline_of
from dreamlora.models.tokenizer import PROCESSORS
from dreamlora.reading import Schema, UnreadableError, read_json, shortened

SCHEDULER = "scheduler"


def resolve_source(
    model: Model,
    prediction_type: str | None = None,
    vae_revision: str | None = None,
    rescale_betas_zero_snr: bool = False,
) -> ModelSource:
    """Where the model comes from, and the id that caches know it by.

    The id of a folder or single file holds a fingerprint of it, that of a hub repository its commit, and all hold the
    id of an autoencoder that replaces theirs, and layers of the text encoder that are not the usual ones: what another
    model made is never taken for this one's. What a branch of the hub points to is looked up here alone, and every part
    is loaded from that commit, though the branch may move. A single file is converted to a folder here, unless that was
    done before.

    Args:
        model: the options.
        prediction_type: of the run, instead of the scheduler's own; None: that.
        vae_revision: of the other autoencoder's repository.
        rescale_betas_zero_snr: of the run.

    Raises:
        UserError: no such folder, file or repository, or it is no diffusers pipeline.
    """
    name, cache, variant = model.pretrained_model_name_or_path, model.cache_dir, model.variant
    if is_single_file(name):
        folder, own_id = pipeline_of(Path(name), cache, prediction_type)
        path, revision, variant = str(folder), None, None
    else:
        path = str(tiny.pipeline_path(name)) if name in tiny.MODELS else name
        revision = commit_of(path, INDEX, model.revision, cache)
        own_id = identity(name, path, revision)
    parts = [own_id, *([variant] if variant else [])]
    layers = model.text_encoder_out_layers
    if layers:
        parts.append("text layers:" + ",".join(map(str, layers)))
    vae = model.pretrained_vae_model_name_or_path
    if vae and is_single_file(vae):
        folder, vae_id = autoencoder_of(Path(vae), Place(path, revision, cache, "vae").file(CONFIG), cache)
        vae, vae_revision = str(folder), None
        parts.append("vae:" + vae_id)
    elif vae:
        vae_revision = commit_of(vae, vae_file(vae), vae_revision, cache)
        parts.append("vae:" + identity(vae, vae, vae_revision))
    return ModelSource(
        path=path,
        model_id="+".join(parts),
        revision=revision,
        variant=variant,
        vae_path=vae,
        vae_revision=vae_revision if vae else None,
        cache_dir=cache,
        allow_pickle=model.allow_pickle,
        prediction_type=prediction_type,
        text_layers=layers,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        base_precision=model.base_precision,
        text_encoder_precision=model.text_encoder_precision,
        offload_blocks=model.offload_blocks,
        attention_backend=model.attention_backend,
        channels_last=model.channels_last,
        text_encoder_device=model.text_encoder_device,
    )


def read_model_index(source: ModelSource) -> dict[str, Any]:
    """The pipeline's ``model_index.json``: its class and its parts as ``{name: [library, class]}``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = find_file(source.path, INDEX, source.revision, source.cache_dir)
    index: dict[str, Any] = read_json(file, _MAPPING, most=configs.CONFIG_BYTES)
    if "_class_name" not in index:
        raise UserError(
            f"{source.path}: {INDEX} does not name a pipeline (no _class_name); is it a diffusers pipeline?"
        )
    if not _is_name(index["_class_name"]):
        raise UserError(
            f"{source.path}: {INDEX} names {shortened(index['_class_name'])} as its pipeline, where the name of a "
            "class of diffusers is expected; pipelines that come with code of their own are not loaded"
        )
    return index


def family_of(source: ModelSource, name: str | None = None) -> Family:
    """The family module for a pipeline: the one that handles its class, or for classes of none the one named.

    The classes and configs of its parts are looked through at once: the last part is loaded after minutes of work.

    Raises:
        UserError: no family handles it, and the message lists what is supported; or another does than the one named, or
            the family says why it does not; or see ``load_components``.
    """
    named = None if name is None else cast(Family, registry.load("families", name))
    family = _by_pipeline(source, name, named)
    pipeline = read_model_index(source)["_class_name"]
    if pipeline in family.REFUSED:
        raise UserError(f"{source.path} is {family.REFUSED[pipeline]} (model_index.json says {pipeline})")
    for _, part, part_class in part_classes(source, family):
        check_config(part_class, place_of(source, part))
    return family


def part_classes(source: ModelSource, family: Family) -> Iterator[tuple[Role, str, Any]]:
    """Role, name and class of every part that a pipeline has.

    Raises:
        UserError: one that it needs is missing, or is of a class that the family does not know.
    """
    index = read_model_index(source)
    for role, parts in family.PARTS.items():
        for part, allowed in parts.items():
            if not (part in family.OPTIONAL and _lacks(index, part)):
                yield role, part, _class(_entry(source, part, index), part, allowed, place_of(source, part))


def _by_pipeline(source: ModelSource, name: str | None, named: Family | None) -> Family:
    pipeline = read_model_index(source)["_class_name"]
    families = {known: cast(Family, registry.load("families", known)) for known in registry.names("families")}
    handled = {known: (*family.PIPELINES, *family.REFUSED) for known, family in families.items()}
    own = next((known for known, pipelines in handled.items() if pipeline in pipelines), None)
    if own is not None:
        if name not in (None, own):  # parts may be of the same classes, and be asked otherwise
            raise UserError(
                f"--family {name}: {source.path} is a {pipeline}, which is of the family {own}: leave the flag out"
            )
        return families[own]
    if named is not None:
        return named
    supported = "; ".join(f"{known}: {', '.join(family.PIPELINES)}" for known, family in families.items())
    raise UserError(
        f"{source.path} is a {pipeline}, which is not supported. Supported pipelines: {supported}. "
        f"--family chooses one all the same."
    )


def read_config(source: ModelSource, component: str) -> dict[str, Any]:
    """The config of a part without loading it; of the autoencoder that is used, if another one is given.

    Raises:
        UserError: it is missing, or cannot be read.
    """
    return configs.read_config(_config_file(source, component))


def read_sizes(source: ModelSource, component: str, key: str, most: int) -> tuple[int, ...]:
    """Whole numbers from 1 to ``most`` in the config of a part, of which there may be a list.

    Raises:
        UserError: it has none, or others.
    """
    file = _config_file(source, component)
    value = configs.read_config(file).get(key)
    sizes = value if isinstance(value, list) else [value]
    if not 1 <= len(sizes) <= MOST_SIZES or not all(type(size) is int and 1 <= size <= most for size in sizes):
        raise UnreadableError(file, f"{key}: expected sizes from 1 to {most} (got {shortened(value)})")
    return tuple(sizes)


MOST_SIZES = 16
"""In a list: levels of a network, or sides."""


def load_role(
    source: ModelSource,
    classes: Mapping[str, Classes],
    dtype: torch.dtype | None,
    optional: Collection[str],
    settings: Settings,
) -> Components:
    """What a family's ``load`` gives: the parts, as ``load_components`` has them, and the pipeline's settings.

    Args:
        settings: names and defaults of those that count.
    """
    return {**load_components(source, classes, dtype, optional), "settings": read_settings(source, settings)}


def read_settings(source: ModelSource, known: Settings) -> Settings:
    """What model_index.json says besides the parts.

    Args:
        source: the pipeline.
        known: names and defaults of what counts.

    Raises:
        UserError: a value is of another kind than its default.
    """
    index = read_model_index(source)
    settings = {name: index.get(name, default) for name, default in known.items()}
    for name, default in known.items():
        value = settings[name]
        problem = configs.problem_of(name, value) if name in index else None
        if name in index and not _is_such(value, default):
            problem = f"expected something such as {default!r} (got {shortened(value)})"
        if problem:
            raise UserError(f"{source.path}: {INDEX} says {name}: {problem}; download or export the model again")
    return {"_class_name": index["_class_name"], **settings}


def _is_such(value: Any, default: Any) -> bool:
    """Whether a setting is of the kind of its default; one that is none by default is none, a number or some."""
    if isinstance(value, list):
        return (default is None or isinstance(default, list | tuple)) and all(map(_is_number, value))
    if default is None or isinstance(default, float):
        return _is_number(value) or value is default
    return type(value) is type(default)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def load_components(
    source: ModelSource,
    classes: Mapping[str, Classes],
    dtype: torch.dtype | None,
    optional: Collection[str] = (),
) -> Components:
    """Parts of the pipeline by name; modules are frozen and in eval mode.

    Args:
        source: the pipeline.
        classes: of each part those that it can have (see ``Family.PARTS``).
        dtype: of modules.
        optional: parts that may be missing, and are None then.

    Raises:
        UserError: a part is missing, incomplete, of another class, only there as a pickle, or does not fit another.
    """
    index = read_model_index(source)
    disable_progress_bar()  # one bar per part, for what takes a second; downloads keep theirs
    parts = {
        name: None if name in optional and _lacks(index, name) else _load(source, name, index, allowed, dtype)
        for name, allowed in classes.items()
    }
    for name, part in parts.items():
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and tokenizer is not None and part is not None:
            check_vocabulary(tokenizer, part, source.path)
    return parts


def _load(source: ModelSource, name: str, index: dict[str, Any], allowed: Classes, dtype: torch.dtype | None) -> Any:
    place = place_of(source, name)
    part_class = _class(_entry(source, name, index), name, allowed, place)
    variant = source.variant if place.path == source.path else None
    part = load_part(part_class, place, Form(dtype, variant, source.allow_pickle))
    if name == SCHEDULER:
        return as_trained(part, source)
    if isinstance(part, PreTrainedTokenizerBase) and part.model_max_length > LARGE_INTEGER:
        encoder = name.replace("tokenizer", "text_encoder")
        if not _lacks(index, encoder):
            part.model_max_length = _positions(source, encoder) or part.model_max_length
    return part


def _positions(source: ModelSource, encoder: str) -> int | None:
    """What a tokenizer that names no limit, such as a tokenizer.json alone, has as its own: what its text encoder
    reads.
    """
    config = read_config(source, encoder)
    text = config.get("text_config")  # of one that sees as well
    positions = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return positions if type(positions) is int and positions > 0 else None


def place_of(source: ModelSource, component: str) -> Place:
    """Where a part lies; that of the other autoencoder, if one is given."""
    if component == "vae" and source.vae_path:
        folder = vae_file(source.vae_path).rpartition("/")[0]
        return Place(source.vae_path, source.vae_revision, source.cache_dir, folder)
    return Place(source.path, source.revision, source.cache_dir, component)


def _config_file(source: ModelSource, component: str) -> Path:
    return place_of(source, component).file(SCHEDULER_CONFIG if component == SCHEDULER else CONFIG)


def _entry(source: ModelSource, name: str, index: dict[str, Any]) -> Any:
    """What is said of a part's class: in model_index.json, or by another autoencoder itself."""
    if name == "vae" and source.vae_path:
        return ["diffusers", read_config(source, name).get("_class_name")]
    entry = index.get(name)
    if _lacks(index, name):
        raise UserError(f"{source.path}: the pipeline has no {name!r} in its {INDEX}; a complete pipeline is needed")
    if Path(source.path).is_dir() and not Path(source.path, name).is_dir():
        raise UserError(f"{source.path} is incomplete: no folder {name!r}, which its {INDEX} names; copy it again")
    return entry


def _lacks(index: dict[str, Any], name: str) -> bool:
    return index.get(name) in (None, [None, None])


def _class(entry: Any, name: str, allowed: Classes, place: Place) -> Any:
    """The class, of those that the family has for this part: others would load what nobody looked at."""
    named = ".".join(entry) if isinstance(entry, list) and all(map(_is_name, entry)) else None
    if named not in allowed:
        raise UserError(
            f"{place}: {shortened(named or str(entry))} is named as the class of {name!r}, where "
            f"{' or '.join(allowed)} is expected; is it a pipeline of this family, or has --family chosen another?"
        )
    library, _, class_name = named.partition(".")
    class_name = PROCESSORS.get(class_name, class_name)
    part_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name, None)
    if part_class is None:
        raise UserError(f"{place} needs {named}, which the installed {library} does not have; another version may")
    if isinstance(part_class, DummyObject):
        raise UserError(f"{place} needs {named}, which diffusers has only with {' and '.join(part_class._backends)}")
    return part_class


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isidentifier() and len(text) <= 100


def check_vocabulary(tokenizer: Any, encoder: Any, path: str) -> None:
    """Nothing, if a text encoder knows every token that its tokenizer can give it.

    Raises:
        UserError: it would be asked for others, or for more at once than it has positions.
    """
    known = encoder.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= known:
        raise UserError(
            f"{path}: the tokenizer has tokens up to {highest}, but its text encoder knows {known}: they do not belong "
            "together; download or export the model again"
        )
    config = encoder.config.get_text_config()
    # where positions are rotations there are endlessly many, and tokenizers of such models tell of more than the config
    positions = None if hasattr(config, "rope_parameters") else getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < tokenizer.model_max_length <= LARGE_INTEGER:  # more: it names no limit
        raise UserError(
            f"{path}: the tokenizer gives prompts of {tokenizer.model_max_length} tokens (model_max_length), but its "
            f"text encoder reads {positions}: they do not belong together; download or export the model again"
        )


_MAPPING = Schema(Annotated[dict[str, Any], Len(0, 1000)])
