"""The command ``dreamlora``. Torch is imported only after all flags are known to be right."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamlora import __version__, cli
from dreamlora.errors import UserError


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html and report.md of a run, finished or not: dreamlora report outputs/<run>."""

    run: Path
    """The run's folder; the flag's name may be left out."""


def dreambooth(argv: Sequence[str]) -> None:
    """Train a LoRA."""
    config, optimizer_options = cli.parse_run(argv)
    from dreamlora import assemble

    folder = assemble.train(config, optimizer_options)
    print(f"{folder.path}: LoRA, samples and report.html")


def sample(argv: Sequence[str]) -> None:
    """Draw images with trained LoRAs."""
    from dreamlora import sample_command

    sample_command.main(argv)


def report(argv: Sequence[str]) -> None:
    """Write report.html and report.md of a run folder anew."""
    config = cli.parse(ReportConfig, argv, cli.Program("dreamlora report", positional="run"))
    from dreamlora.report import write_report

    print(write_report(config.run))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"dreambooth": dreambooth, "sample": sample, "report": report}


def usage() -> str:
    """The text of ``dreamlora --help``."""
    lines = [f"  {name:<12}{(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
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
    return cli.run(dispatch, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
