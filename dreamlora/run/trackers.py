"""Trackers of a run, from the question whether they can be used to their last word."""

from __future__ import annotations

import json
import os
import secrets
from typing import Any

from accelerate.tracking import get_available_trackers

from dreamlora.callbacks.trackers import VALIDATION, Beginning, tracker_of
from dreamlora.cli.local_places import without_places
from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.credentials import is_secret, masked_options
from dreamlora.errors import UserError
from dreamlora.files import make_folder, write_atomically
from dreamlora.reading import lies_inside
from dreamlora.report import shared_report
from dreamlora.run.context import RunContext
from dreamlora.runfolder import RunFolder

PROJECT = "dreamlora"
"""What trackers put all runs of this program into, unless told otherwise."""


def check_tracker(config: RunConfig) -> None:
    """Whether the tracker that was asked for can be used.

    Raises:
        UserError: it is not installed, or would have to ask for a login.
    """
    tracker = config.train.report_to
    known = [str(kind) for kind in get_available_trackers()]
    if tracker not in (None, "all", *known):
        raise UserError(
            f"--report_to {tracker}: no tracker that is installed. Installed: {', '.join(known) or 'none'}. "
            f"pip install {'comet-ml' if tracker == 'comet_ml' else tracker} installs it"
        )
    if tracker == "wandb":
        import wandb

        offline = wandb.setup().settings.mode in ("offline", "disabled", "dryrun")
        if not offline and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "--report_to wandb: nobody is logged in to wandb. Run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE=offline and send the run later with `wandb sync`"
            )


def start(context: RunContext, folder: RunFolder, step: int) -> None:
    """Start what --report_to asks for; before a resumed run's later metrics are dropped, which trackers got already.

    Args:
        context: of the run; it and its accelerator have the trackers from now on.
        folder: of the run.
        step: that the run goes on from.
    """
    train = context.config.train
    names = [str(kind) for kind in context.accelerator.log_with]
    if not names or not context.accelerator.is_main_process:
        return
    project = train.tracker_project_name or PROJECT
    run_name = train.tracker_run_name or folder.path.resolve().name
    place = folder.path / train.logging_dir
    if not lies_inside(place, folder.path):  # a place for several runs
        place /= run_name
    make_folder(place / project)
    before = folder.trackers() if step else {}
    ids = {name: before.get(name) or secrets.token_hex(4) for name in names}
    sent = {(row["step"], row["name"]) for row in folder.metrics()}
    sent |= {(row["step"], VALIDATION) for row in folder.sample_rows()}
    options = hyperparameters(context.config)
    for name in names:
        wandb = name == "wandb"
        tracker = tracker_of(
            name,
            Beginning(
                project=(wandb and not train.tracker_project_name and os.environ.get("WANDB_PROJECT")) or project,
                run_name=(wandb and not train.tracker_run_name and os.environ.get("WANDB_NAME")) or run_name,
                run_id=ids[name],
                folder=place,
                step=step,
                sent=frozenset(sent) if name in before else frozenset(),
            ),
            context.warn,
        )
        tracker.start(options)
        context.trackers.append(tracker)
    write_atomically(folder.trackers_file, json.dumps(before | ids))
    context.accelerator.trackers = [*context.trackers]


def hyperparameters(config: RunConfig) -> dict[str, float | str]:
    """The options as trackers take them: without secrets, without places of this machine, without what is not set."""
    told = without_places(masked_options(as_flat_dict(config)))
    return {
        name: value if isinstance(value, int | float | str) else _text(value)
        for name, value in told.items()
        if value not in (None, [], ()) and not is_secret(name)
    }


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def report(context: RunContext, folder: RunFolder) -> None:
    """Send the report of a run that has ended."""
    if any(tracker.is_on for tracker in context.trackers):
        page, text = shared_report(folder)
        for tracker in context.trackers:
            tracker.log_report(page, text)


def finish(context: RunContext) -> None:
    """Let go of all trackers, whatever the run has come to."""
    for tracker in context.trackers:
        tracker.finish()
    context.trackers.clear()
