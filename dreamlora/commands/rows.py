"""Which LoRAs ``sample`` and ``evaluate`` put into the base model: one row of a grid or table each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.commands.trained import TrainedRun, run_of
from dreamlora.errors import UserError
from dreamlora.lora.embeddings import files_beside
from dreamlora.lora.files import read_lora, same_lora
from dreamlora.runfolder import RunFolder


@dataclass(frozen=True)
class Row:
    """One row: a LoRA at a scale, and the run that it is from, if that is known; the base model if ``lora`` is None.

    Embeddings are those of new tokens that belong to the LoRA, and have no scale.
    """

    label: str
    lora: Path | None = None
    scale: float = 0.0
    run: TrainedRun | None = None

    @property
    def embeddings(self) -> list[Path]:
        """Files of the new tokens that were trained with the LoRA."""
        return files_beside(self.lora) if self.lora else []


def rows_of(config: SampleConfig) -> list[Row]:
    """The base model, then every LoRA at every scale; run folders give their checkpoints if that is asked for.

    Raises:
        UserError: a LoRA is missing or damaged.
    """
    rows = [Row("base model")]
    for path in config.lora:
        run = run_of(path, config.trust_runs)
        for label, file in _files_of(path, config):
            for scale in config.lora_scales:
                rows.append(Row(label if scale == 1 else f"{label}\nscale {scale:g}", file, scale, run))
    return rows


def _files_of(path: Path, config: SampleConfig) -> list[tuple[str, Path]]:
    """LoRA files of one ``--lora`` with their labels; a final LoRA that equals the last checkpoint is left out."""
    run = RunFolder(path)
    steps = run.checkpoint_steps() if config.checkpoints else []
    name = path.resolve().stem if path.is_file() else path.resolve().name
    files = [(f"{name}\nstep {step:,}", read_lora(run.checkpoint_dir(step)).path) for step in steps]
    if config.best and run.holds_run():
        files.append(_best_of(run, name))
    elif run.path.name == "best" and (parent := RunFolder(path.resolve().parent)).selection():
        return [_best_of(parent, parent.path.name)]
    if steps and not run.lora_file.exists():  # a run that is not finished
        return files
    final = read_lora(path).path
    if not steps or not same_lora(final, files[len(steps) - 1][1]):
        files.append((f"{name}\nfinal" if files else name, final))
    return files


def _best_of(run: RunFolder, name: str) -> tuple[str, Path]:
    step = run.selection().get("step")
    if step is None:
        raise UserError(f"--best: no checkpoint was selected in {run.path} (nothing in {run.selection_file})")
    return f"{name}\nbest: step {step:,}", read_lora(run.best).path
