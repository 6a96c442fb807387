"""Item losses: paired differences, and the file."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamlora.errors import UserError
from dreamlora.eval_loss.items import ItemLosses, paired_difference, values_of
from tests.fuzzing import changed, damaged, fuzzed, harmless, odd_values


def test_the_difference_is_paired() -> None:
    """Against the textbook: mean and standard error of d = a - b, whatever the spread of a and b."""
    random = np.random.default_rng(0)
    level = random.lognormal(size=64)  # the times: nearly all of the spread
    apart = random.normal(0.01, 0.02, 64)
    found = paired_difference(level + apart, level)
    assert found.n == 64
    assert found.mean == pytest.approx(apart.mean(), rel=1e-9)
    assert found.se == pytest.approx(math.sqrt(((apart - apart.mean()) ** 2).sum() / 63 / 64), rel=1e-9)
    assert found.standard_errors == pytest.approx(found.mean / found.se)
    assert found.se < level.std() / 8 / 20


def test_differences_without_spread() -> None:
    items = np.array([1.0, 2.0])
    assert paired_difference(items, items).standard_errors == 0
    assert paired_difference(items, items + 0.5).standard_errors == -math.inf
    assert paired_difference(items[:1], items[:1] - 1) == paired_difference(np.array([3.0]), np.array([2.0]))


def test_the_file_holds_everything_and_a_resume_takes_up_its_part(tmp_path: Path) -> None:
    losses = ItemLosses("abcd", np.array([0, 0, 1]), np.array([0.1, 0.6, 0.3], dtype=np.float32))
    values = {0: [0.5, 0.25, 1 / 3], 50: [0.4, 0.2, 0.3], 100: [0.3, 0.1, 0.2]}
    for step, row in values.items():
        losses.put(step, row)
    losses.save(tmp_path / "items.npz")
    again = ItemLosses.load(tmp_path / "items.npz")
    assert (again.evalset_id, again.steps) == ("abcd", [0, 50, 100])
    assert all(np.array_equal(again.rows[step], losses.rows[step]) for step in values)
    assert again.take_up(tmp_path / "items.npz", until=50)
    assert again.steps == [0, 50] and 100 not in again
    assert again.mean(0) == losses.mean(0)
    assert {file.name for file in tmp_path.iterdir()} == {"items.npz"}


DAMAGE = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-40],
    "in the middle": lambda whole: whole[:300] + bytes(40) + whole[340:],
    "zeros": lambda whole: bytes(len(whole)),
    "no archive": lambda whole: b"losses",
    "another array": lambda whole: b"\x93NUMPY\x01\x00",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_left_out(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "eval_items.npz"
    losses = ItemLosses("id", np.array([0, 0, 1]), np.array([0.1, 0.5, 0.9]))
    losses.put(0, [1.0, 2.0, 3.0])
    losses.save(file)
    assert (found := ItemLosses.found(file)) is not None and found.steps == [0]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"cannot read .*eval_items\.npz"):
        ItemLosses.load(file)
    assert ItemLosses.found(file) is None and not losses.take_up(file, until=5)
    assert len(caplog.messages) == 1 and "What it held is left out" in caplog.text
    assert ItemLosses.found(tmp_path / "none.npz") is None


SOUND: dict[str, Any] = {
    "steps": np.array([0, 50]),
    "items": np.array([[0.5, 0.25, 0.1], [0.4, 0.2, 0.3]], np.float32),
    "position": np.array([0.1, 0.6, 0.3], np.float32),
    "image": np.array([0, 0, 1]),
    "evalset_id": np.array("abcd"),
}


def npz(save: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
    content = io.BytesIO()
    save(content, **arrays)
    return content.getvalue()


def promising(shape: str, name: str = "items", descr: str = "<f4") -> bytes:
    """An array whose header promises a shape that is not there."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for other in SOUND:
            array = io.BytesIO()
            np.save(array, SOUND[other])
            head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(118) + b"\n"
            bomb = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(16)
            archive.writestr(f"{other}.npy", bomb if other == name else array.getvalue())
    return content.getvalue()


class Trap:
    def __reduce__(self) -> Any:
        return exit, ()


ODD: dict[str, Callable[[], bytes]] = {
    "objects": lambda: npz(**{**SOUND, "items": np.array([Trap(), None], dtype=object)}),
    "objects as the id": lambda: npz(**{**SOUND, "evalset_id": np.array(Trap(), dtype=object)}),
    "packed": lambda: npz(np.savez_compressed, **{**SOUND, "items": np.zeros((2, 10**7), np.float32)}),
    "a shape of 10^12": lambda: promising("(1000000, 1000000)"),
    "a shape of 10^9 images": lambda: promising("(1000000000,)", "image", "<i8"),
    "negative": lambda: promising("(-1, -4)"),
    "a huge type": lambda: promising("()", "evalset_id", "<U400000000"),
    "words": lambda: npz(**{**SOUND, "items": np.array([["a"] * 3] * 2)}),
    "negative losses": lambda: npz(**{**SOUND, "items": -SOUND["items"]}),
    "too many rows": lambda: npz(**{**SOUND, "items": np.ones((3, 3), np.float32)}),
    "other lengths": lambda: npz(**{**SOUND, "position": np.array([0.5, 0.5], np.float32)}),
    "steps below 0": lambda: npz(**{**SOUND, "steps": np.array([-5, 50])}),
    "unsorted steps": lambda: npz(**{**SOUND, "steps": np.array([50, 0])}),
    "a step twice": lambda: npz(**{**SOUND, "steps": np.array([50, 50])}),
    "broken steps": lambda: npz(**{**SOUND, "steps": np.array([0.5, 50])}),
    "steps of 2^63": lambda: npz(**{**SOUND, "steps": np.array([0, 2**63], np.uint64)}),
    "images below 0": lambda: npz(**{**SOUND, "image": np.array([0, -1, 1])}),
    "10^9 images": lambda: npz(**{**SOUND, "image": np.array([0, 10**9, 1])}),
    "positions above 1": lambda: npz(**{**SOUND, "position": np.array([0.1, 1.5, 0.3], np.float32)}),
    "a position that is none": lambda: npz(**{**SOUND, "position": np.array([0.1, np.nan, 0.3], np.float32)}),
    "a long id": lambda: npz(**{**SOUND, "evalset_id": np.array("x" * 10**6)}),
    "two ids": lambda: npz(**{**SOUND, "evalset_id": np.array(["a", "b"])}),
    "no id": lambda: npz(**{name: array for name, array in SOUND.items() if name != "evalset_id"}),
    "no items": lambda: npz(**{**SOUND, "items": np.zeros((2, 0)), "image": np.zeros(0, int), "position": np.zeros(0)}),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_what_no_measurement_gives_is_refused(content: Callable[[], bytes], tmp_path: Path) -> None:
    file = tmp_path / "eval_items.npz"
    file.write_bytes(content())
    error = harmless(lambda: ItemLosses.load(file))
    assert isinstance(error, UserError) and "cannot read" in str(error)


def test_losses_of_a_diverged_model_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(npz(**{**SOUND, "items": np.array([[1, 2, 3], [np.nan, np.inf, 1]], np.float32)}))
    losses = ItemLosses.load(tmp_path / "a.npz")
    assert math.isnan(losses.mean(50)) and losses.mean(0) == 2


def test_rows_of_another_length_are_not_taken_up(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(npz(**SOUND))
    assert not ItemLosses("abcd", np.zeros(4, int), np.zeros(4)).take_up(tmp_path / "a.npz", until=50)
    assert ItemLosses("abcd", SOUND["image"], SOUND["position"]).take_up(tmp_path / "a.npz", until=50)


def test_a_link_out_of_the_run_and_a_pipe_are_not_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "a.npz").write_bytes(npz(**SOUND))
    (run / "link.npz").symlink_to(tmp_path / "a.npz")
    os.mkfifo(run / "pipe.npz")
    for name, words in (("link", "link leads out"), ("pipe", "not a file")):
        with pytest.raises(UserError, match=words):
            ItemLosses.load(run / f"{name}.npz")


def _as_npz(arrays: Any) -> bytes:
    made = {}
    for name, value in arrays.items() if isinstance(arrays, dict) else []:
        try:
            made[str(name).encode("ascii", "replace").decode().replace("/", "_")] = np.array(value)
        except (ValueError, OverflowError):
            continue
    made.pop("file", None)
    return npz(**made)


LISTS = {name: array.tolist() for name, array in SOUND.items()}


@fuzzed
@given(
    st.one_of(
        damaged(npz(**SOUND)), changed(LISTS).map(_as_npz), odd_values.map(lambda odd: _as_npz({**LISTS, "items": odd}))
    )
)
def test_fuzz_items(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    file.write_bytes(content)
    losses = harmless(lambda: ItemLosses.load(file))
    if isinstance(losses, ItemLosses):
        for step in losses.steps:
            with np.errstate(all="ignore"):
                values_of(losses, step, "eval/loss")
