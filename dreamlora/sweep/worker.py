"""A process that makes one run after the other: ``python -m dreamlora.sweep.worker``.

Jobs come as lines of JSON on standard input, outcomes go back as lines on standard output; what the training says goes
to standard error. The imports of torch and its relatives are paid once for all runs. When the input ends, so does the
process: whoever started it has gone. As after a signal, a run that is under way writes a checkpoint first.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

from dreamlora.cli.messages import console_messages
from dreamlora.cli.parse import parse_run, run
from dreamlora.config.programs import PROGRAMS
from dreamlora.errors import DivergedError, UserError
from dreamlora.files import remove, write_atomically
from dreamlora.runfolder import RunFolder

RANK = int(os.environ.get("RANK", "0"))
"""Of this process among those that share a run; the first one writes what all have done."""
PATIENCE_S = 10
"""So long the first process has to fail by itself and say why; if this one failed alone, it would wait for it for ever,
and is ended with it."""
FAREWELL_S = 30
"""So long a run may take to write its checkpoint when whoever asked for it has gone."""

_busy = threading.Event()
"""Whether a run is under way."""

logger = logging.getLogger(__name__)


def main() -> None:
    """Work until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin, jobs), daemon=True).start()
    importlib.import_module("dreamlora.run.assemble")  # seconds, which can pass before the first job comes
    while (job := jobs.get()) is not None:
        _busy.set()
        outcome = make_run(job["program"], job["argv"], Path(job["folder"]), job["method"])
        _busy.clear()
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()
        if RANK and outcome["status"] == "failed":
            time.sleep(PATIENCE_S)
            os._exit(1)


def make_run(program: str, argv: list[str], path: Path, method: str) -> dict[str, str]:
    """Train into ``path``, or go on there, and write down how it ended (outcome.json).

    Args:
        program: that trains, one of ``PROGRAMS``.
        argv: its flags, without the folder.
        path: of the run.
        method: its label, for the report.

    Returns:
        status: "finished"; "diverged", if the loss was not finite; "failed", whatever else went wrong.
        message: what went wrong, in one paragraph.
    """
    folder = RunFolder(path)
    if RANK == 0:
        remove(folder.outcome_file)
    flags = [*argv, "--output_dir", str(path)]
    sys.argv = ["dreamlora", program, *flags]  # what the run's report calls its command
    if folder.holds_run():
        flags += ["--resume_from_checkpoint", "latest"] if folder.checkpoint_steps() else ["--overwrite_output_dir"]
    try:
        _train(program, flags)
        status, message = "finished", ""
    except DivergedError as error:
        status, message = "diverged", str(error)
    except UserError as error:
        status, message = "failed", str(error)
    except Exception as error:  # a run that breaks must not take the other runs with it
        logger.error("%s", traceback.format_exc())
        status, message = "failed", f"{type(error).__name__}: {error}"
    if RANK == 0:
        write_outcome(folder, method, status, message)
    return {"status": status, "message": message}


def write_outcome(folder: RunFolder, method: str, status: str, message: str) -> None:
    """outcome.json: that the run ended, and how."""
    outcome = {"status": status, "message": message, "method": method}
    write_atomically(folder.outcome_file, json.dumps(outcome, indent=1))


def _train(program: str, flags: list[str]) -> None:
    import torch
    from accelerate.state import AcceleratorState

    from dreamlora.run import assemble

    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the precision of the run before
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    assemble.train(*parse_run(flags, PROGRAMS[program]))


def _listen(source: IO[str], jobs: queue.Queue[dict[str, Any] | None]) -> None:
    try:
        for line in source:
            jobs.put(json.loads(line))
    except ValueError:  # half a line: whoever wrote it has gone, or waits for an answer that nobody would give
        logger.error("%s", traceback.format_exc())
        os._exit(1)
    jobs.put(None)
    if _busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)  # the run under way writes a checkpoint
    time.sleep(FAREWELL_S)
    os._exit(1)


if __name__ == "__main__":
    with console_messages():
        sys.exit(run(lambda _: main(), []))
