"""Options of the times of rectified flows: what they become, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dreamlora.cli.parse import parse_run
from dreamlora.config import RunConfig, Train, as_flat_dict
from dreamlora.config.times import sampling_of
from dreamlora.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_shift": "often"}, r"--timestep_shift must be none, scheduler or a number above 0 \(got 'often'\)"),
        ({"timestep_shift": "0"}, "--timestep_shift must be none, scheduler or a number above 0"),
        ({"timestep_shift": "-3"}, "--timestep_shift must be"),
        ({"timestep_shift": "inf"}, "--timestep_shift must be"),
        ({"timestep_shift": "nan"}, "--timestep_shift must be"),
        ({"timestep_shift": ""}, "--timestep_shift must be"),
        ({"timestep_beta": (0.0, 2.0)}, r"--timestep_beta must be two numbers from 0.05 to 100 \(got 0 2\)"),
        ({"timestep_beta": (2.0, 1000.0)}, "--timestep_beta must be two numbers"),
        ({"timestep_beta": (2.0, float("nan"))}, r"--timestep_beta must be finite \(got nan\)"),
        ({"timestep_sampling": "table"}, "--timestep_sampling table needs --timestep_table"),
        ({"timestep_table": ("1", "x")}, r"--timestep_table must hold numbers of at least 0 \(got 'x'\)"),
        ({"timestep_table": ("1", "-1")}, "--timestep_table must hold numbers of at least 0"),
        ({"timestep_table": ("1", "nan")}, "--timestep_table must hold numbers of at least 0"),
        ({"timestep_table": ("0", "0")}, "--timestep_table must hold from 2 to 10,000 shares, one of them above 0"),
        ({"timestep_table": ("3",)}, "--timestep_table must hold from 2 to 10,000 shares"),
        ({"timestep_table": ("1",) * 10_001}, "--timestep_table must hold from 2 to 10,000 shares"),
        ({"timestep_table": ("no/such.txt",)}, "--timestep_table no/such.txt: there is no such file"),
        (
            {"weighting_scheme": "mode", "timestep_sampling": "beta"},
            "--weighting_scheme mode draws times by that density, and --timestep_sampling beta by another",
        ),
        ({"unmasked_weight": -0.1}, r"--unmasked_weight must be from 0 to 1 \(got -0.1\)"),
        ({"unmasked_weight": 1.5}, "--unmasked_weight must be from 0 to 1"),
        ({"unmasked_weight": float("nan")}, "--unmasked_weight must be from 0 to 1"),
        ({"huber_c": 0.0}, "--huber_c must be above 0"),
        ({"huber_scale": 0.0}, "--huber_scale must be above 0"),
        ({"sigmoid_scale": 0.0}, "--sigmoid_scale must be above 0"),
        ({"precondition_outputs": 2}, "--precondition_outputs must be at least 0 and below 2"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        Train(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"weighting_scheme": "none"}, None),
        ({"weighting_scheme": "sigma_sqrt"}, "uniform"),
        ({"weighting_scheme": "cosmap"}, "uniform"),
        ({"weighting_scheme": "logit_normal"}, "logit_normal"),
        ({"weighting_scheme": "mode", "timestep_sampling": "mode"}, "mode"),
        ({"weighting_scheme": "cosmap", "timestep_sampling": "sigmoid"}, "sigmoid"),
        ({"timestep_sampling": "uniform"}, "uniform"),
    ],
)
def test_the_density_that_options_name(options, expected) -> None:
    assert sampling_of(Train(**options)) == expected


def test_a_table_is_read_from_its_file_and_saved_by_its_numbers(tmp_path: Path) -> None:
    """A run is gone on with by what it was, wherever the file is now."""
    file = tmp_path / "times.txt"
    file.write_text("0.5, 1\n2 0\n", encoding="utf-8")
    config, _ = parse_run(["--timestep_sampling", "table", "--timestep_table", str(file)])
    assert config.train.timestep_table == ("0.5", "1", "2", "0")
    by_hand, _ = parse_run(["--timestep_sampling", "table", "--timestep_table", "0.5", "1.0", "2", "0"])
    assert by_hand.train == config.train
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump({"timestep_table": as_flat_dict(config)["timestep_table"]}), encoding="utf-8")
    assert parse_run(["--config", str(saved)])[0].train.timestep_table == config.train.timestep_table


@pytest.mark.parametrize("content", [b"", b"1 2 three", b"\xff\xfe1 2", b"7"])
def test_a_file_that_holds_no_table_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "times.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=str(file)):
        Train(timestep_table=(str(file),))


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder"):
        Train(timestep_table=(str(tmp_path),))


@pytest.mark.parametrize("text", ["3", "3.0", "3e0"])
def test_one_shift_is_one_text(text: str, tmp_path: Path) -> None:
    """However it is spelled: a resumed run is compared with what was saved."""
    file = tmp_path / "flags.yaml"
    file.write_text(f"timestep_shift: {text}\n", encoding="utf-8")
    for words in (["--timestep_shift", text], ["--config", str(file)]):
        assert parse_run(words)[0].train.timestep_shift == "3"
    assert RunConfig().train.timestep_shift is None
