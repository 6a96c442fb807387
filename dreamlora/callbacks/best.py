"""Which checkpoint is best: its LoRA and the reason lie in best/ at any time of the run."""

from __future__ import annotations

import json
import logging

from safetensors.torch import save_file

from dreamlora.callbacks.image_metrics import ImageMetricsCallback
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.eval_loss.selection import Selection, candidates, select
from dreamlora.files import remove, replacing, replacing_folder, write_atomically
from dreamlora.interfaces import StepResult
from dreamlora.lora.embeddings import file_of, files_beside
from dreamlora.metric_names import name_of_step_0
from dreamlora.reading import is_regular
from dreamlora.runfolder import TRAINABLES_FILE
from dreamlora.training import state
from dreamlora.training.adoption import copy
from dreamlora.training.loop import Run

logger = logging.getLogger(__name__)


class BestCallback:
    """Selects anew after every measurement and keeps the weights of the few steps that may yet be selected.

    Everything follows from the losses up to a step, and weights that a checkpoint would need again are kept as long as
    the checkpoint; so a resumed run selects what the uninterrupted one selects. All work is the main process's.

    Args:
        losses: of the evaluation, which comes before this callback.
        metric: their name.
        images: what the metrics of images have to say; None if there are none.
    """

    def __init__(self, losses: ItemLosses, metric: str, images: ImageMetricsCallback | None = None) -> None:
        self._losses = losses
        self._metric = metric
        self._images = images
        self._lost: set[int] = set()

    def on_start(self, run: Run) -> None:
        """After a resume: put best/ back to what it was at this step."""
        if not run.accelerator.is_main_process:
            return
        for step in run.folder.candidate_steps():
            if step > run.step:
                remove(run.folder.candidate_dir(step))
        there = {step for step in run.folder.candidate_steps() if _is_whole(run, step)}
        while missing := set(self._candidates()) - there:
            logger.warning("the weights of step %d are gone: it cannot become the best checkpoint", min(missing))
            self._lost |= missing
        self._select(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Select anew if this step was measured."""
        if run.accelerator.is_main_process and run.step in self._losses:
            if run.step in self._candidates():
                self._keep(run)
            self._select(run)
            self._forget(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step was measured."""

    def _vetoes(self) -> dict[int, str]:
        return self._images.vetoes(self._losses.steps) if self._images else {}

    def _candidates(self, until: int | None = None) -> list[int]:
        return candidates(self._losses, self._vetoes(), self._lost, until)

    def _keep(self, run: Run) -> None:
        """Write the LoRA, as stock pipelines load it and as it is in training."""
        with replacing_folder(run.folder.candidate_dir(run.step)) as temporary:
            state.save_lora(run, temporary)
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in run.trainables.items()}
            with replacing(temporary / TRAINABLES_FILE) as file:
                save_file(tensors, file)

    def _select(self, run: Run) -> None:
        folder, base = run.folder, name_of_step_0(run.config.lora.init_lora)
        selection = select(self._losses, self._metric, self._vetoes(), self._lost, base)
        if selection is None:
            remove(folder.best)
            return
        facts = {**selection.facts, "best_product": self._images.compromise() if self._images else None}
        text = json.dumps(facts, indent=1, allow_nan=False)
        if _lies_there(run, selection):
            write_atomically(folder.selection_file, text)
            return
        with replacing_folder(folder.best) as temporary:
            lora = folder.lora_file.name
            candidate = folder.candidate_dir(selection.step)
            for file in (candidate / lora, *files_beside(candidate / lora)):
                copy(file, temporary / file.relative_to(candidate), candidate)
            write_atomically(temporary / folder.selection_file.name, text)

    def _forget(self, run: Run) -> None:
        """Remove weights that neither the run nor a checkpoint can still select, one that a signal makes included."""
        saved = [*run.folder.checkpoint_steps(), *(run.fallback or ())[:1]]
        needed = set(self._candidates()).union(*(self._candidates(step) for step in saved))
        for step in set(run.folder.candidate_steps()) - needed:
            remove(run.folder.candidate_dir(step))


def _lies_there(run: Run, selection: Selection) -> bool:
    """Whether best/ holds this step's LoRA already; after a resume it may hold the same step of another course."""
    if run.folder.selection().get("step") != selection.step:
        return False
    best, candidate = run.folder.best, run.folder.candidate_dir(selection.step)
    wanted = [candidate / run.folder.lora_file.name, *files_beside(candidate / run.folder.lora_file.name)]
    pairs = [(best / file.relative_to(candidate), file) for file in wanted]
    return all(is_regular(there, best) and there.read_bytes() == file.read_bytes() for there, file in pairs)


def _is_whole(run: Run, step: int) -> bool:
    """Whether the weights of a candidate are there, as regular files: the folder may have been somebody else's."""
    place = run.folder.candidate_dir(step)
    tokens = (file_of(place, new.token) for new in run.config.tokens.tokens)
    files = (place / run.folder.lora_file.name, place / TRAINABLES_FILE, *tokens)
    return all(is_regular(file, place) for file in files)
