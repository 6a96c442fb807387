"""The images of an evaluation are shared out evenly among the processes, and their names tell what they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamlora.commands.evaluate.drawing import Sheet, share_of
from dreamlora.sampling.sampler import SamplePlan


def sheet(folder: Path, images: int) -> Sheet:
    return Sheet(folder, SamplePlan(("a dog",), 2, 1.0, num_images_per_prompt=images), {"model": "sd"})


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("images", "there"),
    [([1] * 9, []), ([8, 8], [0, 2, 4, 6]), ([2, 5, 1], []), ([3, 3], range(3))],
    ids=["one each", "every other one is there", "some", "one sheet is whole"],
)
def test_every_process_draws_as_many_images_as_the_others(
    images: list[int], there: list[int], world: int, tmp_path: Path
) -> None:
    """Else the others would wait for one, and a collective is not waited in for longer than ten minutes."""
    sheets = [sheet(tmp_path / str(number), count) for number, count in enumerate(images)]
    for number in there:
        file = sheets[0].file(sheets[0].plan.items()[number])
        file.parent.mkdir(exist_ok=True)
        file.write_text("drawn before", encoding="utf-8")
    jobs = [(number, item) for number, one in enumerate(sheets) for item in one.missing()]
    shares = [share_of(jobs, rank, world) for rank in range(world)]
    counts = [sum(map(len, share.values())) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert [(number, item) for share in shares for number, items in share.items() for item in items] == jobs
    assert sum(counts) == sum(images) - len(there)


def test_an_empty_file_is_missing(tmp_path: Path) -> None:
    one = sheet(tmp_path, 2)
    for item in one.plan.items():
        one.file(item).touch()
    assert one.missing() == one.plan.items()
