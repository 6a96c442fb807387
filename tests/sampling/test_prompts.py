from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given

from dreamlora.config import Sample
from dreamlora.errors import UserError
from dreamlora.sampling.prompts import UNKNOWN, Subject, read_prompts, sample_prompts, with_subject
from dreamlora.tiny import world
from dreamlora.tiny.scenery import BACKGROUNDS
from dreamlora.tiny.shapes import KINDS
from tests.fuzzing import damaged, fuzzed, harmless

LISTS = Path(__file__).parents[2] / "prompts"


def write(folder: Path, text: str) -> Path:
    file = folder / "prompts.txt"
    file.write_text(text, encoding="utf-8")
    return file


def test_one_per_line(tmp_path: Path) -> None:
    file = write(tmp_path, "\ufeff# a comment\n\n  a {} in the snow \r\na cat, {}\nünï © 漢\n")
    assert read_prompts(file, Subject("sks dog")) == ("a sks dog in the snow", "a cat, sks dog", "ünï © 漢")


def test_placeholder_without_subject_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\.txt, line 3: .*a \{\} in the snow"):
        read_prompts(write(tmp_path, "# one\na cat\na {} in the snow\n"))


@pytest.mark.parametrize("flag", ["validation_prompt", "negative_prompt"])
def test_placeholders_in_flags_are_those_of_files(flag: str) -> None:
    sample = Sample(**{flag: "a {} in the snow"})
    assert getattr(with_subject(sample, Subject("sks dog")), flag) == "a sks dog in the snow"
    with pytest.raises(UserError, match=rf"--{flag}: nothing to put in place of \{{\}} in \"a \{{\}} in the snow\""):
        with_subject(sample, UNKNOWN)


def test_the_validation_prompt_is_drawn_with_the_subject() -> None:
    subject = Subject.of("a photo of sks dog")
    prompts = sample_prompts(Sample(validation_prompt="a {} in the snow"), subject)
    assert prompts == ("a photo of sks dog", "a sks dog in the snow")


@pytest.mark.parametrize("prompts", [("a photo of {}", None), ("a photo of sks dog", "a photo of a {}")])
def test_prompts_that_the_subject_is_read_from_take_no_placeholder(prompts: tuple[str, str | None]) -> None:
    flag = "class_prompt" if prompts[1] else "instance_prompt"
    with pytest.raises(UserError, match=rf"--{flag} .*no meaning here"):
        Subject.of(*prompts)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_no_prompts(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"prompts\.txt holds no prompts"):
        read_prompts(write(tmp_path, text))


def test_prompts_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer takes a minute for a megabyte."""
    long = "x" * 10_001
    with pytest.raises(UserError, match=r"prompts\.txt, line 2: a text of 10,001 characters is too long: 10,000 are"):
        read_prompts(write(tmp_path, f"a dog\n{long}"))
    assert read_prompts(write(tmp_path, "x" * 10_000)) == ("x" * 10_000,)
    with pytest.raises(UserError, match=r"holds 100,001 prompts: 100,000 are the most"):
        read_prompts(write(tmp_path, "a\n" * 100_001))
    with pytest.raises(UserError, match=r"prompts\.txt: it has more than the 16 MiB"):
        read_prompts(write(tmp_path, "#" * (2**24 + 1)))
    for subject in ({"instance_prompt": long}, {"instance_prompt": None, "class_prompt": long}):
        with pytest.raises(UserError, match=r"--(instance|class)_prompt: a text of 10,001 characters"):
            Subject.of(**subject)


def test_what_takes_a_placeholder_s_place_has_a_bound_too(tmp_path: Path) -> None:
    subject = Subject("x" * 9000)
    with pytest.raises(UserError, match=r"line 1: a text of 18,\d+ characters is too long"):
        read_prompts(write(tmp_path, "{} and {}"), subject)


def test_pipes_and_devices_hold_no_prompts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=r"it is a (pipe or device|folder), not a file"):
            read_prompts(place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@fuzzed
@given(content=damaged("# list\na photo of {}\n日本の犬\n".encode()))
def test_fuzz_prompts(folder: Path, content: bytes) -> None:
    file = folder / "prompts.txt"
    file.write_bytes(content)
    harmless(lambda: read_prompts(file, Subject("sks dog")))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.txt"):
        read_prompts(tmp_path / "missing.txt")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"image\.png"):
        read_prompts(tmp_path / "image.png")


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("a photo of sks dog", "sks dog"),
        ("A photo of a sks dog.", "sks dog"),
        ("sks dog", "sks dog"),
        ("a painting of the old bridge", "old bridge"),
        ("", None),
        (None, None),
    ],
)
def test_the_subject_of_a_prompt(prompt: str | None, subject: str | None) -> None:
    assert Subject.of(prompt).name == subject
    assert Subject.of(prompt, name="rex").name == "rex"


def test_prompts_of_a_run(tmp_path: Path) -> None:
    instance, general = "a photo of sks dog", "a photo of a dog"
    assert sample_prompts(Sample(), Subject.of(instance, general)) == (instance, general)
    assert sample_prompts(Sample(validation_prompt=instance), Subject.of(instance)) == (instance,), "each once"
    file = write(tmp_path, "a {} on grass\n")
    assert sample_prompts(Sample(sample_prompts=file, validation_prompt="x"), Subject.of(instance)) == (
        "a sks dog on grass",
        "x",
    )
    with pytest.raises(UserError, match="--sample_steps 0"):
        sample_prompts(Sample())


@pytest.mark.parametrize("name", ["dreambooth_objects", "dreambooth_live_subjects"])
def test_the_dreambooth_lists_are_whole(name: str) -> None:
    prompts = read_prompts(LISTS / f"{name}.txt", Subject("sks dog"))
    assert len(set(prompts)) == 25
    assert all(prompt.count("sks dog") == 1 for prompt in prompts)
    assert prompts[0] == "a sks dog in the jungle"
    assert prompts[-1] == "a cube shaped sks dog"


def test_the_demo_list_uses_the_embedded_model_s_words() -> None:
    from dreamlora.tiny.world import vocabulary

    words = {word for prompt in read_prompts(LISTS / "demo.txt", Subject("sks creature")) for word in prompt.split()}
    assert words <= set(vocabulary())


@pytest.mark.parametrize(
    ("prompt", "named", "scored"),
    [
        ("a photo of sks dog in the snow", True, "a photo of dog in the snow"),
        ("a red SKS dog, asleep", True, "a red dog, asleep"),
        ("a dog, sks", True, "a dog,"),
        ("a photo of a dog", False, "a photo of a dog"),
        ("the tasks of a dog", False, "the tasks of a dog"),
    ],
)
def test_a_prompt_names_the_subject_and_is_scored_without_its_rare_token(prompt: str, named: bool, scored: str) -> None:
    assert Subject("sks dog").is_in(prompt) is named
    assert Subject("sks dog", class_prompt="a photo of a dog").scored_text(prompt) == scored
    assert Subject("sks dog").scored_text(prompt) == scored, "the first word is the rare one"
    assert UNKNOWN.is_in(prompt) and UNKNOWN.scored_text(prompt) == prompt


def test_the_class_takes_the_place_of_a_name_and_without_it_the_name_stays() -> None:
    assert Subject("Rex").scored_text("a photo of Rex") == "a photo of Rex"
    assert (
        Subject("Rex", class_prompt="a photo of a big dog").scored_text("a photo of Rex and Rex")
        == "a photo of big dog and"
    )
    assert Subject("dog", class_prompt="a photo of a dog").scored_text("a photo of a dog") == "a photo of a dog"
    assert Subject("sks teddy bear").scored_text("a sks teddy bear") == "a teddy bear"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dreambooth_objects", 25),
        ("dreambooth_live_subjects", 25),
        ("text_to_image", 25),
        ("demo", 7),
        ("demo_style", 7),
        ("demo_evaluation", 48),
    ],
)
def test_the_lists_are_complete(name: str, count: int) -> None:
    prompts = read_prompts(LISTS / f"{name}.txt", Subject("sks dog"))
    assert len(prompts) == len(set(prompts)) == count
    assert f"`{name}.txt`" in (LISTS / "README.md").read_text(encoding="utf-8")
    assert any("sks dog" in prompt for prompt in prompts) == (name.startswith("dreambooth") or name == "demo")


def test_demo_evaluation_shows_what_training_never_does() -> None:
    for prompt in read_prompts(LISTS / "demo_evaluation.txt"):
        words = prompt.split()
        kind = next(word for word in words if word in KINDS)
        colour = next(word for word in words if word in world.COLOURS)
        background = next(name for name, phrase in BACKGROUNDS.items() if prompt.endswith(phrase))
        assert world.is_held_out(kind, colour, background), prompt
