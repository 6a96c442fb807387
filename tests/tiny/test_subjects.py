"""The held-out subjects: counts, determinism, disjoint splits, and that they differ from their class."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlora.tiny import subjects, world


def array(subject: str, index: int, split: str = "train", seed: int = 0) -> np.ndarray:
    return np.asarray(subjects.render(subject, index, split, seed)[0])


def test_at_least_three_subjects_of_known_classes() -> None:
    assert len(subjects.SUBJECTS) >= 3
    for name in subjects.SUBJECTS:
        assert subjects.class_word(name) in world.KINDS
    assert subjects.instance_prompt("checkerling") == "a photo of sks creature"
    assert subjects.class_prompt("checkerling") == "a photo of a creature"


@pytest.mark.parametrize("subject", subjects.SUBJECTS)
def test_enough_different_pictures_and_disjoint_splits(subject: str) -> None:
    train = {array(subject, i).tobytes() for i in range(16)}
    held_out = {array(subject, i, "holdout").tobytes() for i in range(64)}
    assert len(train) == 16
    assert len(held_out) == 64
    assert not train & held_out
    assert len({subjects.render(subject, i, "holdout")[1].background for i in range(14)}) == 14


@pytest.mark.parametrize("subject", subjects.SUBJECTS)
def test_same_arguments_same_picture(subject: str) -> None:
    assert np.array_equal(array(subject, 5), array(subject, 5))
    assert not np.array_equal(array(subject, 5), array(subject, 5, seed=1))


@pytest.mark.parametrize("subject", subjects.SUBJECTS)
def test_captions_use_the_rare_token_and_known_words(subject: str) -> None:
    view = subjects.render(subject, 0)[1]
    assert view.caption.startswith(subjects.instance_prompt(subject))
    assert set(view.caption.split()) <= set(world.vocabulary())


@pytest.mark.parametrize("subject", subjects.SUBJECTS)
def test_subject_colours_are_not_those_of_one_thing_of_its_class(subject: str) -> None:
    """On a plain background, the subject has more strong colours than any class member."""
    rng = random.Random(0)

    def hues(picture: np.ndarray) -> int:
        rgb = picture[8:-8, 8:-8].reshape(-1, 3).astype(int)
        strong = rgb[rgb.max(1) - rgb.min(1) > 90]
        bins = np.bincount((np.array([_hue(c) for c in strong]) * 12).astype(int), minlength=12)
        return int((bins > 25).sum())

    index = next(i for i in range(14) if subjects.render(subject, i)[1].background in ("white", "gray", "black"))
    word = subjects.class_word(subject)
    members = [world.Scene((world.Thing(word, c),), "gray") for c in ("red", "blue", "yellow", "green", "purple")]
    most = max(hues(np.asarray(world.render(scene, rng))) for scene in members)
    assert hues(array(subject, index)) >= most


def _hue(rgb: np.ndarray) -> float:
    import colorsys

    return colorsys.rgb_to_hsv(*(rgb / 255))[0] * 0.999


def test_written_images_are_the_rendered_ones(tmp_path: Path) -> None:
    paths = subjects.write_instance_images(tmp_path / "new" / "folder", "bannerfish", 12)
    assert len(paths) == 12 == len(list((tmp_path / "new" / "folder").iterdir()))
    with Image.open(paths[7]) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), array("bannerfish", 7))


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown subject 'dog'; choose from checkerling, "):
        subjects.render("dog", 0)
    with pytest.raises(ValueError, match="split='test'"):
        subjects.render("checkerling", 0, "test")
