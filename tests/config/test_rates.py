"""The learning rate of a run that was given none: of --learning_rate auto it is where the search begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamlora import registry
from dreamlora.cli.parse import parse_run
from dreamlora.config import PROGRAMS
from dreamlora.config.rates import default_rate
from dreamlora.sweep.plan import parse_entry

AUTO = ["--learning_rate", "auto"]


def usual(argv: list[str], program: str = "dreambooth") -> float:
    """Of a run with these flags."""
    config, _ = parse_run(argv, PROGRAMS[program])
    given = config.optim.learning_rate
    return given if isinstance(given, float) else default_rate(config)


@pytest.mark.parametrize("units", ["plain", "start"])
@pytest.mark.parametrize("model", ["tiny", "tiny-flow"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_auto_begins_where_the_run_without_it_would(
    program: str, model: str, units: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "check_needs", lambda *_: None)
    words = ["--pretrained_model_name_or_path", model, "--lora_units", units]
    found = {}
    for name in registry.names("optimizers"):
        own = [*words, "--optimizer", name]
        found[name] = usual([*own, *AUTO], program)
        assert found[name] == usual(own, program), name
        assert parse_entry(f"{name}+learning_rate=auto", words, PROGRAMS[program]).usual_lr == found[name]
    assert found["adamw"] != registry.load("optimizers", "adamw").DEFAULT_LR, "the preset has a better one"


def test_other_models_begin_at_the_optimizers_own(tmp_path: Path) -> None:
    words = ["--pretrained_model_name_or_path", str(tmp_path), "--instance_data_dir", str(tmp_path)]
    words += ["--instance_prompt", "a photo", "--optimizer", "lion"]
    assert usual([*words, *AUTO]) == registry.load("optimizers", "lion").DEFAULT_LR


def test_files_count_too(tmp_path: Path) -> None:
    files = {"rate": "learning_rate: 3e-3", "auto": "learning_rate: auto", "none": "learning_rate:"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")

    def of(*names: str) -> float:
        return usual([word for name in names for word in ("--config", str(tmp_path / f"{name}.yaml"))] + AUTO)

    assert of("rate") == of("rate", "auto") == 3e-3
    assert of("auto") == of() == usual([])
    assert (
        of("none")
        == registry.load("optimizers", "adamw").DEFAULT_LR
        == usual(["--config", str(tmp_path / "none.yaml")])
    )
