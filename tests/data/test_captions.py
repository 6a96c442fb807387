"""Caption dropout and tag shuffle: pure functions of the sample position."""

from __future__ import annotations

import pytest

from dreamlora.data.captions import CaptionPlan

TAGS = "a, b, c, d, e"


def drawn(plan: CaptionPlan, *captions: str, count: int = 400) -> list[str]:
    return [plan.draw(captions or (TAGS,), "instance", position) for position in range(count)]


def test_nothing_happens_by_default() -> None:
    assert CaptionPlan().texts((TAGS,)) == [TAGS] and set(drawn(CaptionPlan())) == {TAGS}


def test_orders_are_permutations_and_keep_the_first() -> None:
    texts = CaptionPlan(shuffle_tags=True, keep_tags=2, variants=8).texts((TAGS,))
    assert len(texts) == 8 and len(set(texts)) > 3
    for text in texts:
        assert text.startswith("a, b, ") and sorted(text.split(", ")) == list("abcde")


@pytest.mark.parametrize(("caption", "keep"), [("a photo of a dog", 0), ("a, b", 1), ("a, b", 2), ("", 0)])
def test_nothing_to_shuffle(caption: str, keep: int) -> None:
    assert CaptionPlan(shuffle_tags=True, keep_tags=keep).texts((caption,)) == [caption]


def test_what_is_drawn_was_encoded_and_all_of_it_is_drawn() -> None:
    plan = CaptionPlan(dropout=0.25, shuffle_tags=True, variants=3, seed=5)
    texts = drawn(plan)
    assert set(texts) == {"", *plan.texts((TAGS,))}
    assert texts == drawn(plan) and texts != drawn(CaptionPlan(0.25, True, 0, 3, seed=6))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_share_of_dropped_captions(dropout: float) -> None:
    texts = drawn(CaptionPlan(dropout=dropout), count=2000)
    assert texts.count("") / 2000 == pytest.approx(dropout, abs=0.04)
    assert set(texts) == {"", TAGS}


def test_sources_and_positions_have_draws_of_their_own() -> None:
    plan = CaptionPlan(dropout=0.5)
    assert [plan.draw(("x",), "class", p) for p in range(100)] != [plan.draw(("x",), "instance", p) for p in range(100)]


# several captions


def test_each_of_several_captions_is_drawn_as_often() -> None:
    texts = drawn(CaptionPlan(), "one", "two", "three", count=3000)
    assert {text: round(texts.count(text) / 3000, 1) for text in texts} == dict.fromkeys(("one", "two", "three"), 0.3)
    assert texts == drawn(CaptionPlan(), "one", "two", "three", count=3000)
    assert texts != drawn(CaptionPlan(seed=1), "one", "two", "three", count=3000)


def test_which_caption_is_drawn_leaves_the_other_draws_alone() -> None:
    """An image with one caption sees what it saw before others had several; so does a second one that is the same."""
    plan = CaptionPlan(dropout=0.25, shuffle_tags=True, variants=3, seed=5)
    assert drawn(plan, TAGS, TAGS) == drawn(plan, TAGS)


def test_all_of_several_captions_are_encoded_and_drawn() -> None:
    plan = CaptionPlan(dropout=0.2, shuffle_tags=True, variants=2)
    assert set(drawn(plan, TAGS, "x, y, z", "w")) == {"", *plan.texts((TAGS, "x, y, z", "w"))}
