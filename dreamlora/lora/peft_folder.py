"""Folders of PEFT's: read, as far as they are one, and written."""

from __future__ import annotations

from pathlib import Path

from dreamlora.errors import UserError
from dreamlora.files import replacing, replacing_folder, write_atomically
from dreamlora.lora.formats import FileContent
from dreamlora.lora.formats.peft import CONFIG, CONFIG_BYTES, TENSORS
from dreamlora.lora.metadata import serialised
from dreamlora.reading import is_regular, utf8_text

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""Whose folders may lie in one: those of the denoiser in PEFT's own example, where each component has one."""


def tensors_in(path: Path) -> dict[str, Path]:
    """Files of tensors by what stands before their keys in ``formats.peft``; empty: it is no such folder.

    Args:
        path: a folder, or its first file of tensors, which stands for all of it.

    Raises:
        UserError: there are settings without tensors, or with a pickle of them.
    """
    if path.is_file():
        return tensors_in(path.parent) if path.name == TENSORS else {}
    found = {}
    for name in ("", *_COMPONENTS):
        folder = path / name
        if not is_regular(folder / CONFIG):
            continue
        if not is_regular(folder / TENSORS):
            raise UserError(f"{folder} has a {CONFIG} and no {TENSORS}: only safetensors are read, never a pickle")
        found[name and f"{name}/"] = folder / TENSORS
    return found


def settings_beside(file: Path, before: str) -> dict[str, str]:
    """The settings of a file of tensors, as metadata of ``formats.peft``; empty: it has none.

    Args:
        file: of tensors.
        before: see ``tensors_in``.

    Raises:
        UserError: they are no text, or too long.
    """
    beside = file.parent / CONFIG
    return {before + CONFIG: utf8_text(beside, CONFIG_BYTES)} if file.name == TENSORS and is_regular(beside) else {}


def write_peft(path: Path, content: FileContent) -> None:
    """Write such a folder, whole or not at all; one that is there is replaced.

    Args:
        path: may not exist yet.
        content: of ``formats.peft``.
    """
    with replacing_folder(path) as folder:
        own = {name: text for name, text in content.metadata.items() if name.endswith(CONFIG)}
        header = {name: text for name, text in content.metadata.items() if name not in own}
        for name, text in own.items():
            before = name.removesuffix(CONFIG)
            tensors = {
                key.removeprefix(before): tensor.clone()  # safetensors refuses shared memory
                for key, tensor in content.tensors.items()
                if key.rpartition("/")[0] == before.removesuffix("/")
            }
            with replacing(folder / before / TENSORS) as temporary:
                temporary.write_bytes(serialised(tensors, header))
            write_atomically(folder / before / CONFIG, text)
