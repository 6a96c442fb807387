"""Folders of PEFT's: read, as far as they are one, and written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file

from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.files import replacing_folder
from dreamlora.lora.formats import FileContent
from dreamlora.lora.formats.peft import CONFIG, CONFIG_BYTES, TENSORS
from dreamlora.reading import is_regular, utf8_text

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""Whose folders may lie in one: those of the denoiser in PEFT's own example, where each component has one."""


def is_peft_folder(path: Path) -> bool:
    """Whether a folder looks like one."""
    return any(is_regular(folder / CONFIG) for folder in _folders(path))


def read_peft(path: Path) -> FileContent:
    """All that a folder holds, as ``formats.peft`` has it. Never a pickle.

    Raises:
        UserError: tensors are missing, or no safetensors; a file is none, or too large.
    """
    content = FileContent({}, {})
    for folder in _folders(path):
        if not is_regular(folder / CONFIG):
            continue
        before = "" if folder == path else f"{folder.name}/"
        if not is_regular(folder / TENSORS):
            raise UserError(f"{folder} has a {CONFIG} and no {TENSORS}: only safetensors are read, never a pickle")
        content.metadata[before + CONFIG] = utf8_text(folder / CONFIG, CONFIG_BYTES)
        with open_tensors(folder / TENSORS) as opened:
            content.tensors.update({before + key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return content


def _folders(path: Path) -> Iterator[Path]:
    """The folder, and those of components in it."""
    yield path
    if path.is_dir():
        yield from (path / name for name in _COMPONENTS if (path / name).is_dir())


def write_peft(path: Path, content: FileContent) -> None:
    """Write such a folder, whole or not at all; one that is there is replaced.

    Args:
        path: may not exist yet.
        content: of ``formats.peft``.
    """
    with replacing_folder(path) as temporary:
        for name, text in content.metadata.items():
            before = name.removesuffix(CONFIG)
            tensors = {
                key.removeprefix(before): tensor.clone()  # safetensors refuses shared memory
                for key, tensor in content.tensors.items()
                if key.rpartition("/")[0] == before.removesuffix("/")
            }
            folder = temporary / before
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / TENSORS, {"format": "pt"})
            (folder / CONFIG).write_text(text, encoding="utf-8")
