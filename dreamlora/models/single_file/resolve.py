"""From a single file to the folder that is loaded, and the name that caches know it by."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

import diffusers

from dreamlora.errors import UserError
from dreamlora.models.configs import arguments_for, read_config
from dreamlora.models.fingerprint import file_fingerprint
from dreamlora.models.single_file import cache
from dreamlora.models.single_file.contents import read_contents
from dreamlora.models.single_file.conversion import write_autoencoder, write_pipeline
from dreamlora.models.single_file.kinds import prediction_of, recognize
from dreamlora.models.single_file.others import check_autoencoder
from dreamlora.reading import tell_once

logger = logging.getLogger(__name__)

VERSION = "1"
"""Of the conversion: to be raised whenever the same file gives another folder."""


class ConvertedFile(NamedTuple):
    """A folder made of a file.

    Attributes:
        folder: in diffusers' format.
        id: the same for every copy of the file, wherever it lies.
    """

    folder: Path
    id: str


def pipeline_of(file: Path, cache_dir: Path | None, prediction_type: str | None = None) -> ConvertedFile:
    """The pipeline in a file, as a folder.

    Args:
        file: of a whole model.
        cache_dir: where models are kept.
        prediction_type: that the run asks for, so that a guess does not matter.

    Raises:
        UserError: it is no model of a known kind, or see ``cache.kept``.
    """
    contents = read_contents(file)
    kind = recognize(contents)
    prediction = prediction_of(contents, kind)
    if prediction.note and prediction_type is None:
        tell_once(prediction.note)
    digest = file_fingerprint(file, VERSION)
    folder = cache.kept(file, digest, cache_dir, lambda own: write_pipeline(contents, kind, prediction, own))
    return ConvertedFile(folder, f"{kind.pipeline}@{digest}")


def autoencoder_of(file: Path, replaced: Path, cache_dir: Path | None) -> ConvertedFile:
    """The autoencoder in a file, as a folder.

    Args:
        file: of an autoencoder or of a whole model.
        replaced: the config of the model's own: the scale of latents, which no file has, is taken from it.
        cache_dir: where models are kept.

    Raises:
        UserError: it is none, or none that fits the model; or see ``cache.kept``.
    """
    contents = read_contents(file)
    check_autoencoder(contents)
    config = read_config(replaced)
    name = config.get("_class_name")
    module_class = getattr(diffusers, name, None) if isinstance(name, str) and "Autoencoder" in name else None
    if module_class is None:
        raise UserError(f"{replaced} names no autoencoder of diffusers, so {file} cannot take its place")
    arguments = arguments_for(module_class, replaced)
    digest = file_fingerprint(file, VERSION, json.dumps([name, arguments], sort_keys=True))
    folder = cache.kept(
        file,
        digest,
        cache_dir,
        lambda own: write_autoencoder(
            contents, {"_class_name": name, **arguments}, lambda: module_class.from_config(arguments), own
        ),
    )
    return ConvertedFile(folder, f"{name}@{digest}")
