"""The run folder: where everything of a run lies on disk, and how it is written so that a kill leaves it readable.

No torch here: reports read run folders on machines without it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from dreamlora.errors import UserError

METRICS_VERSION = 1
ADOPTED = (
    *("metrics_file", "eval_items_file", "final_items_file", "candidates"),
    *("samples", "eval_images", "reference_dir"),
)
"""What a run takes over that goes on from another's checkpoint."""


class RunFolder:
    """Names and small files of one run folder; see the README for what a person finds there."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.base_model_file = self.path / "base_model.json"
        self.summary_file = self.path / "summary.json"
        self.outcome_file = self.path / "outcome.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.eval_items_file = self.path / "eval_items.npz"
        self.final_items_file = self.path / "eval_final_items.npz"
        self.evalset_file = self.path / "evalset.json"
        self.evalset_tensors = self.path / "evalset.safetensors"
        self.final_evalset_file = self.path / "evalset_final.json"
        self.final_evalset_tensors = self.path / "evalset_final.safetensors"
        self.lora_file = self.path / "pytorch_lora_weights.safetensors"
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
        self._lock: TextIO | None = None

    def checkpoint_dir(self, step: int) -> Path:
        """``checkpoints/step-000100``."""
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending. Unfinished ones have temporary names and are not listed."""
        return sorted(int(folder.name[5:]) for folder in self.checkpoints.glob("step-*") if folder.name[5:].isdigit())

    def candidate_dir(self, step: int) -> Path:
        """``checkpoints/candidates/step-000100``."""
        return self.candidates / f"step-{step:06d}"

    def candidate_steps(self) -> list[int]:
        """Steps whose weights are kept because they are or may become the best, ascending."""
        return sorted(int(folder.name[5:]) for folder in self.candidates.glob("step-*") if folder.name[5:].isdigit())

    def selection(self) -> dict[str, Any]:
        """Which checkpoint lies in best/ and why (selection.json); empty if there is none.

        Raises:
            UserError: the file is damaged.
        """
        return _read_json(self.selection_file)

    def base_model(self) -> dict[str, Any]:
        """What exactly was trained: id, and commits of the hub (base_model.json); empty if it was not noted.

        Raises:
            UserError: the file is damaged.
        """
        return _read_json(self.base_model_file)

    def sample_dir(self, step: int) -> Path:
        """``samples/step_000100``."""
        return self.samples / f"step_{step:06d}"

    def holds_run(self) -> bool:
        """Whether a run was started here before."""
        return self.config_file.exists()

    def lock(self) -> None:
        """Claim the folder for this process until it ends.

        Raises:
            UserError: another process trains into it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is training into {self.path}: wait for it, or give another --output_dir"
            ) from None

    def release(self) -> None:
        """Give the folder free again, if this process holds it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Remove what an earlier run wrote here (and nothing else that lies in the folder)."""
        for entry in vars(self).values():
            if isinstance(entry, Path) and entry != self.path:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)

    def log_all(self, step: int, values: Mapping[str, float], **more: Any) -> None:
        """Append values of one step to metrics.jsonl; ``more`` are fields such as ``n`` and ``evalset_id``."""
        common = {"v": METRICS_VERSION, "run": self.path.name, "step": step}
        common["wall_s"] = round(time.monotonic() - self._started, 3)
        rows = [
            {**common, "name": name, "value": value if math.isfinite(value) else None, **more}
            for name, value in values.items()
        ]
        with self.metrics_file.open("a") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a last line cut off by a kill is left out."""
        return list(read_jsonl(self.metrics_file))

    def forget_after(self, step: int) -> None:
        """Drop what a resumed run will write again: the metrics of later steps, and those that come at the end."""
        for file in (self.metrics_file, self.samples_file, self.eval_images_file):
            if file.exists():
                known = [row for row in read_jsonl(file) if row["step"] <= step and not row.get("at_end")]
                rows = [json.dumps(row) + "\n" for row in known]
                write_atomically(file, "".join(rows))
        for place in (self.samples, self.eval_images):
            for folder in place.glob("step_" + "[0-9]" * 6):
                if int(folder.name[5:]) > step:
                    shutil.rmtree(folder)

    def adopt(self, other: RunFolder) -> None:
        """Take over what another run measured and drew, to go on from one of its checkpoints."""
        for name in ADOPTED:
            theirs, ours = getattr(other, name), getattr(self, name)
            if theirs.is_dir():
                shutil.copytree(theirs, ours, dirs_exist_ok=True)
            elif theirs.exists():
                shutil.copy2(theirs, ours)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"cannot read {file}: {error}") from None
    return found if isinstance(found, dict) else {}


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file that are whole."""
    if not file.exists():
        return
    with file.open() as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return  # a kill in the middle of the last line


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path beside ``file`` to write to; it takes the file's place at the end, or vanishes on an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # process ids are not enough: containers that share a folder often have the same ones
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp{file.suffix}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder: at any moment it is whole or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())  # else a power cut could leave a renamed folder of empty files
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def write_atomically(file: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a half."""
    with replacing(file) as temporary:
        temporary.write_text(text)
