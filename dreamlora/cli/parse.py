"""Command lines: the flags that a dataclass declares become that dataclass, mistakes become one clear message.

A flag's value comes from the first of these that has one: the command line, the --config files (the last first), the
preset of an embedded model, the dataclass. Each is read once, into values of the declared types.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from dreamlora import registry
from dreamlora.cli import presets
from dreamlora.cli.declared import options_of, subgroups_of
from dreamlora.cli.given import from_argv, from_yaml, near_names, value_of
from dreamlora.cli.help import page, settings
from dreamlora.cli.places import check_folders
from dreamlora.config import RunConfig
from dreamlora.errors import LackOfMemoryError, UserError, WriteError, explained
from dreamlora.escapes import message
from dreamlora.interrupts import PIPE, Interrupted, deferred, heed, heeded

Config = TypeVar("Config")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """How one command reads its command line.

    Attributes:
        name: as in its help, such as "dreamlora sample".
        positional: the flag that words before the first flag belong to.
        preset: entries (as in a --config file) that everything else wins over, from the values that are given.
    """

    name: str = "dreamlora"
    positional: str | None = None
    preset: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {}


def parse(config_class: type[Config], argv: Sequence[str], program: Program = Program()) -> Config:
    """The dataclass that a command line describes.

    Args:
        config_class: frozen dataclass; fields that are dataclasses themselves are groups of flags.
        argv: the words after the command's name.

    Raises:
        UserError: an unknown flag, a bad value or a bad combination.
        SystemExit: after ``--help``.
    """
    options = options_of(config_class)
    if {"-h", "--help"} & set(argv):
        told = _told_of_preset(config_class, program)
        sys.stdout.write(page(config_class, program.name, program.positional, elsewhere=told))
        raise SystemExit(0)
    flags, files = from_argv(argv, config_class, program.name, program.positional)
    sources = [flags, *(from_yaml(file, config_class) for file in reversed(files))]
    given = _first_of(sources)
    preset = {name: value_of(options[name], value, "the preset") for name, value in program.preset(given).items()}
    sources.append(preset)
    values = {name: value for name, value in _first_of(sources).items() if value is not None}
    for name, option in options.items():
        if option.default is MISSING and name not in values:
            raise UserError(f"--{name} is needed: {option.help}")
    names = frozenset(name for name, value in given.items() if value is not None)
    return _built(config_class, {"given": names, "sources": tuple(sources), **values})


def _first_of(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every option that one of them names, as the first has it."""
    return {name: value for source in reversed(sources) for name, value in source.items()}


def _told_of_preset(config_class: type[Any], program: Program) -> dict[str, str]:
    """By option, what the preset sets in place of the declared default, for the help text.

    Presets depend on what is given, so they are asked: what they set for other optimizers, or no longer set once there
    are images, is told as such.
    """
    options, preset = options_of(config_class), program.preset({})
    usual = options["optimizer"].default if "optimizer" in options else None
    others = [program.preset({"optimizer": name}) for name in registry.names("optimizers")] if usual else []
    images = program.preset({name: "photos" for name in ("instance_data_dir", "train_data_dir") if name in options})
    told = {}
    for name, entry in preset.items():
        option = replace(options[name], default=value_of(options[name], entry, "the preset"))
        if option.default == options[name].default:
            continue
        where = "the embedded model" if name in images else "the embedded model's own images"
        where += f" and {usual}" if any(other.get(name) != entry for other in others) else ""
        told[name] = (
            f"With {where}: {option.default.name if isinstance(option.default, Path) else option.default_text}."
        )
    return told


def _built(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass with its groups; a field without a value has its default. Every check runs once.

    A field ``given`` gets the names of the options that a person gave, ``sources`` what was said where.
    """
    groups: dict[str, Any] = {name: _built(group, values) for name, group in subgroups_of(config_class).items()}
    own_names: list[str] = [each.name for each in fields(config_class)]  # type: ignore[arg-type]
    own = {name: values[name] for name in own_names if name in values}
    return config_class(**own, **groups)


def parse_run(argv: Sequence[str], config_class: type[RunConfig] = RunConfig, name: str = "") -> tuple[RunConfig, Any]:
    """The training options and the optimizer's own (its ``Options``); nothing is loaded and no torch is imported.

    Args:
        argv: the words after the command's name.
        config_class: of the program, see ``programs``.
        name: as the help has it, if it is not the command that the class names.

    Raises:
        UserError: a flag, value, combination or optimizer setting is wrong, or a named input does not exist.
    """

    def preset(given: Mapping[str, Any]) -> dict[str, Any]:
        return presets.embedded(given, config_class.PRESET)

    config = parse(config_class, argv, Program(name or f"dreamlora {config_class.COMMAND}", preset=preset))
    for flag, path in (
        ("sample_prompts", config.sample.sample_prompts),
        ("eval_prompts", config.eval.eval_prompts),
        ("inception_weights", config.encoders.inception_weights),
        ("cache_dir", config.model.cache_dir and config.model.cache_dir.parent),
    ):
        if path is not None and not path.exists():
            raise UserError(f"--{flag}: there is no {path} (looked from {Path.cwd()})")
    check_folders(config)
    optim = config.optim
    registry.check_needs("optimizers", optim.optimizer)
    common = {"betas": (optim.adam_beta1, optim.adam_beta2), "eps": optim.adam_epsilon}
    method_options("inits", config.lora.init, config.lora.init_args, {})  # wrong ones should stop the run now
    method_options("adapters", config.lora.adapter, config.lora.adapter_args, {})
    return config, method_options("optimizers", optim.optimizer, optim.optimizer_args, common)


def method_options(kind: str, name: str, args: Sequence[str], base: Mapping[str, Any]) -> Any:
    """A plug-in's ``Options`` from ``--optimizer_args``-like pairs of a name and a value.

    Args:
        args: ``name, value, name, value, ...``; values of several numbers are separated by commas.
        base: values for those of its fields that have these names, None for its own default; ``args`` win.

    Raises:
        UserError: a wrong name (the message lists the right ones with their help) or a bad value.
    """
    method = registry.load(kind, name).Options
    options, flag = options_of(method), f"--{kind.removesuffix('s')}_args"
    given = {key: _where_given(value, options[key].default) for key, value in base.items() if key in options}
    for key, word in zip(args[0::2], args[1::2], strict=True):
        spelled = key.removeprefix("--").replace("-", "_")
        if spelled not in options:
            hint = near_names(spelled, options, dashes="")
            raise UserError(f"{flag}: {name} has no setting {key!r}{hint}{settings(options)}")
        given[spelled] = value_of(options[spelled], word, flag)
    try:
        return method(**given)
    except ValueError as error:
        raise UserError(f"{flag} of {name}: {error}") from None


def _where_given(value: Any, default: Any) -> Any:
    """``value``, or ``default`` where it is None; pairs of values one by one."""
    if isinstance(value, tuple):
        return tuple(_where_given(part, other) for part, other in zip(value, default, strict=True))
    return default if value is None else value


def run(main: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Call a program and turn what a user can mend into one message.

    Returns:
        The exit status: 0; 2 after a mistake of the user's; 1 where the system refused, such as with a full disk;
        128 and the signal's number after a signal.
    """
    with heeded(), _threads_told():
        try:
            return _status(main, argv)
        except KeyboardInterrupt as error:  # of any moment: also of the one in which an error is about to be told
            return _farewell(error if isinstance(error, Interrupted) else Interrupted())


def _status(main: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    try:
        main(argv)
        sys.stdout.flush()
    except Exception as error:
        return _complaint(error)
    return 0


@contextmanager
def _threads_told() -> Iterator[None]:
    """Say in one line, too, what a user can mend in threads of libraries: whoever uses them hears of it elsewhere."""
    before = threading.excepthook

    def tell(failed: threading.ExceptHookArgs) -> None:
        told = explained(failed.exc_value) if isinstance(failed.exc_value, Exception) else None
        logger.warning(told) if told else before(failed)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


def _complaint(error: Exception) -> int:
    """One message for what a user can mend; all else is raised again, with its traceback."""
    told = str(error) if isinstance(error, UserError) else explained(error)
    if told is None:
        heed()  # after a signal to all processes of a run, those that live longer fail at what they share
        raise error
    with deferred():  # a reader who has gone changes nothing any more
        _say(f"error: {told}")
    return 2 if isinstance(error, UserError) and not isinstance(error, WriteError | LackOfMemoryError) else 1


def _farewell(stop: Interrupted) -> int:
    with deferred():
        if stop.signum != PIPE:  # as other programs end behind which `head` has closed the pipe
            _say(f"stopped ({stop.name})")
        return 128 + stop.signum


def _say(text: str) -> None:
    """The last word of a program, below bars that were left where they were."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    sys.stderr.write(f"{message(text)}\n")
