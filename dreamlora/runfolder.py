"""The run folder: where everything of a run lies on disk, and how it is written so that a kill leaves it readable.

No torch here: reports read run folders on machines without it.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dreamlora.errors import UserError, WriteError, numbers
from dreamlora.files import check_links_to, open_at_end, remove, remove_leftovers, write_atomically, writing

LORA_FILE = "pytorch_lora_weights.safetensors"
TRAINABLES_FILE = "trainables.safetensors"
"""LoRA parameters by their names in the model, beside a LoRA file with diffusers' names."""
METRICS_VERSION = 1
METRIC_FIELDS: Mapping[str, tuple[type, ...]] = {
    "step": (int,),
    "name": (str,),
    "value": (int, float, type(None)),
}
"""What every row of metrics.jsonl has, and its types."""
SAMPLE_FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "prompt_index", "image_index", "seed"), (int,)),
    **dict.fromkeys(("prompt", "file"), (str,)),
}
"""The same of samples.jsonl."""

_NO_LOCKS = numbers("ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP", "EINVAL")
"""What network file systems without locks say."""
_NAMED = 5
_STEP = re.compile(r"step-(\d{6}|[1-9]\d{6,14})", re.ASCII)
"""As ``checkpoint_dir`` writes it."""

logger = logging.getLogger(__name__)


class RunFolder:
    """Names and small files of one run folder; see the README for what a person finds there."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.base_model_file = self.path / "base_model.json"
        self.images_file = self.path / "images.jsonl"
        self.outline_file = self.path / "outline.json"
        self.summary_file = self.path / "summary.json"
        self.outcome_file = self.path / "outcome.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.eval_items_file = self.path / "eval_items.npz"
        self.final_items_file = self.path / "eval_final_items.npz"
        self.evalset_file = self.path / "evalset.json"
        self.evalset_tensors = self.path / "evalset.safetensors"
        self.final_evalset_file = self.path / "evalset_final.json"
        self.final_evalset_tensors = self.path / "evalset_final.safetensors"
        self.lora_file = self.path / LORA_FILE
        self.best = self.path / "best"
        self.selection_file = self.best / "selection.json"
        self.candidates = self.path / "checkpoints" / "candidates"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.samples_file = self.samples / "samples.jsonl"
        self.eval_images = self.path / "eval_images"
        self.eval_images_file = self.eval_images / "samples.jsonl"
        self.grid_file = self.path / "grid.png"
        self.timelapse_file = self.path / "timelapse.webp"
        self.instance_images = self.path / "instance_images"
        self.reference_dir = self.path / "references"
        self.report_html = self.path / "report.html"
        self.report_md = self.path / "report.md"
        self._started = time.monotonic()
        self._lock: FileLock | None = None

    def checkpoint_dir(self, step: int) -> Path:
        """``checkpoints/step-000100``."""
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending. Unfinished ones have temporary names and are not listed."""
        return _steps_in(self.checkpoints)

    def candidate_dir(self, step: int) -> Path:
        """``checkpoints/candidates/step-000100``."""
        return self.candidates / f"step-{step:06d}"

    def candidate_steps(self) -> list[int]:
        """Steps whose weights are kept because they are or may become the best, ascending."""
        return _steps_in(self.candidates)

    def selection(self) -> dict[str, Any]:
        """Which checkpoint lies in best/ and why (selection.json); empty if there is none."""
        found = found_json(self.selection_file)
        if found and not isinstance(found.get("step"), int):
            tell_once(f"cannot read {self.selection_file}: it names no step. What it held is left out")
            return {}
        return found

    def config(self) -> dict[str, Any]:
        """The options that the run was made with (config.yaml).

        Raises:
            UserError: there is no run, or the file is damaged.
        """
        try:
            content = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"there is no run in {self.path}: config.yaml is missing") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {self.config_file}: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"cannot read {self.config_file}: it holds no options")
        return content

    def outcome(self) -> dict[str, Any]:
        """How the run ended (outcome.json); empty if that is not known."""
        return found_json(self.outcome_file)

    def base_model(self) -> dict[str, Any]:
        """What exactly was trained: id, and commits of the hub (base_model.json); empty if it was not noted.

        Raises:
            UserError: the file is damaged.
        """
        return read_json(self.base_model_file)

    def sample_dir(self, step: int) -> Path:
        """``samples/step_000100``."""
        return self.samples / f"step_{step:06d}"

    def holds_run(self) -> bool:
        """Whether a run was started here before."""
        return self.config_file.exists()

    def holds_result(self) -> bool:
        """Whether a training ended here, or had begun to write what it made."""
        return self.summary_file.exists() or self.lora_file.exists()

    def lock(self) -> None:
        """Claim the folder for this process until it ends. Where there are no locks, that is told and nothing claimed.

        Raises:
            UserError: another process trains into it, or it cannot be written to or locked.
        """
        # the system's own lock, which ends with the process: a file that stands for a lock would outlive a kill
        lock = FileLock(self.path / ".lock", fallback_to_soft=False)
        try:
            check_links_to(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is training into {self.path}: wait for it, or give another --output_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise WriteError.of(self.path, error, "Mend that, or give another --output_dir") from error
            logger.warning(
                "the file system of %s has no locks (%s): nothing will keep a second process from training into it",
                self.path,
                error.strerror,
            )
            return
        self._lock = lock
        remove_leftovers(self.path)  # nobody else trains into it

    def release(self) -> None:
        """Give the folder free again, if this process holds it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def named_checkpoint(self, name: str) -> Path:
        """The folder of a checkpoint: a path, or the name of one in checkpoints/.

        Raises:
            UserError: there is none; the message lists those that are there.
        """
        for path in (Path(name), self.checkpoints / name):
            if path.is_dir() and path != self.checkpoints:
                return path
        names = ", ".join(self.checkpoint_dir(step).name for step in self.checkpoint_steps()) or "none"
        raise UserError(f"--resume_from_checkpoint {name}: no checkpoint there. In {self.checkpoints}: {names}")

    def entries(self) -> list[Path]:
        """All files and folders that a run may write here."""
        return [entry for entry in vars(self).values() if isinstance(entry, Path) and entry != self.path]

    def clear(self) -> None:
        """Remove what an earlier run wrote here (and nothing else that lies in the folder)."""
        for entry in self.entries():
            remove(entry)

    def log_all(self, step: int, values: Mapping[str, float], **more: Any) -> None:
        """Append values of one step to metrics.jsonl; ``more`` are fields such as ``n`` and ``evalset_id``."""
        common = {"v": METRICS_VERSION, "run": self.path.name, "step": step}
        common["wall_s"] = round(time.monotonic() - self._started, 3)
        rows = [{**common, "name": name, "value": value, **more} for name, value in values.items()]
        append_jsonl(self.metrics_file, [{name: _finite(value) for name, value in row.items()} for row in rows])

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl that can be read; a value that was not finite is None."""
        return read_jsonl(self.metrics_file, METRIC_FIELDS)

    def damage(self) -> list[str]:
        """What cannot be read in the files of rows, a sentence for each such file."""
        damaged_lines = ((file, _parsed(file, fields)[1]) for file, fields in self._row_files)
        return [_damage(file, numbers) for file, numbers in damaged_lines if numbers]

    @property
    def _row_files(self) -> Sequence[tuple[Path, Mapping[str, tuple[type, ...]]]]:
        samples = (self.samples_file, self.eval_images_file)
        return ((self.metrics_file, METRIC_FIELDS), *((file, SAMPLE_FIELDS) for file in samples))

    def forget_after(self, step: int) -> None:
        """Drop what a resumed run will write again: the metrics of later steps, and those that come at the end."""
        for file, fields in self._row_files:
            if file.exists():
                known = [row for row in read_jsonl(file, fields) if row["step"] <= step and not row.get("at_end")]
                write_atomically(file, _lines(known))
        for place in (self.samples, self.eval_images):
            for folder in place.glob("step_" + "[0-9]" * 6):
                if int(folder.name[5:]) > step:
                    remove(folder)
        remove(self.summary_file)


def _steps_in(place: Path) -> list[int]:
    """The steps of the folders in it, ascending."""
    found = (_STEP.fullmatch(folder.name) for folder in place.glob("step-*"))
    return sorted(int(name[1]) for name in found if name)


def read_jsonl(file: Path, fields: Mapping[str, tuple[type, ...]] = SAMPLE_FIELDS) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none if it is missing. Lines that are no such rows are left out, and told once.

    Args:
        file: to read: rows of samples, or what ``fields`` says.
        fields: that every row must have, and the types of each.
    """
    rows, damaged = _parsed(file, fields)
    if damaged:
        tell_once(_damage(file, damaged))
    return rows


def append_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows, on lines of their own: a kill may have left half a line, which would spoil the next row too.

    Raises:
        WriteError: the system refused.
    """
    with writing(file), open_at_end(file) as target:
        if target.tell():
            target.seek(-1, os.SEEK_END)
            if target.read(1) != b"\n":
                target.write(b"\n")
        target.write(_lines(rows).encode())


def read_json(file: Path) -> dict[str, Any]:
    """The object in a .json file; empty if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {file}: it holds a {type(content).__name__} instead of an object")
    return content


def found_json(file: Path) -> dict[str, Any]:
    """The same of a file that can be done without: a damaged one counts as none, which is told once."""
    try:
        return read_json(file)
    except UserError as error:
        tell_once(f"{error}. What it held is left out")
        return {}


def _parsed(file: Path, fields: Mapping[str, tuple[type, ...]]) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows that have the fields, and the numbers of all other lines.

    Blank lines are neither, nor is the beginning of a last line, which is what a kill leaves.
    """
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    if not file.exists():
        return rows, damaged
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = _row(line, fields)
            if row is not None:
                rows.append(row)
            elif line.strip() and line.endswith(b"\n"):
                damaged.append(number)
    return rows, damaged


def _row(line: bytes, fields: Mapping[str, tuple[type, ...]]) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except ValueError:  # also of bytes that are no UTF-8
        return None
    if not isinstance(row, dict) or not all(name in row and isinstance(row[name], fields[name]) for name in fields):
        return None
    return {name: _finite(value) for name, value in row.items()}


def _finite(value: Any) -> Any:
    """None for a number that is not finite, which is no JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _damage(file: Path, numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"{file}: line {numbers[0]} cannot be read and is left out"
    named = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"{file}: lines {named}{more} cannot be read and are left out"


@functools.cache
def tell_once(text: str) -> None:
    """Warn of something that is read, and found damaged, again and again."""
    logger.warning(text)
