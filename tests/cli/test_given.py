"""Values of every kind come through a command line and through YAML as they are, and each is checked once."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dreamlora import registry
from dreamlora.cli.declared import Option, options_of, subgroups_of
from dreamlora.cli.given import flag_in, from_argv, from_yaml
from dreamlora.cli.parse import method_options, parse
from dreamlora.config import Data, DataSet, RunConfig, Sample
from dreamlora.errors import UserError
from tests.cli.conftest import Case
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless

EDGES: dict[type, list[Any]] = {
    int: [0, -1, 10**12],
    float: [0.5, 3.0, -1.0, -0.5, 1e-4, -1e-8, 1e22, float("inf")],
    str: ["", "--a dog", "- a dog", "None", "null", "true", "no", "-1", "1e-4", "a, b", 'a "cat" = 猫', "é\n"],
    Path: [Path("a b/c"), Path("--x"), Path("None")],
}
NON_FINITE = ["nan", "inf", "-inf"]
PLUG_INS = [(kind, name) for kind in ("adapters", "optimizers", "inits") for name in registry.names(kind)]


def edges_of(option: Option) -> list[Any]:
    """Values of an option that are easily lost on their way."""
    if option.entries:
        return [(), entries_of(option), (*entries_of(option), *entries_of(option))]
    values = [True, False] if option.switch else list(option.choices)
    if not values or option.kind is float:
        values += EDGES[option.kind]
    if option.count:
        return [(value,) * option.count for value in values]
    if option.several:
        return [(), *((value,) for value in values), tuple(values)]
    return values


def entries_of(option: Option) -> tuple[Any, ...]:
    """Two records, for an option that takes a list of these."""
    return option.kind(dataset_name="a b", repeats=3), option.kind(dataset_name="--x", loss_weight=0.5)


def as_words(option: Option, value: Any) -> list[str]:
    """As one would type it; a value that looks like a flag needs the equals sign."""
    if option.switch:
        return [f"--{option.name}" if value else f"--no_{option.name}"]
    if not option.several:
        return [f"--{option.name}={value}"]
    return [f"--{option.name}={value[0]}"] if len(value) == 1 else [f"--{option.name}", *map(str, value)]


def plain(value: Any) -> Any:
    """As YAML has it."""
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    if isinstance(value, DataSet):
        return value.given()
    return str(value) if isinstance(value, Path) else value


def flat(config: Any) -> dict[str, Any]:
    """Every option of a program with its value."""
    groups = [getattr(config, name) for name in subgroups_of(type(config))]
    return {
        name: next(getattr(part, name) for part in (config, *groups) if hasattr(part, name))
        for name in options_of(type(config))
    }


def written(folder: Path, entries: dict[str, Any]) -> Path:
    file = folder / "flags.yaml"
    file.write_text(
        yaml.safe_dump({name: plain(value) for name, value in entries.items()}, allow_unicode=True), encoding="utf-8"
    )
    return file


def test_every_value_comes_through_a_command_line(case: Case) -> None:
    for name, option in options_of(case.config).items():
        for value in [] if option.entries else edges_of(option):
            words = as_words(option, value)
            if len(words) > 1 and any(map(flag_in, words[1:])):
                continue  # several texts that look like flags can only be given in a file
            assert from_argv(words, case.config, "x", None) == ({name: value}, []), words


def test_every_value_comes_through_a_file(case: Case, tmp_path: Path) -> None:
    options = options_of(case.config)
    for number in range(max(len(edges_of(option)) for option in options.values())):
        entries = {name: edges_of(option)[number % len(edges_of(option))] for name, option in options.items()}
        assert from_yaml(written(tmp_path, entries), case.config) == entries
        quoted = {name: value if isinstance(value, tuple) else str(value) for name, value in entries.items()}
        assert from_yaml(written(tmp_path, quoted), case.config) == entries


def test_all_values_of_a_config_give_the_same_config(case: Case, tmp_path: Path) -> None:
    config = parse(case.config, case.needed)
    entries = flat(config)
    assert parse(case.config, ["--config", str(written(tmp_path, entries))]) == config
    options = options_of(case.config)
    words = [as_words(options[name], value) for name, value in entries.items() if value not in (None, ())]
    assert parse(case.config, [word for flag in words for word in flag]) == config


@pytest.mark.parametrize(("kind", "name"), PLUG_INS)
def test_all_settings_of_a_plug_in_give_the_same_settings(kind: str, name: str) -> None:
    options = method_options(kind, name, [], {})
    pairs = [(key, getattr(options, key)) for key in options_of(type(options))]
    words = [(key, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)) for key, value in pairs]
    assert method_options(kind, name, [word for pair in words for word in pair], {}) == options


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """Counts how often the checks of these classes run."""
    ran: Counter[str] = Counter()

    def watch(*classes: type[Any]) -> Counter[str]:
        for watched in classes:
            own = getattr(watched, "__post_init__", None)

            def counted(self: Any, own: Any = own, name: str = watched.__name__) -> None:
                ran[name] += 1
                own(self)

            if own:
                monkeypatch.setattr(watched, "__post_init__", counted)
        return ran

    return watch


def test_the_checks_of_a_config_run_once(case: Case, checks: Callable[..., Counter[str]]) -> None:
    ran = checks(case.config, *subgroups_of(case.config).values())
    parse(case.config, case.needed)
    assert ran and set(ran.values()) == {1}


@pytest.mark.parametrize(("kind", "name"), PLUG_INS)
def test_the_checks_of_a_plug_in_run_once(kind: str, name: str, checks: Callable[..., Counter[str]]) -> None:
    ran = checks(registry.load(kind, name).Options)
    method_options(kind, name, [], {"betas": (0.9, None), "eps": 1e-6})
    assert set(ran.values()) <= {1}


@pytest.mark.parametrize("value", NON_FINITE)
def test_numbers_that_are_not_finite_are_refused_by_name(case: Case, value: str, tmp_path: Path) -> None:
    for name, option in options_of(case.config).items():
        if option.kind is float:
            file = tmp_path / "flags.yaml"
            values = ",".join([value] * (option.count or 1))
            file.write_text(f"{name}: {values}\n", encoding="utf-8")
            for words in ([f"--{name}={values}"], ["--config", str(file)]):
                with pytest.raises(UserError, match=rf"--{name} must be .+\(got {value}\)"):
                    parse(case.config, [*case.needed, *words])


@pytest.mark.parametrize(("kind", "name"), PLUG_INS)
def test_settings_that_are_no_number_are_refused_by_name(kind: str, name: str) -> None:
    for key, option in options_of(registry.load(kind, name).Options).items():
        if option.kind is float:
            with pytest.raises(UserError, match=rf"_args of {name}: {key}"):
                method_options(kind, name, [key, ",".join(["nan"] * (option.count or 1))], {})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--adam_epsilon -1", "--adam_epsilon must be at least 0 (got -1.0)"),
        ("--output_dir ''", "--output_dir takes a path (got '')"),
        ("--rank ''", "--rank takes a whole number (got '')"),
        ("--rank 8.0", "--rank takes a whole number (got '8.0')"),
        ("--eval_metrics ''", "--eval_metrics: unknown name ''"),
        (
            "--negative_prompt --odd",
            "--negative_prompt needs a value: a text; if it begins with a dash, put = before it",
        ),
    ],
)
def test_mistakes_at_the_edge(words: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        parse(RunConfig, shlex.split(words))
    assert expected in str(error.value)


def test_values_at_the_edge() -> None:
    words = "--negative_prompt '' --class_prompt=--odd --guidance_scale -1e-1 --eval_metrics --variant None"
    config = parse(RunConfig, shlex.split(words))
    assert (config.sample.negative_prompt, config.data.class_prompt, config.model.variant) == ("", "--odd", "None")
    assert (config.train.guidance_scale, config.eval.eval_metrics) == (-0.1, ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_train_steps: 100.0", "max_train_steps takes a whole number (got '100.0')"),
        ("instance_prompt: {a dog}", "instance_prompt takes no mapping here (got {'a dog': None}); put text in quotes"),
        ("lora_layers: [to_q, null]", "lora_layers takes no null here (got None)"),
        ("output_dir: ''", "output_dir takes a path (got '')"),
    ],
)
def test_mistakes_at_the_edge_of_a_file(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        parse(RunConfig, ["--config", str(file)])
    assert str(error.value).startswith(f"{file}: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1]\nb: *x", "{file}: line 2 refers to another place of the file (*x)"),
        ("a: &x [*x]", "{file}: line 1 refers to another place of the file (*x)"),
        ("a: !!python/object/apply:os.system [id]", "{file}: line 1 has a tag"),
        ("rank: " + "[" * 100_000, "{file}: it is nested deeper than 32 levels"),
        ("rank: 0x" + "f" * 400, "{file}: it holds a whole number of 1600 bits"),
        ("rank: " + "9" * 5000, "{file}: "),
        ("instance_prompt: " + "x" * 10_001, "{file}: instance_prompt takes a text of at most 10,000 characters"),
        ("rank: [" + "1, " * 50_000 + "]", "{file}: rank takes one value (got 50000: 1 1 1"),
        ("x" * 1000 + ": 1", "unknown key 'xxx"),
        ("a: 1\n" * 100_000, "cannot read {file}: it has more than the 256 KiB"),
        ("rank: 1\nlora: {lora_alpha: 1, lora_alpha: 2}", "{file}: line 2 has the key lora_alpha a second time: keep"),
        ("a: \ud800", "cannot read {file}: it is not UTF-8 text"),
    ],
)
def test_files_have_bounds(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    told = str(harmless(lambda: parse(RunConfig, ["--config", str(file)])))
    assert expected.format(file=file) in told and len(told) < 5000


def test_files_that_never_end_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=r"--config: cannot read .*: it is a (pipe or device|folder), not a file"):
            from_yaml(place, RunConfig)


@pytest.mark.parametrize("flag", ["instance_prompt", "class_prompt", "validation_prompt", "negative_prompt"])
def test_prompts_have_a_bound_wherever_they_are_given(flag: str) -> None:
    with pytest.raises(UserError, match=rf"--{flag} takes a text of at most 10,000 characters \(got 10,001\)"):
        parse(RunConfig, [f"--{flag}", "x" * 10_001])
    group: Any = Sample if flag in ("validation_prompt", "negative_prompt") else Data
    with pytest.raises(UserError, match=rf"--{flag}: a text of 10,001 characters is too long"):
        group(**{flag: "x" * 10_001})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


OPTIONS = {
    "rank": 8,
    "optim": {"learning_rate": 1e-4, "optimizer_args": {"betas": [0.8, 0.9]}},
    "eval_metrics": ["clip_text"],
    "instance_prompt": "a photo of sks dog",
    "datasets": [{"dataset_name": "a", "repeats": 2}],
}


@fuzzed
@given(content=st.one_of(damaged(yaml.safe_dump(OPTIONS).encode()), changed(OPTIONS).map(as_json)))
def test_fuzz_config(folder: Path, content: bytes) -> None:
    file = folder / "run.yaml"
    file.write_bytes(content)
    harmless(lambda: parse(RunConfig, ["--config", str(file)]))


def test_values_at_the_edge_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = "rank: '8'\nlearning_rate: 1e-4\nlora_layers: [--x, y]\noptimizer_args: {betas: [0.8, 0.9], fused: true}"
    file.write_text(text, encoding="utf-8")
    config = parse(RunConfig, ["--config", str(file)])
    assert (config.lora.rank, config.optim.learning_rate, config.lora.lora_layers) == (8, 1e-4, ("--x", "y"))
    options = method_options("optimizers", "adamw", config.optim.optimizer_args, {})
    assert options == replace(registry.load("optimizers", "adamw").Options(), betas=(0.8, 0.9), fused=True)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("--lora-layers", "lora_layers"),
        ("--rank=8", "rank"),
        ("-h", "h"),
        ("-1", None),
        ("-.5", None),
        ("- a dog", None),
        ("", None),
        ("a--b", None),
    ],
)
def test_what_is_a_flag(word: str, name: str | None) -> None:
    assert flag_in(word) == name
