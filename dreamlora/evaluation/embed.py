"""Embeddings of images, kept on disk: an image is encoded once per encoder, whichever run shows it.

Every process has the vectors of its own images; the metrics bring them together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dreamlora.data.cache import TensorCache, Wanted, content_key
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.interfaces import Encoder

logger = logging.getLogger(__name__)

BATCH = 64
Result = TypeVar("Result")


def _alone(part: list[Any]) -> list[Any]:
    return part


@dataclass(frozen=True)
class Processes:
    """The processes that share the work.

    Attributes:
        rank: of this one.
        world: how many there are.
        gather: the lists of all processes as one list, on every process: ``processes.gather_lists``.
        device: where tensors must lie to be gathered (NCCL takes none from a CPU).
    """

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = _alone
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def share(self, count: int) -> range:
        """Which of ``count`` things are this process's."""
        return range(self.rank, count, self.world)

    def together(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives in this process, once it has succeeded in all of them.

        Raises:
            UserError, ValueError: it failed in a process; all raise it, else the others would wait for ever in what
                they do together next.
        """
        failure = None
        try:
            result = work()
        except (UserError, ValueError) as error:
            failure = error
        for failed in self.gather([failure]):
            if failed is not None:
                raise failed
        return result


ALONE = Processes()


class Embedder:
    """An encoder with a cache, whose work all processes share.

    Args:
        encoder: what encodes.
        cache: where vectors are kept, by the encoder's id and the image's content.
        processes: every process calls with the same arguments and gets the vectors of its share.
        progress: show a bar in the process of rank 0.
    """

    def __init__(
        self, encoder: Encoder, cache: TensorCache, processes: Processes = ALONE, progress: bool = False
    ) -> None:
        self.encoder = encoder
        self.processes = processes
        self._cache = cache
        self._silent = not progress or processes.rank != 0

    def images(self, records: Sequence[ImageRecord]) -> Tensor:
        """Vectors ``[k, dim]`` float32 of this process's share of the records.

        Process ``rank`` reads ``records[rank::world]`` and no others: those may lie on another machine's disk.

        Raises:
            UserError: an image cannot be read, by whichever process.
            ValueError: a vector is zero or not finite; the message names the file.
        """
        return self.processes.together(lambda: self._own([records[n] for n in self.processes.share(len(records))]))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Vectors ``[k, dim]`` float32 of this process's share of the prompts. Every process encodes all of them, as
        they are cheap (and not cached), so that each can warn of those that are too long.

        Raises:
            UserError: the encoder knows no texts.
        """
        row = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        vectors = self.encoder.texts(list(row))
        return vectors[[row[prompts[n]] for n in self.processes.share(len(prompts))]]

    def _own(self, records: Sequence[ImageRecord]) -> Tensor:
        keys = [content_key("embedding", self.encoder.id, record.content_hash()) for record in records]
        by_key = dict(zip(keys, records, strict=True))
        layout = (("vector", "F32", (self.encoder.dim,)),)
        missing = self._cache.missing(Wanted(key, layout) for key in by_key)
        bar = tqdm(total=len(missing), desc="embedding", unit="image", disable=self._silent or not missing, leave=False)
        with bar:
            for batch in _batches(missing):
                vectors = self.encoder.images(_Opened([by_key[key] for key in batch]))
                for key, vector in zip(batch, vectors, strict=True):
                    _refuse_pointless(vector, by_key[key].where)
                    self._cache.put(key, {"vector": vector})
                bar.update(len(batch))
        rows = [self._cache.load(Wanted(key, layout))["vector"] for key in keys]
        return torch.stack(rows) if rows else torch.zeros(0, self.encoder.dim)


class _Opened(Sequence[Any]):
    """Images of records, each decoded when it is asked for: photos of a whole batch can take gigabytes."""

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, place: Any) -> Any:
        return _Opened(self._records[place]) if isinstance(place, slice) else self._records[place].open()


def _batches(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), BATCH):
        yield keys[start : start + BATCH]


def _refuse_pointless(vector: Tensor, where: str) -> None:
    if not vector.isfinite().all() or not vector.any():
        raise ValueError(f"the embedding of {where} is zero or not finite: look at the image, or use another encoder")
