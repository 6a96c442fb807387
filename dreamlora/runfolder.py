"""The run folder: where everything of a run lies on disk, and how it is written so that a kill leaves it readable.

No torch here: reports read run folders on machines without it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from dreamlora import registry, schemas
from dreamlora.cli.saved import saved_options
from dreamlora.errors import UserError, WriteError, numbers
from dreamlora.files import check_links_to, remove, remove_leftovers, write_atomically
from dreamlora.jsonl import append_jsonl, finite, lines_of, read_jsonl, rows_and_damage
from dreamlora.reading import Schema, UnreadableError, lies_inside, read_json, read_yaml, tell_once

LORA_FILE = "pytorch_lora_weights.safetensors"
TRAINABLES_FILE = "trainables.safetensors"
"""LoRA parameters by their names in the model, beside a LoRA file with diffusers' names."""
EMBEDDINGS = "embeddings"
"""Folder beside a LoRA file, with a file for each new token that was trained with it."""
METRICS_VERSION = 1

_JSON_BYTES = 2**22
"""Of a .json file of a run: the largest, summary.json, has some thousand, and the report shows all of its texts."""
_MOST_METRICS = 5000
"""Of a run that are read: each may have a row of a table, or a curve. Training logs some hundred."""
_NO_LOCKS = numbers("ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP", "EINVAL")
"""What network file systems without locks say."""
_STEP = re.compile(r"step-(\d{6}|[1-9]\d{6,14})", re.ASCII)
"""As ``checkpoint_dir`` writes it."""

Content = TypeVar("Content")

logger = logging.getLogger(__name__)


class RunFolder:
    """Names and small files of one run folder; see the README for what a person finds there."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.base_model_file = self.path / "base_model.json"
        self.images_file = self.path / "images.jsonl"
        self.outline_file = self.path / "outline.json"
        self.trackers_file = self.path / "trackers.json"
        self.summary_file = self.path / "summary.json"
        self.outcome_file = self.path / "outcome.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.eval_items_file = self.path / "eval_items.npz"
        self.raw_items_file = self.path / "eval_items_raw.npz"
        self.final_items_file = self.path / "eval_final_items.npz"
        self.range_test_file = self.path / "learning_rate_test.json"
        self.evalset_file = self.path / "evalset.json"
        self.evalset_tensors = self.path / "evalset.safetensors"
        self.final_evalset_file = self.path / "evalset_final.json"
        self.final_evalset_tensors = self.path / "evalset_final.safetensors"
        self.lora_file = self.path / LORA_FILE
        self.embeddings = self.path / EMBEDDINGS
        self.raw = self.path / "raw"
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
        self.conditioning_dir = self.path / "conditioning"
        self.report_html = self.path / "report.html"
        self.report_md = self.path / "report.md"
        self._started = time.monotonic()
        self._lock: FileLock | None = None

    def conditioning_file(self, digest: str) -> Path:
        """The image before an edit that samples were drawn from."""
        return self.conditioning_dir / f"{digest}.png"

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

    def config(self) -> dict[str, Any]:
        """The options that the run was made with (config.yaml), in the types of YAML.

        One whose value cannot be right is left out, which is told once.

        Raises:
            UserError: there is no run, or the file is damaged.
        """
        return _told(self._config())

    def selection(self) -> dict[str, Any]:
        """Which checkpoint lies in best/ and why (selection.json); empty if there is none."""
        return _told(self._found(self.selection_file, schemas.SELECTION))

    def range_test(self) -> dict[str, Any]:
        """How the learning rate was found (learning_rate_test.json); empty if it was given."""
        return _told(self._found(self.range_test_file, schemas.RANGE_TEST))

    def outcome(self) -> dict[str, Any]:
        """How the run ended (outcome.json); empty if that is not known."""
        return _told(self._found(self.outcome_file, schemas.OUTCOME))

    def base_model(self) -> dict[str, Any]:
        """What exactly was trained: id, and commits of the hub (base_model.json); empty if it was not noted."""
        return _told(self._found(self.base_model_file, schemas.BASE_MODEL))

    def outline(self) -> dict[str, str]:
        """What the run takes and does, in the words that it said before its first step; empty for older runs."""
        return _told(self._found(self.outline_file, schemas.OUTLINE))

    def trackers(self) -> dict[str, str]:
        """By which id each tracker knows the run (trackers.json); empty if none was asked for."""
        return _told(self._found(self.trackers_file, schemas.TRACKERS))

    def summary(self) -> dict[str, Any]:
        """What the run has come to (summary.json), as far as it is read again; empty if it has not ended."""
        return _told(self._found(self.summary_file, schemas.SUMMARY))

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl that can be read; a value that was not finite is None."""
        return _told(self._metrics())

    def sample_rows(self) -> list[dict[str, Any]]:
        """All rows of samples.jsonl that can be read."""
        return read_jsonl(self.samples_file, schemas.SAMPLE_ROW, self.path)

    def image_rows(self) -> list[dict[str, Any]]:
        """All rows of images.jsonl that can be read."""
        return read_jsonl(self.images_file, schemas.IMAGE_ROW, self.path)

    def damage(self) -> list[str]:
        """What cannot be read in the run's files and is left out, in sentences without a full stop."""
        objects = (self._found(file, schema)[1] for file, schema in self._objects)
        samples = (rows_and_damage(file, schemas.SAMPLE_ROW, self.path)[1] for file in self._sample_files)
        options = self._config()[1] if self.holds_run() else []
        return [*options, *(text for texts in objects for text in texts), *self._metrics()[1], *filter(None, samples)]

    @property
    def _objects(self) -> Sequence[tuple[Path, Schema]]:
        return (
            (self.summary_file, schemas.SUMMARY),
            (self.outcome_file, schemas.OUTCOME),
            (self.selection_file, schemas.SELECTION),
            (self.range_test_file, schemas.RANGE_TEST),
            (self.base_model_file, schemas.BASE_MODEL),
            (self.outline_file, schemas.OUTLINE),
            (self.trackers_file, schemas.TRACKERS),
        )

    @property
    def _row_files(self) -> Sequence[tuple[Path, Schema]]:
        return ((self.metrics_file, schemas.METRIC_ROW), *((file, schemas.SAMPLE_ROW) for file in self._sample_files))

    @property
    def _sample_files(self) -> Sequence[Path]:
        return self.samples_file, self.eval_images_file

    def _metrics(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows of the metrics that come first, and sentences about all else."""
        rows, damage = rows_and_damage(self.metrics_file, schemas.METRIC_ROW, self.path)
        texts = [damage] if damage else []
        names = list(dict.fromkeys(row["name"] for row in rows))
        if len(names) <= _MOST_METRICS:
            return rows, texts
        known = set(names[:_MOST_METRICS])
        texts.append(f"{self.metrics_file}: of {len(names):,} metrics all but {_MOST_METRICS:,} are left out")
        return [row for row in rows if row["name"] in known], texts

    def _config(self) -> tuple[dict[str, Any], list[str]]:
        try:
            content = read_yaml(self.config_file, schemas.OPTIONS, self.path)
        except FileNotFoundError:
            raise UserError(f"there is no run in {self.path}: config.yaml is missing") from None
        options, wrong = saved_options(content)
        return options, [f"{self.config_file}: {text}. It is left out" for text in wrong]

    def _found(self, file: Path, schema: Schema) -> tuple[dict[str, Any], list[str]]:
        """The fields of a .json file that fit, and sentences about all else; empty if there is no such file."""
        try:
            fields, wrong = schema.fitting(read_json(file, schemas.OBJECT, self.path, _JSON_BYTES))
        except FileNotFoundError:
            return {}, []
        except UnreadableError as error:
            return {}, [f"{error}. What it held is left out"]
        except ValueError as error:
            return {}, [f"cannot read {file}: {error}. What it held is left out"]
        return fields, [f"{file}: {text}. It is left out" for text in wrong]

    def sample_dir(self, step: int) -> Path:
        """``samples/step_000100``."""
        return self.samples / f"step_{step:06d}"

    def holds_run(self) -> bool:
        """Whether a run was started here before."""
        return self.config_file.exists()

    def holds_remains(self) -> bool:
        """Whether a run was made ready here that did not come to its first step: what it left belongs to no run."""
        trained = self.holds_run() or self.checkpoint_steps() or self.holds_result()
        return not trained and "model" in self.outline()

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
        named = [entry for entry in vars(self).values() if isinstance(entry, Path) and entry != self.path]
        return named + [self.exported(form) for form in registry.names("lora.formats")]

    def exported(self, form: str, place: Path | None = None) -> Path:
        """The LoRA in another program's format: ``<name of the run>_kohya.safetensors``; of PEFT's a folder.

        Args:
            form: the format.
            place: folder of the LoRA; None: the run's own.
        """
        end = "" if form == "peft" else ".safetensors"
        return (place or self.path) / f"{self.path.resolve().name}_{form}{end}"

    def refuse_links_out(self) -> None:
        """Nothing, if all that a run writes lies in its folder: what lies elsewhere is read by no report, and by no
        resume, since in a run of somebody else it could be anything of this machine.

        Raises:
            UserError: a folder in it is a link that leads out.
        """
        for entry in self.entries():
            if entry.is_symlink() and not entry.is_file() and not lies_inside(entry, self.path):
                raise UserError(
                    f"{entry} is a link that leads out of the run's folder, and what lies there would not be read "
                    f"again. Put the whole of {self.path} where there is room, or make it a link to such a place; or "
                    "remove this link"
                )

    def clear(self) -> None:
        """Remove what an earlier run wrote here (and nothing else that lies in the folder).

        What tells that there is something to remove goes last, so that a kill leaves it.
        """
        last = (self.config_file, self.outline_file)
        for entry in (*(entry for entry in self.entries() if entry not in last), *last):
            remove(entry)

    def log_all(self, step: int, values: Mapping[str, float], **more: Any) -> None:
        """Append values of one step to metrics.jsonl; ``more`` are fields such as ``n`` and ``evalset_id``."""
        common = {"v": METRICS_VERSION, "run": self.path.name, "step": step}
        common["wall_s"] = round(time.monotonic() - self._started, 3)
        rows = [{**common, "name": name, "value": value, **more} for name, value in values.items()]
        append_jsonl(self.metrics_file, [{name: finite(value) for name, value in row.items()} for row in rows])

    def forget_after(self, step: int) -> None:
        """Drop what a resumed run will write again: the metrics of later steps, and those that come at the end."""
        for file, schema in self._row_files:
            if file.exists():
                rows = read_jsonl(file, schema, self.path)
                known = [row for row in rows if row["step"] <= step and not row.get("at_end")]
                write_atomically(file, lines_of(known))
        for place in (self.samples, self.eval_images):
            for folder in place.glob("step_" + "[0-9]" * 6):
                if int(folder.name[5:]) > step:
                    remove(folder)
        remove(self.summary_file)


def _steps_in(place: Path) -> list[int]:
    """The steps of the folders in it, ascending."""
    found = (_STEP.fullmatch(folder.name) for folder in place.glob("step-*"))
    return sorted(int(name[1]) for name in found if name)


def _told(read: tuple[Content, list[str]]) -> Content:
    """What was read; what was left out is told once."""
    content, damage = read
    for text in damage:
        tell_once(text)
    return content
