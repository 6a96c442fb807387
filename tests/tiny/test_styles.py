"""Built-in styles: pictures with captions, the same everywhere, with a split that training never sees."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dreamlora.data.folder import load_folder
from dreamlora.tiny import styles, world
from dreamlora.tiny.scenery import BACKGROUNDS
from dreamlora.tiny.shapes import KINDS


@pytest.mark.parametrize("style", styles.STYLES)
def test_pictures_are_reproducible_and_of_the_style(style: str) -> None:
    first, caption = styles.render(style, 3)
    again, same = styles.render(style, 3)
    assert first.size == (world.SIZE, world.SIZE) and np.array_equal(first, again) and caption == same
    assert not np.array_equal(first, styles.render(style, 4)[0])
    assert not np.array_equal(first, styles.render(style, 3, seed=1)[0])
    assert style not in caption and caption.startswith("a photo of ")


def test_a_woodcut_has_cut_lines_that_the_plain_world_lacks() -> None:
    def steps_down(image) -> float:
        """Mean difference of a pixel from the one above it."""
        return float(np.abs(np.diff(np.asarray(image.convert("L"), float), axis=0)).mean())

    rng = random.Random(0)
    plain = np.mean([steps_down(world.render(world.sample_scene(rng), rng)) for _ in range(20)])
    assert np.mean([steps_down(styles.render("woodcut", index)[0]) for index in range(20)]) > 2 * plain


def test_splits_never_share_a_triple() -> None:
    def triple_is_held_out(caption: str) -> bool:
        words = caption.split()
        kind = next(word for word in words if word in KINDS)
        colour = next(word for word in words if word in world.COLOURS)
        background = next(name for name, phrase in BACKGROUNDS.items() if caption.endswith(phrase))
        return world.is_held_out(kind, colour, background)

    for split in styles.SPLITS:
        captions = [styles.render("woodcut", index, split)[1] for index in range(30)]
        assert {triple_is_held_out(caption) for caption in captions} == {split == "holdout"}


def test_written_folder_is_a_captioned_data_set(tmp_path: Path) -> None:
    paths = styles.write_images(tmp_path, "woodcut", 3)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    records = load_folder(tmp_path).records
    assert [record.name for record in records] == [path.name for path in paths] == [row["file_name"] for row in rows]
    assert [record.caption for record in records] == [styles.render("woodcut", index)[1] for index in range(3)]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="unknown style 'etching'; choose from woodcut"):
        styles.render("etching", 0)
    with pytest.raises(ValueError, match="split must be one of"):
        styles.render("woodcut", 0, "test")
