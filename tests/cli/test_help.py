"""The page of ``--help``: complete, nothing twice, and no wider than the terminal."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dreamlora import registry
from dreamlora.cli.declared import options_of, subgroups_of
from dreamlora.cli.help import WIDEST, filled, page, settings, wrapped
from dreamlora.cli.parse import parse_run
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.config import RunConfig, TextToImageConfig
from dreamlora.errors import UserError
from tests.cli.conftest import Case


def squeezed(text: str) -> str:
    """Without spaces and ends of lines: how it is wrapped does not matter."""
    return "".join(text.split())


def test_help_shows_groups_flags_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parse_run(["--rank", "x", "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    flat = " ".join(text.split())
    for part in (
        "usage: dreamlora dreambooth",
        "--config FILE",
        "model options",
        "--rank INT Rank r of the update B·A. (default: 4)",
        "--mixed_precision {no,fp16,bf16}",
        "--center_crop, --no_center_crop",
        f"Optimizer: {', '.join(registry.names('optimizers'))}.",
    ):
        assert part in flat
    assert "None" not in flat and "{optimizers}" not in flat


@pytest.mark.parametrize("program", [RunConfig, TextToImageConfig])
@pytest.mark.parametrize("optimizer", registry.names("optimizers"))
def test_a_run_takes_the_values_that_the_help_tells(
    program: type[RunConfig], optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no flag but the optimizer: what differs from the declared default is told as the embedded model's."""
    with pytest.raises(SystemExit):
        parse_run(["--help"], program)
    text = squeezed(capsys.readouterr().out)
    try:
        config, _ = parse_run(["--optimizer", optimizer], program)
    except UserError as error:
        pytest.skip(str(error))
    options, default = options_of(program), optimizer == "adamw"
    for part in filter(is_dataclass, vars(config).values()):
        for name in (field.name for field in fields(part) if field.name in options):
            option, value = options[name], getattr(part, name)
            row = text.partition(squeezed(option.help if "{" not in option.help else filled(option.help)))[2][:120]
            if value == option.default or name == "optimizer":
                assert default is False or not row.partition("--")[0].count("Withtheembedded"), name
                continue
            told = value.name if isinstance(value, Path) else replace(option, default=value).default_text
            both = f"{squeezed('With the embedded model and adamw: ')}" in row
            assert both or re.search(rf"Withtheembeddedmodel('sownimages)?:{re.escape(squeezed(told))}\.", row), name
            assert default or both or not option.name.endswith("learning_rate"), name


def test_every_option_has_a_help_text(case: Case) -> None:
    assert all(option.help for option in options_of(case.config).values())


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_page_has_every_option_with_its_text_and_default_once(case: Case, width: int) -> None:
    text = page(case.config, "dreamlora x", width=width)
    assert max(map(len, text.splitlines())) <= min(width, WIDEST)
    assert not any(line.endswith("(default:") for line in text.splitlines())
    flat = squeezed(text)
    options = options_of(case.config)
    heads = {
        name: squeezed(f"--{name}, --no_{name}" if option.switch else f"--{name} {option.metavar}")
        for name, option in options.items()
    }
    for name, option in options.items():
        row = heads[name] + squeezed(filled(option.help))
        assert flat.count(row) == 1, name
        after = flat.partition(row)[2]
        concrete = option.default is not None and option.default is not False and option.default != ()
        told = "(required)" if option.default is MISSING else squeezed(f"(default: {option.default_text})")
        expected = concrete and "Default:" not in option.help
        assert after.startswith(("(default:", "(required)")) == expected, name
        assert after.startswith(told) == expected, name


def test_groups_stand_in_the_order_of_declaration_under_their_docstrings(case: Case) -> None:
    text = page(case.config, "dreamlora x", width=WIDEST)
    headings = re.findall(r"^(\w+) options: (.+)$", text, flags=re.MULTILINE)
    groups = subgroups_of(case.config)
    assert [name for name, _ in headings] == list(groups)
    assert all(squeezed(heading) in squeezed(groups[name].__doc__ or "") for name, heading in headings)
    assert text.index("\noptions:\n") < text.index("--config FILE") < text.index("-h, --help")


def test_the_page_begins_with_usage_and_purpose_and_no_words_for_developers(case: Case) -> None:
    lines = page(case.config, "dreamlora x", width=80).splitlines()
    assert lines[0] == "usage: dreamlora x [FLAGS]" and lines[1] == ""
    assert lines[2] and (case.config.__doc__ or "").startswith(lines[2])
    assert "Attributes:" not in lines and "``" not in "".join(lines)


def test_the_flag_whose_name_may_be_left_out_is_in_the_usage() -> None:
    assert page(SampleConfig, "dreamlora sample", "lora").startswith("usage: dreamlora sample PATH ... [FLAGS]\n")


def test_the_page_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert page(RunConfig, "x") == page(RunConfig, "x", width=100) != page(RunConfig, "x", width=80)
    monkeypatch.delenv("COLUMNS")  # and pytest's output is no terminal
    assert page(RunConfig, "x") == page(RunConfig, "x", width=80)


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 8, ["one two", "three"]),
        ("one two three", 7, ["one two", "three"]),
        ("--flag {a,bb,c}", 12, ["--flag {a,", "bb,c}"]),
        ("a class-free word", 8, ["a", "class-free", "word"]),
        ("", 8, [""]),
    ],
)
def test_lines_break_at_spaces_and_between_choices_alone(text: str, width: int, lines: list[str]) -> None:
    assert wrapped(text, width) == lines


@pytest.mark.parametrize("kind", ["adapters", "optimizers", "inits"])
def test_settings_of_a_plug_in_are_listed_with_their_texts(kind: str) -> None:
    for name in registry.names(kind):
        options: Any = options_of(registry.load(kind, name).Options)
        text = settings(options)
        assert all(f"\n  {option.name} {option.takes} (default " in text for option in options.values())
        assert all(option.help in text for option in options.values())
