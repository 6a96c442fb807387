"""Class images: only the missing ones, the same ones whoever makes them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.sampler import SamplePlan, draw_batch
from dreamlora.training import prior
from dreamlora.training.prior import find_class_images, make_class_images

PLAN = SamplePlan(("a photo of a dog",), 2, 1.0, num_images_per_prompt=5, seed=100, batch_size=2)


class FakePipeline:
    """Draws a plain image whose shade is the first number of the image's generator."""

    def __init__(self, fail_after: int | None = None, value: float | None = None) -> None:
        self.scheduler = DDIMScheduler()
        self.components: dict[str, Any] = {}
        self.batches: list[int] = []
        self._fail_after = fail_after
        self._value = value

    def set_progress_bar_config(self, **config: Any) -> None: ...

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **options: Any) -> Any:
        if len(self.batches) == self._fail_after:
            raise KeyboardInterrupt
        self.batches.append(len(prompt))
        shades = [torch.rand((), generator=one).item() if self._value is None else self._value for one in generator]
        return SimpleNamespace(images=np.stack([np.full((4, 4, 3), shade, dtype=np.float32) for shade in shades]))


def drawer(make_pipeline: Callable[[], Any]) -> Callable[[], prior.Drawer]:
    """What draws class images with such a pipeline."""

    def make() -> prior.Drawer:
        pipeline = make_pipeline()
        return lambda items: draw_batch(pipeline, PLAN, items, lambda prompts: {"prompt": prompts})

    return make


def never() -> Any:
    raise AssertionError("nothing is missing: no pipeline should be loaded")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_makes_all_then_nothing(tmp_path: Path) -> None:
    pipeline = FakePipeline()
    assert make_class_images(tmp_path / "class", PLAN, drawer(lambda: pipeline)) == 5
    assert pipeline.batches == [2, 2, 1]
    names = [name[:6] for name in contents(tmp_path / "class")]
    assert names == ["00000-", "00001-", "00002-", "00003-", "00004-"]
    assert len(set(contents(tmp_path / "class").values())) == 5, "five seeds, five images"
    assert make_class_images(tmp_path / "class", PLAN, never) == 0


def test_goes_on_after_a_kill_with_the_same_images(tmp_path: Path) -> None:
    make_class_images(tmp_path / "whole", PLAN, drawer(FakePipeline))
    with pytest.raises(KeyboardInterrupt):
        make_class_images(tmp_path / "killed", PLAN, drawer(lambda: FakePipeline(fail_after=1)))
    assert len(contents(tmp_path / "killed")) == 2
    assert make_class_images(tmp_path / "killed", PLAN, drawer(FakePipeline)) == 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_partial_files_never_count(tmp_path: Path) -> None:
    make_class_images(tmp_path, PLAN, drawer(FakePipeline))
    whole = contents(tmp_path)
    third = sorted(tmp_path.iterdir())[2]
    third.rename(third.with_name(f".{third.name}.17.tmp.png"))
    empty = sorted(tmp_path.glob("*.png"))[-1]
    empty.write_bytes(b"")
    assert make_class_images(tmp_path, PLAN, drawer(FakePipeline)) == 2
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")} == whole


@pytest.mark.parametrize("world", [3, 8])
def test_processes_share_the_work(tmp_path: Path, world: int) -> None:
    make_class_images(tmp_path / "one", PLAN, drawer(FakePipeline))
    made = [
        make_class_images(tmp_path / "many", PLAN, drawer(FakePipeline), rank=rank, world=world)
        for rank in range(world)
    ]
    assert sum(made) == 5 and max(made) - min(made) <= 1
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def own(folder: Path, *names: str) -> None:
    """Images of a person's, all different."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 7, 7)).save(folder / name, format="PNG")


def test_images_of_a_person_count(tmp_path: Path) -> None:
    own(tmp_path, "my dog.JPG", "0-abc.png", ".hidden.png", "notes.md")
    assert make_class_images(tmp_path, PLAN, drawer(FakePipeline)) == 3
    assert make_class_images(tmp_path, PLAN, never) == 0


def test_all_images_of_a_person_count_however_many(tmp_path: Path) -> None:
    """And of those that were made, the first ones: as many as are missing to the number."""
    make_class_images(tmp_path, PLAN, drawer(FakePipeline))
    own(tmp_path, "z1.png", "z2.png", "z3.png")
    found = find_class_images(tmp_path, PLAN)
    assert [record.name[:5] for record in found.counted] == ["00000", "00001", "z1.pn", "z2.pn", "z3.pn"]
    assert (len(found.own), len(found.made), found.surplus, found.missing) == (3, 2, 3, ())
    own(tmp_path, *(f"z{number}.png" for number in range(7)))
    found = find_class_images(tmp_path, PLAN)
    assert [record.name for record in found.counted] == [f"z{number}.png" for number in range(7)]
    assert found.surplus == 5


def test_captions_beside_class_images_count(tmp_path: Path) -> None:
    own(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("a photo of an old dog", encoding="utf-8")
    found = find_class_images(tmp_path, PLAN)
    assert [record.caption for record in found.counted] == ["a photo of an old dog", "a photo of a dog"]


def test_images_in_sub_folders_alone_are_not_passed_over(tmp_path: Path) -> None:
    own(tmp_path, "dogs/a.png")
    for call in (find_class_images, lambda *given: make_class_images(*given, never)):
        with pytest.raises(UserError, match=r"only in sub-folders, .*give .*dogs, or an empty folder"):
            call(tmp_path, PLAN)
    own(tmp_path, "b.png")
    assert [record.name for record in find_class_images(tmp_path, PLAN).counted] == ["b.png"]


def test_a_folder_named_like_an_image_is_refused(tmp_path: Path) -> None:
    own(tmp_path, "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match=r"b\.png is a folder, not a file"):
        find_class_images(tmp_path, PLAN)


def test_no_folder_yet(tmp_path: Path) -> None:
    found = find_class_images(tmp_path / "new", PLAN)
    assert len(found.missing) == 5 and not found.counted and not (tmp_path / "new").exists()


def test_folders_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"--class_data_dir .*file is a file: give a folder"):
        make_class_images(tmp_path / "file", PLAN, never)
    with pytest.raises(UserError, match=r"cannot write .*below: Not a directory"):
        make_class_images(tmp_path / "file" / "below", PLAN, never)

    def refused(dir: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(prior.tempfile, "TemporaryFile", refused)
    with pytest.raises(UserError, match=r"cannot write .*classes: Permission denied"):
        make_class_images(tmp_path / "classes", PLAN, never)


def test_more_images_join(tmp_path: Path) -> None:
    make_class_images(tmp_path, PLAN, drawer(FakePipeline))
    more = SamplePlan(PLAN.prompts, 9, 7.5, num_images_per_prompt=7, seed=100, batch_size=4)
    assert make_class_images(tmp_path, more, drawer(FakePipeline)) == 2, "other denoising steps and guidance do no harm"
    fewer = SamplePlan(PLAN.prompts, 2, 1.0, num_images_per_prompt=3, seed=100)
    assert make_class_images(tmp_path, fewer, never) == 0


@pytest.mark.parametrize("changes", [{"prompts": ("a photo of a cat",)}, {"width": 64, "height": 64}])
def test_images_of_another_kind_are_not_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_class_images(tmp_path, PLAN, drawer(FakePipeline))
    other = SamplePlan(**{**vars(PLAN), **changes})
    with pytest.raises(UserError, match=r"another --class_data_dir"):
        make_class_images(tmp_path, other, never)
    with pytest.raises(UserError, match=r"another model"):
        make_class_images(tmp_path, PLAN, never, model_id="another")


@pytest.mark.parametrize(("value", "problem"), [(float("nan"), "not finite"), (0.0, "black")])
def test_broken_images_are_refused(tmp_path: Path, value: float, problem: str) -> None:
    with pytest.raises(UserError, match=rf"{problem}.*--prior_generation_precision"):
        make_class_images(tmp_path, PLAN, drawer(lambda: FakePipeline(value=value)))
    assert not contents(tmp_path)


def test_the_base_model_draws_them_as_the_run_says_that_it_predicts(
    train: Callable[..., RunFolder], tmp_path: Path
) -> None:
    quick = ["--max_train_steps", "1", "--sample_steps", "0", "--eval_steps", "0", "--checkpointing_steps", "0"]
    prior = ["--with_prior_preservation", "--class_prompt", "dog", "--num_class_images", "1"]
    for prediction in ("epsilon", "v_prediction"):
        train(*quick, *prior, "--prediction_type", prediction, "--output_dir", str(tmp_path / prediction / "run"))
    images = [next((tmp_path / name).rglob("class_images/*/*.png")) for name in ("epsilon", "v_prediction")]
    assert images[0].read_bytes() != images[1].read_bytes()
    assert images[0].name != images[1].name and images[0].parent.name != images[1].parent.name
