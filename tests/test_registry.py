"""Plug-ins by file name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamlora import registry
from dreamlora.errors import UserError


def test_names_are_the_files_of_the_folder() -> None:
    files = (Path(registry.__file__).parent / "optimizers").glob("[!_]*.py")
    assert registry.names("optimizers") == sorted(file.stem for file in files)
    assert {"adamw", "scaled_adamw"} <= set(registry.names("optimizers"))


@pytest.mark.parametrize("spelling", ["scaled_adamw", "Scaled-AdamW", "SCALED_ADAMW", "ScaledAdamW"])
def test_case_hyphens_and_underscores_do_not_matter(spelling: str) -> None:
    assert registry.check("optimizers", spelling) == "scaled_adamw"


def test_a_wrong_name_lists_the_choices_and_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        registry.load("optimizers", "adamv")
    assert "unknown name 'adamv' among the optimizers: choose one of adafactor, adamw, " in str(error.value)
    assert "Did you mean 'adamw'?" in str(error.value)


@pytest.mark.parametrize("name", ["_pairs", "__init__", "../cli", "errors"])
def test_support_code_and_other_modules_are_no_plugins(name: str) -> None:
    with pytest.raises(UserError):
        registry.check("optimizers", name)


@pytest.mark.parametrize("name", registry.names("optimizers"))
def test_every_optimizer_keeps_the_contract(name: str) -> None:
    module = registry.load("optimizers", name)
    assert module.DEFAULT_LR > 0 and callable(module.build) and module.Options()
    assert module.__doc__
    # its rate in units of the start, or that it has such units by itself
    assert getattr(module, "START_LR", 0) > 0 or module.UNITS_FREE


@pytest.fixture
def extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PACKAGE", tmp_path)
    (tmp_path / "optimizers").mkdir()
    (tmp_path / "optimizers" / "brand_new.py").write_text("", encoding="utf-8")


def test_a_new_file_is_a_new_choice(extended: None) -> None:
    assert registry.names("optimizers") == ["brand_new"]
    assert registry.check("optimizers", "Brand-New") == "brand_new"
