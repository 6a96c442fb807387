"""From names and images to values: what is left out, and what is said of it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreamlora import registry
from dreamlora.commands.evaluate.table import table
from dreamlora.data.cache import TensorCache
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.evaluation.embed import Embedder
from dreamlora.evaluation.measure import MeasuredImages, load_metric, measure
from dreamlora.interfaces import EncoderRole, MetricInputs, Reading
from dreamlora.metric_names import main_values
from tests.evaluation.test_embed import Colours, record

ALL = registry.names("metrics")
SHADES = [(200, 30, 10), (30, 220, 40), (90, 90, 20), (10, 40, 240), (120, 10, 130), (77, 99, 5)]


@pytest.fixture
def gallery() -> MeasuredImages:
    """Four images of two prompts, the second without the subject; two references, two training images."""
    records = [record(shade) for shade in SHADES]
    return MeasuredImages(
        generated=records[:4],
        groups=[0, 0, 1, 1],
        with_subject=[True, True, False, False],
        texts=["a dog", "a dog", "a cat on a mat", "a cat on a mat"],
        references=records[4:],
        training=records[2:4],
        base=records[1:5],
    )


@pytest.fixture
def embedder(tmp_path: Path) -> Embedder:
    return Embedder(Colours(), TensorCache(tmp_path / "cache"))


def test_every_plug_in_keeps_the_contract(gallery: MeasuredImages, embedder: Embedder) -> None:
    found = measure(ALL, gallery, lambda role: embedder)
    names = [value.name for value in found.values]
    for name in ALL:
        metric = load_metric(name)
        assert metric.NAME in names and metric.ENCODER in ("clip", "dino", "features")
        assert {"prompts", "references", "training", "base"} >= metric.NEEDS
        assert isinstance(metric.HIGHER_IS_BETTER, bool)
        assert isinstance(metric.SELECTS, bool) and isinstance(metric.COMPARES_SETS, bool)
        assert metric.NAME.startswith("img/") and len(metric.ABOUT) > 20
    assert main_values(names) == [load_metric(name).NAME for name in ALL], "no metric is named like a part of another"
    assert {load_metric(name).NAME for name in ALL if not load_metric(name).SELECTS} == {"img/fd"}
    assert len(set(names)) == len(names)
    for value in found.values:
        assert value.encoder_id == "colours" and value.n in (2, 4) and value.n_other in (None, 2)
        assert torch.tensor(value.value).isfinite()


@pytest.mark.parametrize("name", ALL)
def test_the_values_are_those_of_the_pure_function(name: str, gallery: MeasuredImages, embedder: Embedder) -> None:
    """Of the vectors of these images, prompts and groups, put together by hand."""

    def colours(records: Sequence[ImageRecord]) -> Tensor:
        return torch.tensor(
            [ast.literal_eval(record.name.removesuffix(".png")) for record in records], dtype=torch.float32
        )

    sides = {side: colours(getattr(gallery, side)) for side in ("generated", "references", "training", "base")}
    prompts = torch.tensor([[5.0, 1, 1], [5, 1, 1], [14, 1, 1], [14, 1, 1]])
    labels = torch.tensor(gallery.groups), torch.tensor(gallery.with_subject)
    expected = load_metric(name).compute(MetricInputs(sides.pop("generated"), *labels, prompts=prompts, **sides))
    found = measure([name], gallery, lambda role: embedder).values
    assert [value.value for value in found] == pytest.approx([expected.value, *expected.parts.values()], rel=1e-6)
    assert {(value.n, value.n_other) for value in found} == {(expected.n, expected.n_other)}


def test_images_and_texts_are_encoded_once_for_all_metrics(gallery: MeasuredImages, embedder: Embedder) -> None:
    measure(ALL, gallery, lambda role: embedder)
    assert isinstance(embedder.encoder, Colours)
    assert sum(embedder.encoder.seen) == len(SHADES) + 2


def test_what_cannot_be_computed_is_left_out_with_the_reason(embedder: Embedder) -> None:
    alone = MeasuredImages([record(SHADES[0])], [0], [True], references=[record(SHADES[1])], base=[record(SHADES[0])])
    found = measure(ALL, alone, lambda role: embedder)
    assert [value.name for value in found.values] == ["img/clip_i", "img/dino"]
    notes = "\n".join(found.notes)
    for part in (
        "clip_score is left out: the images' prompts are not known",
        "copy is left out: the training images are not known",
        "kid is left out: kid needs at least 2 images on each side (got 1 and 1)",
        "fid is left out: fd needs at least 2 images on each side (got 1 and 1)",
        "diversity is left out: diversity needs two images of a prompt",
        "drift is left out: drift needs a prompt without the subject",
    ):
        assert part in notes


def test_an_encoder_that_cannot_be_loaded_ends_nothing(gallery: MeasuredImages, embedder: Embedder) -> None:
    asked = []

    def embedder_of(role: EncoderRole) -> Embedder:
        asked.append(role)
        if role == "clip":
            raise UserError("--clip_model: there is no folder x")
        return embedder

    found = measure(["clip_score", "clip_i", "dino"], gallery, embedder_of)
    assert [value.name for value in found.values] == ["img/dino"]
    assert found.notes[0] == "clip_score is left out: --clip_model: there is no folder x"
    assert asked == ["clip", "dino"]


def test_warnings_become_notes_and_a_broken_image_leaves_metrics_out(
    gallery: MeasuredImages, embedder: Embedder
) -> None:
    found = measure(["fid"], gallery, lambda role: embedder)
    assert found.notes == ["fid: fd of 2 and 2 images in 3 dimensions is rank-deficient: biased upward"]
    black = MeasuredImages([record((0, 0, 0))], [0], [True], references=gallery.references)
    (note,) = measure(["dino"], black, lambda role: embedder).notes
    assert note.startswith("dino is left out: the embedding of (0, 0, 0).png is zero or not finite: look at the image")


@pytest.mark.usefixtures("glow")
def test_a_metric_that_was_put_into_the_folder_has_its_column(gallery: MeasuredImages, embedder: Embedder) -> None:
    """With what it says besides its main value behind it, and told by the plug-in which way is better."""
    found = measure(["glow"], gallery, lambda role: embedder)
    assert [(value.name, value.n, value.n_other) for value in found.values] == [
        ("img/glow", 4, 2),
        ("img/glow_spread", 4, 2),
    ]
    head, row, _, legend = table({"dog": found}).splitlines()
    assert head.split() == ["glow", "↓"] and legend == "glow: 4 against 2 images, colours"
    assert row.split() == ["dog", *"{:.4f} (spread {:.3f})".format(*(value.value for value in found.values)).split()]


def test_the_table_shows_values_tests_and_alarms(
    gallery: MeasuredImages, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alarming(inputs: MetricInputs) -> Reading:
        return Reading(-0.5, 4, 2, {"p": 0.999, "negative": 1.0})

    monkeypatch.setattr(load_metric("kid"), "compute", alarming)
    rows = {
        "base model": measure(["dino"], gallery, lambda role: embedder),
        "dog\nstep 5": measure(["dino", "kid", "fid"], gallery, lambda role: embedder),
    }
    lines = table(rows).splitlines()
    assert lines[0].split() == ["dino", "↑", "kid", "↓", "fd", "↓"]
    assert lines[1].startswith("base model") and lines[1].split()[-2:] == ["–", "–"]
    assert lines[2].startswith("dog, step 5") and "−0.5000 (p 0.999) copies!" in lines[2]
    assert "fd: 2 against 2 images, colours; never choose by it" in lines
    assert lines[-1].startswith("note: fid: fd of 2 and 2") and lines[-1].endswith("(dog, step 5)")
