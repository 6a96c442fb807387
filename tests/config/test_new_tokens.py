"""``--new_tokens``: what it can say, and the one sentence for what it cannot."""

from __future__ import annotations

import pytest

from dreamlora.cli.parse import parse_run
from dreamlora.config import NewTokens, RunConfig
from dreamlora.config.new_tokens import NewToken, file_stem
from dreamlora.errors import UserError


@pytest.mark.parametrize(
    ("text", "meant"),
    {
        "sks": NewToken("sks", 1, ()),
        "sks=dog": NewToken("sks", 1, ("dog",)),
        "sks:4=dog": NewToken("sks", 4, ("dog",)),
        "sks:3": NewToken("sks", 3, ()),
        "<style>=painting,oil": NewToken("<style>", 2, ("painting", "oil")),
        "<style>=painting, oil": NewToken("<style>", 2, ("painting", "oil")),
        "<a:b>=c": NewToken("<a:b>", 1, ("c",)),
        "sks:3=red,dog": NewToken("sks", 3, ("red", "dog")),
    }.items(),
)
def test_what_a_token_says(text: str, meant: NewToken) -> None:
    assert NewToken.of(text) == meant


def test_names_of_vectors_are_those_of_diffusers() -> None:
    assert NewToken("sks", 3).pieces == ["sks", "sks_1", "sks_2"]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["=dog"], "no token before ="),
        (["sks="], "no word behind ="),
        (["sks= , "], "no word behind ="),
        (["sks:2=a,b,c"], "3 words for a token of 2 vectors"),
        (["sks:1=a,b"], "2 words for a token of 1 vector:"),
        (["sks:0"], "1 to 64 vectors (got 0)"),
        (["sks:65=dog"], "1 to 64 vectors (got 65)"),
        (["my dog=dog"], "'my dog' cannot be a token"),
        (["a,b=dog"], "'a,b' cannot be a token"),
        (["{}=dog"], "'{}' cannot be a token"),
        (["s\x00s=dog"], "cannot be a token"),
        (["x" * 51], "at most 50 characters"),
        (["Sks=dog"], "lower case alone, and so would find Sks nowhere: sks"),
        (["<>=dog"], "needs a letter or a digit"),
        (["sks=dog", "sks=cat"], "sks and sks cannot be told apart"),
        (["sks=dog", "<sks>=cat"], "sks and <sks> cannot be told apart"),
        (["sks:2=dog", "sks_1=cat"], "sks and sks_1 cannot be told apart"),
        (["<a>=dog", "[a]=cat"], "<a> and [a] would both be saved as a"),
        (["x" * 20000], "20,000 characters is too long"),
    ],
)
def test_what_no_token_can_be(tokens: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        NewTokens(new_tokens=tuple(tokens))
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"new_tokens_lr": 0.1}, "--new_tokens_lr is only used together with --new_tokens"),
        ({"new_tokens_end": 5.0}, "--new_tokens_end is only used"),
        ({"new_tokens_weight_decay": 0.1}, "--new_tokens_weight_decay is only used"),
        ({"new_tokens": ("sks",), "new_tokens_end": 0.0}, "must be above 0"),
        ({"new_tokens": ("sks",), "new_tokens_end": 2.5}, "a whole number of steps"),
        ({"new_tokens": ("sks",), "new_tokens_lr": -1.0}, "must be at least 0"),
        ({"new_tokens": tuple(f"<{n:03}>" for n in range(101))}, "100 are the most"),
    ],
)
def test_what_belongs_to_them(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        NewTokens(**options)


def test_files_are_named_after_tokens() -> None:
    assert [file_stem(token) for token in ("sks", "<my-style>", "a/b", "..")] == ["sks", "my-style", "ab", ""]


def test_the_command_line_takes_several() -> None:
    config, _ = parse_run(["--new_tokens", "sks=dog", "<style>=painting,oil", "--new_tokens_end", "0.5"])
    assert config.tokens.tokens == [NewToken("sks", 1, ("dog",)), NewToken("<style>", 2, ("painting", "oil"))]
    assert config.tokens.new_tokens_end == 0.5 and config.encodes_in_training
    assert not RunConfig().encodes_in_training
