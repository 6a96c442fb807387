"""Which file is meant: a file, the one in a folder, or that of a run and what else the run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dreamlora.errors import UserError
from dreamlora.reading import is_regular, read_json
from dreamlora.runfolder import EMBEDDINGS, LORA_FILE, RunFolder
from dreamlora.schemas import OBJECT

PEFT_TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CONFIG_BYTES = 2**20
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


class InspectedFile(NamedTuple):
    """Where the file lies.

    Attributes:
        file: to be read.
        inside: a folder of a run that no link may lead out of; None: any link is followed.
        run: what the run has, if it is one's.
        settings: of PEFT's adapter_config.json beside it.
    """

    file: Path
    inside: Path | None = None
    run: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None


def file_of(path: Path) -> InspectedFile:
    """The file that a path stands for.

    Raises:
        UserError: there is none, or several; the message says what to give instead.
    """
    if path.is_dir():
        return _in_run(RunFolder(path)) if RunFolder(path).holds_run() else _in_folder(path)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.suffix.lower() in _PICKLES:
        raise UserError(
            f"{path}: only .safetensors files are read, as pickles can run any code while they load. Somebody whom "
            "you trust can convert it"
        )
    return InspectedFile(path, settings=_peft_settings(path))


def _in_folder(folder: Path) -> InspectedFile:
    for name in (LORA_FILE, PEFT_TENSORS):
        if is_regular(folder / name):
            return InspectedFile(folder / name, settings=_peft_settings(folder / name))
    files = sorted(file for file in folder.glob("*.safetensors") if is_regular(file))
    if len(files) == 1:
        return InspectedFile(files[0])
    if (folder / "model_index.json").exists():
        raise UserError(f"{folder} is a whole model in diffusers' format: see `dreamlora doctor {folder}`")
    names = ", ".join(file.name for file in files[:10]) or "none"
    raise UserError(f"{folder}: which file? Its .safetensors are {names}: name one")


def _peft_settings(file: Path) -> dict[str, Any] | None:
    """PEFT's settings beside its tensors."""
    config = file.parent / PEFT_CONFIG
    if file.name != PEFT_TENSORS or not is_regular(config):
        return None
    settings: dict[str, Any] = read_json(config, OBJECT, most=_CONFIG_BYTES)
    return settings


def _in_run(run: RunFolder) -> InspectedFile:
    selection = run.selection()
    about: dict[str, Any] = {
        "folder": str(run.path),
        "result": run.lora_file.is_file(),
        "best": None,
        "checkpoints": run.checkpoint_steps(),
        "candidates": run.candidate_steps(),
        "embeddings": sorted(file.stem for file in (run.path / EMBEDDINGS).glob("*.safetensors")),
    }
    best = run.best / LORA_FILE
    if best.is_file():
        about["best"] = {"file": str(best), "step": selection.get("step"), "metric": selection.get("metric")}
    raw = run.raw / LORA_FILE
    about["raw"] = str(raw) if raw.is_file() else None
    checkpoints = [run.checkpoint_dir(step) / LORA_FILE for step in reversed(about["checkpoints"])]
    file = next((file for file in (run.lora_file, best, *checkpoints) if file.is_file()), None)
    if file is None:
        raise UserError(
            f"{run.path} is a run without a LoRA yet: it has no checkpoint. See `dreamlora report {run.path}`"
        )
    return InspectedFile(file, run.path, about)
