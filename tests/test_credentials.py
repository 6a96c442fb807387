"""Secrets in command lines, options and messages, in all the ways that people give them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamlora.config import RunConfig
from dreamlora.credentials import HIDDEN, command_line, is_secret, masked, masked_command, masked_options
from dreamlora.errors import UserError
from dreamlora.report.facts import readable_command
from tests.fuzzing import fuzzed

TOKEN = "hf_" + "Ab1" * 12
GIVEN = {
    "two words": ["--hub_token", "hf_ab cd"],
    "behind =": ["--hub_token=hf_ab cd", "--rank", "4"],
    "with hyphens": ["--hub-token", "ab", "cd", "--rank", "4"],
    "cut short": ["--hub_toke", "ab cd"],
    "quotes": ["--hub_token", "ab'cd \"ab"],
    "a dash": ["--hub_token", "-abcd"],
    "a line": ["--hub_token", "ab\ncd"],
    "one dash": ["-hub_token", "ab cd"],
    "a variable": ["HF_TOKEN=ab cd", "WANDB_API_KEY=abcd"],
    "a method": ["--optimizers", "adamw+hub_token=abcd"],
    "another program's": ["--wandb_api_key", "ab cd"],
    "its form": ["--instance_prompt", f"hf_{'abcd' * 6}"],
    "an address": ["--dataset_name", "https://user:abcd@host/data"],
    "a token in an address": ["--dataset_name", "https://abcd@host/data"],
}


@pytest.mark.parametrize("words", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize(
    "write",
    [command_line, lambda words: masked_command(shlex.join(words)), lambda words: readable_command(shlex.join(words))],
    ids=["written", "read", "shown"],
)
def test_no_part_of_a_secret_stays_in_a_command(write: Callable[[list[str]], str], words: list[str]) -> None:
    text = write(["dreamlora", "dreambooth", *words, "--max_train_steps", "3", "--output_dir", "x" * 90])
    assert "ab" not in text and "cd" not in text and HIDDEN in text
    assert shlex.split(text.replace("\\\n", ""))[-3:-1] == ["3", "--output_dir"]


@fuzzed
@given(secret=st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Z", "C"]), min_size=4, max_size=40))
def test_fuzz_a_token_of_any_characters(secret: str) -> None:
    secret = f"§{secret}§"
    for words in (["--hub_token", secret], [f"--hub_token={secret}"], [f"HF_TOKEN={secret}"]):
        for text in (command_line(words), masked_command(shlex.join(words))):
            assert "§" not in text


@fuzzed
@given(text=st.text(max_size=200))
def test_fuzz_commands_of_strangers(text: str) -> None:
    """Their quotes may not be in order."""
    readable_command(text)
    assert "abcd" not in masked_command(f"{text} --hub_token 'abcd ")


@pytest.mark.parametrize(
    "words",
    [
        *(["--max_token_length", "77"], ["--instance_prompt", "a photo of sks token"], ["--rank", "4"]),
        *(["--tokenizer_name", "x"], ["--revision", "0123456789abcdef0123456789abcdef01234567"]),
        *(["--pretrained_model_name_or_path", "a/hf_model"], ["--dataset_name", "https://host/a@b"]),
        *(["--optimizer_args", "betas=0.9,0.99"], ["--output_dir", "outputs/hf_1"]),
    ],
    ids=" ".join,
)
def test_what_is_no_secret_stays(words: list[str]) -> None:
    assert command_line(words) == shlex.join(words) and masked(" ".join(words)) == " ".join(words)


def test_a_command_is_quoted_as_before() -> None:
    assert (
        command_line(["--instance_prompt", "a dog", "--hub_token", "x"]) == "--instance_prompt 'a dog' --hub_token ***"
    )


def test_options() -> None:
    options = {"hub_token": "ab", "rank": 4, "dataset_name": f"https://{TOKEN}@host", "none": None, "list": [TOKEN]}
    hidden = {"hub_token": HIDDEN, "dataset_name": f"https://{HIDDEN}@host", "list": [HIDDEN]}
    assert masked_options(options) == {**options, **hidden}
    assert masked_options({"hub_token": None}) == {"hub_token": None}


def test_every_option_of_a_run_whose_name_says_secret_is_one() -> None:
    from dreamlora.config import as_flat_dict

    assert [name for name in as_flat_dict(RunConfig()) if is_secret(name)] == ["hub_token"]


def test_errors_hold_none() -> None:
    told = str(UserError(f"Invalid header 'Bearer {TOKEN}' for https://me:{TOKEN}@host, HF_TOKEN={TOKEN}"))
    assert TOKEN not in told and told.count(HIDDEN) == 3


@pytest.mark.parametrize("words", [["--hub_token", "ab", "cd"], ["--hub_token", "ab", "cd", "--rank", "x"]])
def test_a_token_that_cannot_be_read_is_not_repeated(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from dreamlora.__main__ import main

    assert main(["dreambooth", *words]) == 2
    told = capsys.readouterr().err
    assert "--hub_token takes one value (got 2)" in told and "cd" not in told


def test_nor_one_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dreamlora.__main__ import main

    (tmp_path / "c.yaml").write_text("hub_token: [abab, cdcd]", encoding="utf-8")
    assert main(["dreambooth", "--config", str(tmp_path / "c.yaml")]) == 2
    told = capsys.readouterr().err
    assert "hub_token takes one value (got 2)" in told and "abab" not in told
