"""The procedural world: the same picture from the same seed, captions, and what is held out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dreamlora.tiny import world
from dreamlora.tiny.scenery import BACKGROUNDS


def pixels(scene: world.Scene, seed: int) -> np.ndarray:
    return np.asarray(world.render(scene, random.Random(seed)))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_same_seed_same_picture_other_seed_another(background: str) -> None:
    scene = world.Scene((world.Thing("star", "red", "striped", "small"),), background)
    assert pixels(scene, 3).shape == (64, 64, 3)
    assert np.array_equal(pixels(scene, 3), pixels(scene, 3))
    assert not np.array_equal(pixels(scene, 3), pixels(scene, 4))


@pytest.mark.parametrize("kind", world.KINDS)
@pytest.mark.parametrize("pattern", world.PATTERNS)
def test_a_thing_shows_its_colour(kind: str, pattern: str) -> None:
    picture = pixels(world.Scene((world.Thing(kind, "red", pattern, "large"),), "gray"), 0).astype(int)
    red = (picture[..., 0] > 180) & (picture[..., 1] < 80) & (picture[..., 2] < 80)
    assert red.mean() > 0.05


def test_first_of_a_pair_is_left_of_or_above_the_second() -> None:
    first, second = world.Thing("circle", "red"), world.Thing("circle", "blue")
    for relation, axis in (("next to", 1), ("above", 0)):
        picture = pixels(world.Scene((first, second), "white", relation), 1).astype(int)
        is_red = (picture[..., 0] > 150) & (picture[..., 2] < 90)
        is_blue = (picture[..., 2] > 150) & (picture[..., 0] < 90)
        assert np.argwhere(is_red).mean(0)[axis] + 20 < np.argwhere(is_blue).mean(0)[axis]


def test_training_and_evaluation_never_share_a_triple() -> None:
    rng = random.Random(0)

    def triples(held_out: bool) -> set[tuple[str, str, str]]:
        scenes = [world.sample_scene(rng, held_out) for _ in range(800)]
        scenes += [] if held_out else [world.sample_pair(rng) for _ in range(400)]
        return {(thing.kind, thing.colour, scene.background) for scene in scenes for thing in scene.things}

    training, evaluation = triples(False), triples(True)
    assert not training & evaluation
    assert all(world.is_held_out(*triple) for triple in evaluation)
    every = [(k, c, b) for k in world.KINDS for c in world.COLOURS for b in BACKGROUNDS]
    assert 0.08 < np.mean([world.is_held_out(*triple) for triple in every]) < 0.12


def test_the_held_out_split_is_the_same_on_every_machine() -> None:
    assert [b for b in BACKGROUNDS if world.is_held_out("circle", "red", b)] == HELD_OUT_RED_CIRCLES


HELD_OUT_RED_CIRCLES = ["sunset"]


def test_full_caption_names_every_attribute() -> None:
    thing = world.Thing("star", "orange", "striped", "large")
    assert world.describe(world.Scene((thing,), "snow")) == "a photo of a large orange striped star in the snow"
    pair = world.Scene((world.Thing("ring", "orange"), world.Thing("fish", "blue")), "grass", "above")
    assert world.describe(pair) == "a photo of an orange ring above a blue fish on grass"


def test_attributes_drop_out_of_one_caption_in_five() -> None:
    rng = random.Random(0)
    scene = world.Scene((world.Thing("star", "orange", "striped", "large"),), "snow")
    captions = [world.describe(scene, rng) for _ in range(2000)]
    for word in ("orange", "striped", "large", "snow"):
        assert 0.75 < np.mean([word in caption.split() for caption in captions]) < 0.85
    assert all("star" in caption.split() for caption in captions)
    rare = [any(token in caption.split() for token in world.RARE_TOKENS) for caption in captions]
    assert 0.02 < np.mean(rare) < 0.06


def test_vocabulary_holds_every_word_of_every_caption() -> None:
    rng, words = random.Random(0), set(world.vocabulary())
    scenes = [world.sample_scene(rng) for _ in range(500)] + [world.sample_pair(rng) for _ in range(200)]
    assert {word for scene in scenes for word in world.describe(scene, rng).split()} <= words


def test_things_stand_out_from_their_background() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = world.sample_scene(rng)
        assert world.visible(scene.things[0], scene.background)


def test_abstract_pictures_are_deterministic() -> None:
    first, again = (np.asarray(world.abstract(random.Random(9))) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape == (64, 64, 3)
