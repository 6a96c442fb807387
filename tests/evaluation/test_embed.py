"""Vectors of images: cached by content, shared by processes, refused where they mean nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dreamlora.config import Encoders
from dreamlora.data.cache import TensorCache
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.evaluation.embed import Embedder, Processes
from dreamlora.evaluation.embedders import Embedders, EncoderPlace


class Colours:
    """The mean colour as a vector; remembers what it saw."""

    dim = 3

    def __init__(self, encoder_id: str = "colours") -> None:
        self.id = encoder_id
        self.seen: list[int] = []

    def images(self, images: Sequence[Any]) -> Tensor:
        self.seen.append(len(images))
        return torch.tensor(np.array([np.asarray(image).mean((0, 1)) for image in images]), dtype=torch.float32)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        self.seen.append(len(prompts))
        return torch.tensor([[float(len(prompt)), 1, 1] for prompt in prompts])


def record(colour: tuple[int, int, int]) -> ImageRecord:
    return ImageRecord.from_image(f"{colour}.png", "", Image.new("RGB", (4, 4), colour))


RECORDS = [record((10 * i, 5, 1)) for i in range(1, 8)]
EXPECTED = torch.tensor([[10.0 * i, 5, 1] for i in range(1, 8)])


def test_images_are_encoded_once_per_content_and_encoder(tmp_path: Path) -> None:
    first, again, other = Colours(), Colours(), Colours("others")
    assert torch.equal(Embedder(first, TensorCache(tmp_path)).images(RECORDS), EXPECTED)
    assert torch.equal(
        Embedder(again, TensorCache(tmp_path)).images([*RECORDS[:2], record((9, 9, 9))])[:2], EXPECTED[:2]
    )
    Embedder(other, TensorCache(tmp_path)).images(RECORDS[:3])
    assert (first.seen, again.seen, other.seen) == ([7], [1], [3])
    assert Embedder(first, TensorCache(tmp_path)).images([]).shape == (0, 3)


def test_texts_are_encoded_once_each(tmp_path: Path) -> None:
    encoder = Colours()
    vectors = Embedder(encoder, TensorCache(tmp_path)).texts(["ab", "c", "ab"])
    assert vectors[:, 0].tolist() == [2, 1, 2] and encoder.seen == [2]


@pytest.mark.parametrize("colour", [(0, 0, 0)])
def test_a_vector_of_zeros_names_the_file(colour: tuple[int, int, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the embedding of \(0, 0, 0\).png is zero or not finite"):
        Embedder(Colours(), TensorCache(tmp_path)).images([RECORDS[0], record(colour)])


class Together:
    """Threads in the place of processes, with a gather that waits for all."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._parts: dict[int, list[Any]] = {}
        self._barrier = threading.Barrier(world, timeout=20)

    def processes(self, rank: int) -> Processes:
        def gather(part: list[Any]) -> list[Any]:
            self._parts[rank] = part
            self._barrier.wait()
            return [one for each in range(self.world) for one in self._parts[each]]

        return Processes(rank, self.world, gather)

    def run(self, work: Callable[[Processes], Any]) -> list[Any]:
        """What every process got, or raised."""
        results: list[Any] = [None] * self.world

        def process(rank: int) -> None:
            try:
                results[rank] = work(self.processes(rank))
            except (UserError, ValueError) as error:
                results[rank] = error

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def embed(records: Sequence[ImageRecord], cache: Path, processes: Processes) -> tuple[Tensor, list[int]]:
    encoder = Colours()
    return Embedder(encoder, TensorCache(cache / str(processes.rank)), processes).images(records), encoder.seen


def test_processes_share_the_work(tmp_path: Path) -> None:
    for rank, (vectors, seen) in enumerate(Together(2).run(lambda processes: embed(RECORDS, tmp_path, processes))):
        assert torch.equal(vectors, EXPECTED[rank::2]) and seen == [(4, 3)[rank]]


def test_texts_are_shared_but_all_encoded(tmp_path: Path) -> None:
    """So that every process can warn of a prompt that is too long."""
    encoder = Colours()
    vectors = Embedder(encoder, TensorCache(tmp_path), Processes(1, 2)).texts(["ab", "c", "ab", "abc"])
    assert vectors[:, 0].tolist() == [1, 3] and encoder.seen == [3]


def test_a_process_without_images_has_rows_of_the_right_length(tmp_path: Path) -> None:
    (first, _), (second, seen) = Together(2).run(lambda processes: embed(RECORDS[:1], tmp_path, processes))
    assert torch.equal(first, EXPECTED[:1]) and second.shape == (0, 3) and seen == []


def test_a_failure_of_one_process_is_one_of_all(tmp_path: Path) -> None:
    def gone() -> bytes:
        raise FileNotFoundError(2, "No such file")

    missing = ImageRecord("b.png", "", gone, "somewhere/b.png")
    records = [RECORDS[0], missing, RECORDS[1]]
    for found in Together(2).run(lambda processes: embed(records, tmp_path, processes)):
        assert isinstance(found, UserError) and "somewhere/b.png" in str(found)


def test_an_encoder_that_one_process_cannot_load_is_one_that_none_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hub may be out of reach from one machine: the others would wait for its images for ever."""

    def load(self: Embedders, name: str | Path) -> Colours:
        if self._place.processes.rank == 1:
            raise UserError(f"{name} is not here")
        return Colours()

    monkeypatch.setattr(Embedders, "_load", load)

    def embedder(processes: Processes) -> Embedder:
        place = EncoderPlace(torch.device("cpu"), TensorCache(tmp_path), processes=processes)
        return Embedders(Encoders(dino_model="x"), False, place)("dino")

    assert [str(found) for found in Together(2).run(embedder)] == ["x is not here"] * 2
