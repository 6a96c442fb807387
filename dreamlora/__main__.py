"""The command ``dreamlora``. Torch is imported only after all flags are known to be right."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dreamlora.interrupts import unheeded

with unheeded():
    from dreamlora import __version__
    from dreamlora.cli.messages import console_messages, work_beside_output
    from dreamlora.cli.parse import Program, parse, parse_run, run
    from dreamlora.config import RunConfig
    from dreamlora.config.programs import TextToImageConfig
    from dreamlora.errors import UserError
    from dreamlora.escapes import one_line

if TYPE_CHECKING:
    from dreamlora.report.document import Document


@dataclass(frozen=True)
class ReportConfig:
    """Write the report of a run, finished or not, or of a comparison: dreamlora report outputs/<run>."""

    run: Path
    """The run's folder, or a comparison's; the flag's name may be left out."""
    live: bool = False
    """Serve the report on this machine instead, following the run until Ctrl-C; nothing is written."""
    port: int | None = None
    """Port of --live on 127.0.0.1. Default: a free one."""

    def __post_init__(self) -> None:
        if self.port is not None and not self.live:
            raise UserError("--port is for --live: give both, or neither")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UserError(f"--port takes a number from 1 to 65535 (got {self.port})")


def dreambooth(argv: Sequence[str]) -> None:
    """Train a LoRA on images of one subject."""
    _train(argv, RunConfig)


def text_to_image(argv: Sequence[str]) -> None:
    """Train a LoRA on captioned images."""
    _train(argv, TextToImageConfig)


def _train(argv: Sequence[str], config_class: type[RunConfig]) -> None:
    config, optimizer_options = parse_run(argv, config_class)
    from dreamlora.run import preflight

    preflight.check(config)
    if config.train.dry_run:
        from dreamlora.run.dry_run import dry_run

        return dry_run(config)
    with work_beside_output():
        from accelerate import PartialState

        from dreamlora.run import assemble

        folder = assemble.train(config, optimizer_options)
        if PartialState().is_main_process:  # the others are done before the report is
            print(f"{one_line(str(folder.path))}: LoRA, samples and report.html", flush=True)
    return None


def sample(argv: Sequence[str]) -> None:
    """Draw images with trained LoRAs."""
    from dreamlora.commands.sample import command

    command.main(argv)


def evaluate(argv: Sequence[str]) -> None:
    """Measure trained LoRAs, or folders of images."""
    from dreamlora.commands.evaluate import command

    command.main(argv)


def export(argv: Sequence[str]) -> None:
    """Write a LoRA as another program reads it."""
    from dreamlora.commands.export import command

    command.main(argv)


def report(argv: Sequence[str]) -> None:
    """Write report.html and report.md of a run or comparison anew, or show them live."""
    config = parse(ReportConfig, argv, Program("dreamlora report", positional="run"))
    from dreamlora.report import document_of

    document = document_of(config.run)
    if config.live:
        _serve(document, config.port or 0)
    else:
        print(one_line(str(document.write())))


def _serve(document: Document, port: int) -> None:
    from dreamlora.report.live import LivePage, LiveServer

    with LiveServer(LivePage(document), port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"{server.url} follows {one_line(str(document.folder))} (Ctrl-C ends it)", flush=True)
        server.serve()


def compare(argv: Sequence[str]) -> None:
    """Train with several optimizers and say which is better, and how sure that is."""
    from dreamlora.sweep import command

    command.main(argv)


def doctor(argv: Sequence[str]) -> None:
    """Say what a training would do, need and stumble over."""
    from dreamlora.commands.doctor import command

    command.main(argv)


def merge(argv: Sequence[str]) -> None:
    """Put LoRAs into a base model, or several into one LoRA."""
    from dreamlora.commands.merge import command

    command.main(argv)


def extract(argv: Sequence[str]) -> None:
    """Make a LoRA of what a fine-tuned model has changed."""
    from dreamlora.commands.extract import command

    command.main(argv)


def resize(argv: Sequence[str]) -> None:
    """Give a LoRA a lower rank."""
    from dreamlora.commands.resize import command

    command.main(argv)


def inspect(argv: Sequence[str]) -> None:
    """Say what a LoRA or another .safetensors file is."""
    from dreamlora.commands.inspect import command

    command.main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "dreambooth": dreambooth,
    "text-to-image": text_to_image,
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
    "report": report,
    "compare": compare,
    "doctor": doctor,
    "merge": merge,
    "extract": extract,
    "resize": resize,
    "inspect": inspect,
}


def usage() -> str:
    """The text of ``dreamlora --help``."""
    lines = [f"  {name:<15}{(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    return (
        "usage: dreamlora COMMAND [FLAGS]\n\nFine-tune text-to-image diffusion models with LoRA.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\nFlags of a command: dreamlora COMMAND --help"
        + "\nSeveral GPUs or machines: accelerate launch train_scripts/dreambooth_lora.py [FLAGS]"
    )


def dispatch(argv: Sequence[str]) -> None:
    """Run one command.

    Raises:
        UserError: there is no such command, or the command found a mistake of the user's.
    """
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and (words := [word for word in argv if any("\udc80" <= c <= "\udcff" for c in word)]):
        raise UserError(f"{words[0]!r} is no text in this system's encoding, {encoding}: set PYTHONUTF8=1")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
    elif argv[0] in ("--version", "-V"):
        print(f"dreamlora {__version__}")
    elif argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        raise UserError(f"unknown command {argv[0]!r}: choose one of {', '.join(COMMANDS)}; see dreamlora --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    # Their warnings (no torchvision, adapters without a text encoder, ...) are not about anything the user did.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    with console_messages():
        return run(dispatch, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
