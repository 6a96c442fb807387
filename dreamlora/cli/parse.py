"""Command lines: dataclasses become flags, YAML entries become the same flags, mistakes become one clear message.

A flag's value comes from the first of these that has one: the command line, the --config files (the last first), the
preset of the embedded model, the dataclass. All of them together become one list of flags that tyro parses once.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml

from dreamlora import registry
from dreamlora.cli import presets
from dreamlora.cli.declared import Option, options_of, subgroups_of
from dreamlora.cli.foreign import ELSEWHERE, UNNEEDED
from dreamlora.config import RunConfig
from dreamlora.errors import DISK_FULL, UserError

Config = TypeVar("Config")
Values = list[str] | bool | None
"""What is given for one flag: words; on or off for switches; None for "the default, whatever the preset says"."""

_FLAG = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True)
class Program:
    """How one command reads its command line.

    Attributes:
        name: as in its help, such as "dreamlora sample".
        positional: the flag that words before the first flag belong to.
        preset: flags (as in a --config file) that go before all others, from those that are given.
    """

    name: str = "dreamlora"
    positional: str | None = None
    preset: Callable[[Mapping[str, Values]], Mapping[str, Any]] = lambda given: {}


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
        _tyro(config_class, ["--help"], program)
    given = _from_argv(argv, config_class, program)
    files = given.pop("config", None)
    for file in reversed(files if isinstance(files, list) else []):
        given = {**_from_yaml(Path(file), config_class), **given}
    preset = program.preset(given)
    given = {**{key: _words(options[key], value, "the preset") for key, value in preset.items()}, **given}
    for name, option in options.items():
        if option.default is MISSING and given.get(name) is None:
            raise UserError(f"--{name} is needed: {option.help}")
    return _tyro(config_class, [word for name, values in given.items() for word in _as_flag(name, values)], program)


def parse_run(argv: Sequence[str], config_class: type[RunConfig] = RunConfig, name: str = "") -> tuple[RunConfig, Any]:
    """The training options and the optimizer's own (its ``Options``); nothing is loaded and no torch is imported.

    Args:
        argv: the words after the command's name.
        config_class: of the program, see ``programs``.
        name: as the help has it, if it is not the command that the class names.

    Raises:
        UserError: a flag, value, combination or optimizer setting is wrong, or a named input does not exist.
    """

    def preset(given: Mapping[str, Values]) -> dict[str, Any]:
        return presets.embedded(given, config_class.PRESET)

    config = parse(config_class, argv, Program(name or f"dreamlora {config_class.COMMAND}", preset=preset))
    for flag, path in (
        ("instance_data_dir", config.data.instance_data_dir),
        ("train_data_dir", config.data.train_data_dir),
        ("sample_prompts", config.sample.sample_prompts),
        ("eval_prompts", config.eval.eval_prompts),
        ("inception_weights", config.encoders.inception_weights),
        ("cache_dir", config.model.cache_dir and config.model.cache_dir.parent),
    ):
        if path is not None and not path.exists():
            raise UserError(f"--{flag}: there is no {path} (looked from {Path.cwd()})")
    optim = config.optim
    registry.check_needs("optimizers", optim.optimizer)
    common = {"betas": (optim.adam_beta1, optim.adam_beta2), "eps": optim.adam_epsilon}
    method_options("inits", config.lora.init, config.lora.init_args, {})  # wrong ones should stop the run now
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
    given: dict[str, Values] = {}
    for key, value in zip(args[0::2], args[1::2], strict=True):
        spelled = key.removeprefix("--").replace("-", "_")
        if spelled not in options:
            raise UserError(f"{flag}: {name} has no setting {key!r}{_hint(spelled, options, '')}{_settings(options)}")
        given[spelled] = _words(options[spelled], value, flag)
    try:
        values = vars(_tyro(method, [word for key, words in given.items() for word in _as_flag(key, words)], Program()))
        common = {key: _where_given(base[key], values[key]) for key in base if key in options and key not in given}
        return method(**{**values, **common})
    except ValueError as error:
        raise UserError(f"{flag} of {name}: {error}") from None


def _where_given(value: Any, default: Any) -> Any:
    """``value``, or ``default`` where it is None; pairs of values one by one."""
    if isinstance(value, tuple):
        return tuple(_where_given(part, other) for part, other in zip(value, default, strict=True))
    return default if value is None else value


def run(main: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Call a program and turn what a user can mend into one message; the exit status."""
    try:
        main(argv)
    except UserError as error:
        return _complain(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _complain("stopped (Ctrl-C)", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; Python would complain once more while it exits
        return 1
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        return _complain(
            f"error: the disk is full{where}; free some space and go on with --resume_from_checkpoint latest", 1
        )
    return 0


def _complain(message: str, status: int) -> int:
    sys.stderr.write(f"{message}\n")
    return status


def _from_argv(argv: Sequence[str], config_class: type, program: Program) -> dict[str, Values]:
    """What the command line gives, by flag; "config" holds the files of --config."""
    options = options_of(config_class)
    given: dict[str, Values] = {}
    files: list[str] = []
    for name, words in _split(argv, program, options):
        if name == "config":
            if len(words) != 1:
                raise UserError(f"--config takes one YAML file (got {len(words)} words)")
            files += words
        elif name in options:
            given[name] = True if options[name].switch and not words else _words(options[name], words)
        elif name.removeprefix("no_") in options and options[name.removeprefix("no_")].switch:
            if words:
                raise UserError(f"--{name} takes no value (got {' '.join(words)!r})")
            given[name.removeprefix("no_")] = False
        elif not _unneeded(name, options):
            unknown = _unknown(f"flag --{name}", name, options, config_class)
            raise UserError(unknown + f"\nAll flags: {program.name} --help")
    return {**given, "config": files}


def _split(argv: Sequence[str], program: Program, options: Mapping[str, Option]) -> Iterator[tuple[str, list[str]]]:
    """``--a-b x y --c=z`` as ``("a_b", ["x", "y"]), ("c", ["z"])``.

    Words after a switch belong to the positional flag, unless that has its own already.
    """
    name, words = program.positional, list[str]()
    switches = {option for option in options if options[option].switch} if program.positional else set()
    for word in argv:
        if not _FLAG.match(word):
            if name is None:
                raise UserError(f"{word!r} belongs to no flag; see {program.name} --help")
            if name in switches and not words:
                yield name, words
                name = program.positional
            words.append(word)
            continue
        if name is not None and (words or name != program.positional):
            yield name, words
            switches = set() if name == program.positional else switches
        flag, equals, value = word.partition("=")
        name, words = flag.lstrip("-").replace("-", "_"), [value] if equals else []
    if name is not None and (words or name != program.positional):
        yield name, words


def _from_yaml(file: Path, config_class: type) -> dict[str, Values]:
    """The entries of a --config file, whether in groups or flat."""
    options = options_of(config_class)
    try:
        entries = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"--config: cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {file} is no valid YAML: {error}") from None
    if not isinstance(entries, dict | None):
        raise UserError(f"--config: {file} must hold entries such as `rank: 8` (got a {type(entries).__name__})")
    flat: dict[str, Any] = {}
    for key, value in (entries or {}).items():
        inside = key in subgroups_of(config_class) and isinstance(value, dict | None)
        flat |= (value or {}) if inside else {key: value}
    given: dict[str, Values] = {}
    for key, value in flat.items():
        name = str(key).replace("-", "_")
        if name in options:
            given[name] = _words(options[name], value, str(file))
        elif not _unneeded(name, options) and value is not None:
            raise UserError(_unknown(f"key {key!r} in {file}", name, options, config_class))
    return given


def _unneeded(name: str, options: Mapping[str, Option]) -> bool:
    """Whether a flag of diffusers can be passed over; says so."""
    if "dataset_name" not in options or name not in UNNEEDED:
        return False
    sys.stderr.write(f"note: --{name} is not needed: {UNNEEDED[name]}\n")
    return True


def _unknown(what: str, name: str, options: Mapping[str, Option], config_class: type) -> str:
    """The message for a flag or key that is no option."""
    of_others: Mapping[str, str] = getattr(config_class, "NOT_OFFERED", {})
    if name in of_others:
        return f"{what} is not offered: {of_others[name]}"
    if "dataset_name" in options and name in ELSEWHERE:
        return f"{what} is not offered: {_filled(ELSEWHERE[name])}"
    return f"unknown {what}{_hint(name, options, '--')}"


def _hint(name: str, options: Mapping[str, Option], dashes: str) -> str:
    near = [option for option in options if option.startswith(name)]
    near = near[:3] or difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    if not near:
        return "."
    if len(near) > 1:
        return f". Did you mean one of {', '.join(dashes + option for option in near)}?"
    return f". Did you mean {dashes}{near[0]}? {_filled(options[near[0]].help)}"


def _settings(options: Mapping[str, Option]) -> str:
    if not options:
        return "\nIt has no settings."
    lines = [f"  {name} {option.takes} (default {option.shown_default})" for name, option in options.items()]
    texts = [option.help for option in options.values()]
    return "\nIts settings:\n" + "\n".join(f"{line}: {text}" for line, text in zip(lines, texts, strict=True))


def _words(option: Option, value: Any, where: str = "") -> Values:
    """A flag's value in words, after a check that they fit its type.

    Args:
        value: a list of words, or what a YAML file holds.
        where: the file (or flag) it is from; empty for the command line.

    Raises:
        UserError: they do not fit.
    """
    if value is None:
        return None
    if option.switch:
        return _switch(option, value, where)
    if isinstance(value, bool):  # YAML reads a bare no as False, and --mixed_precision no is common
        value = ("no", "yes")[value] if ("no", "yes")[value] in option.choices else str(value).lower()
    if isinstance(value, dict) and option.several:
        value = [part for pair in value.items() for part in pair]
    if option.several and option.count and isinstance(value, str):
        value = value.split(",")
    words = [str(word) for word in value] if isinstance(value, list | tuple) else [str(value)]
    problem = _misfit(option, words)
    if problem:
        raise UserError(f"{where}: {option.name} {problem}" if where else f"--{option.name} {problem}")
    return [option.respelled(word) for word in words]


def _switch(option: Option, value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    if where and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    got = " ".join(value) if isinstance(value, list) else value
    if where:
        raise UserError(f"{where}: {option.name} takes true or false (got {got!r})")
    raise UserError(f"--{option.name} takes no value (got {got!r}): write --{option.name} or --no_{option.name}")


def _misfit(option: Option, words: list[str]) -> str | None:
    """Why the words do not fit the flag, or None if they do."""
    if option.several:
        if option.count and len(words) != option.count:
            return f"takes {option.count} values (got {len(words)}: {' '.join(words)})"
    elif not words:
        return f"needs a value: {option.takes}"
    elif len(words) > 1:
        return f"takes one value (got {len(words)}: {' '.join(words)}); put quotes round a text with spaces"
    for word in words:
        if not option.accepts(word):
            near = difflib.get_close_matches(word.lower(), option.choices, n=1)
            return f"takes {option.takes} (got {word!r})" + (f". Did you mean {near[0]!r}?" if near else "")
    return None


def _as_flag(name: str, values: Values) -> list[str]:
    if values is None:
        return []
    if isinstance(values, bool):
        return [f"--{name}" if values else f"--no_{name}"]
    return [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]


def _filled(text: str) -> str:
    for kind in ("optimizers", "inits", "metrics"):
        text = text.replace(f"{{{kind}}}", ", ".join(registry.names(kind)))
    return text


def _tyro(config_class: type[Any], args: list[str], program: Program) -> Any:
    """Parse with tyro. Mistakes were found before, so that its own messages are only a safety net."""
    import tyro

    mirror = _mirror(config_class, options_of(config_class), top=True)
    parsed: Any = tyro.cli(
        mirror,
        args=args,
        prog=program.name,
        description=config_class.__doc__,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    parts = {name: group(**vars(getattr(parsed, name))) for name, group in subgroups_of(config_class).items()}
    values = {f.name: getattr(parsed, f.name) for f in fields(config_class) if f.name not in parts}
    return config_class(**values, **parts)


def _mirror(config_class: type[Any], offered: Mapping[str, Option], top: bool = False) -> type:
    """The dataclass again for tyro, with the options that are ``offered`` and with tidy help.

    It is without the dataclass's checks, so that they run once, at the end.
    """
    import tyro

    groups = subgroups_of(config_class)
    members: list[Any] = []
    for name, option in options_of(config_class, deep=False).items():
        if name not in offered:
            continue
        hint = "(required)" if option.default is MISSING else f"(default: {option.shown_default})"
        if option.default is None or option.default == () or "Default:" in option.help or option.default is False:
            hint = ""
        argument = tyro.conf.arg(
            help=_filled(option.help),
            help_behavior_hint=hint,
            metavar=None if option.switch else option.metavar,
        )
        default = field() if option.default is MISSING else field(default=option.default)
        members.append((name, Annotated[option.annotation, argument], default))
    for name, group in groups.items():
        mirrored = _mirror(group, offered)
        members.append((name, mirrored, field(default_factory=mirrored)))
    if top and "config" not in options_of(config_class):
        text = "YAML file with flags, in groups or flat; flags on the command line win. May be given several times."
        argument = tyro.conf.arg(help=text, help_behavior_hint="", metavar="FILE")
        members.append(("config", Annotated[Path | None, argument], field(default=None)))
    return make_dataclass(config_class.__name__, members, namespace={"__doc__": config_class.__doc__}, kw_only=True)
