"""Images from Hugging Face ``datasets``: a hub name, a local data set, or a folder written by ``save_to_disk``."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dreamlora.config import Data
from dreamlora.data.account import RowAccount, row_name
from dreamlora.data.cache_folder import cache_folder, own_place
from dreamlora.data.caption_text import CAPTION_COLUMNS, captions_of, pick_caption_column, plain, tidy
from dreamlora.data.catalog import Catalog
from dreamlora.data.folder import FolderPlace, Images
from dreamlora.errors import UserError
from dreamlora.files import make_folder, replacing
from dreamlora.reading import UnreadableError, read_bytes
from dreamlora.registry import check_installed


@dataclass(frozen=True)
class _HubRow:
    """Reads one row's image file, undecoded."""

    dataset: Any
    column: str
    index: int

    def __call__(self) -> bytes:
        return _file(self.dataset[self.index][self.column])


@dataclass(frozen=True)
class _Rows:
    """The rows of a data set that can be read in any order; a ``catalog.Place``."""

    dataset: Any
    column: str
    name: str

    def reader(self, row: int, name: str) -> Callable[[], bytes]:
        """Reads the row."""
        return _HubRow(self.dataset, self.column, row)

    def where(self, row: int, name: str) -> str:
        """Row and data set."""
        return f"in row {row} of {self.name}"

    def stamp(self, row: int, name: str) -> tuple[str, str] | None:
        """The data set's fingerprint tells all of its content."""
        return f"datasets/{row}/{self.name}", str(self.dataset._fingerprint)


def load_hub(data: Data, cache_dir: Path | None = None, progress: bool = False) -> Images:
    """The first ``max_train_samples`` rows (all by default) of the split "train", or of the only split.

    Without ``caption_column``, ``instance_prompt`` is the caption of every row (as in diffusers' scripts); without that
    too, a column ``text`` or ``caption`` is used. With ``streaming`` only rows that are used are fetched; their image
    files are kept in the cache.

    Raises:
        UserError: the package is missing, the data set or a column does not exist, or a row has no caption, or one that
            is no text.
    """
    name = str(data.dataset_name)
    dataset = _train_split(_load(name, data, cache_dir), name)
    columns = _columns(dataset, name)
    if data.image_column not in columns:
        raise UserError(f"{name} has no column {data.image_column!r} (--image_column): it has {', '.join(columns)}")
    wanted = None
    if data.caption_column or not data.instance_prompt:
        wanted = pick_caption_column(columns, data.caption_column, name)
    if wanted is None and not data.instance_prompt:
        raise UserError(
            f"give --caption_column (one of {', '.join(columns)}), or in DreamBooth --instance_prompt, for {name}"
        )
    captions = _RowCaptions(data, wanted)
    if data.streaming:
        catalog = _streamed(data, dataset, captions, progress)
    else:
        catalog = Catalog(_Rows(_undecoded(dataset, data.image_column, name), data.image_column, name))
        texts = dataset.select_columns([wanted]) if wanted else dataset
        count = min(len(dataset), data.max_train_samples or len(dataset))
        with catalog.filling():
            for row in range(count):
                catalog.add(row_name(row), *captions.of(texts[row][wanted] if wanted else None, row))
    if not len(catalog):
        raise UserError(f"--dataset_name {name} has no rows")
    return Images(catalog, tuple(captions.notes(columns)), RowAccount(catalog))


def _streamed(data: Data, dataset: Any, captions: _RowCaptions, progress: bool) -> Catalog:
    """Rows in the order of the stream. Images lie as files in the cache, named by their hashes: each once."""
    folder = make_folder(own_place(cache_folder(data.latents_cache_dir)) / "streamed")
    wanted = captions.column
    kept = dataset.select_columns([data.image_column, *([wanted] if wanted else [])])
    rows = _undecoded(kept, data.image_column, str(data.dataset_name))
    catalog = Catalog(FolderPlace(folder))
    stream = itertools.islice(rows, data.max_train_samples)
    with catalog.filling():
        for row, cells in enumerate(_bar(stream, progress)):
            try:
                content = _file(cells[data.image_column])
            except OSError as error:
                raise UserError(f"cannot read the image in row {row} of {data.dataset_name}: {error}") from error
            digest = hashlib.sha256(content).hexdigest()
            file = folder / digest[:2] / digest
            if not _holds(file, content):
                with replacing(file) as temporary:
                    temporary.write_bytes(content)
            catalog.add(f"{digest[:2]}/{digest}", *captions.of(cells[wanted] if wanted else None, row))
    return catalog


def _holds(file: Path, content: bytes) -> bool:
    """Whether a kept file is what its name says."""
    try:
        return read_bytes(file, len(content)) == content
    except (FileNotFoundError, UnreadableError):
        return False


def _bar(rows: Iterator[Any], progress: bool) -> Any:
    return tqdm(rows, "streaming rows", unit="row", delay=3, leave=False, disable=not progress)


class _RowCaptions:
    """Captions of rows, and what is to be said of them.

    Attributes:
        column: that they are from; None: the prompt is every row's.
    """

    def __init__(self, data: Data, column: str | None) -> None:
        self.column = column
        self._name = data.dataset_name
        self._prompt = tidy(data.instance_prompt)
        self._rows = self._empty = 0

    def of(self, cell: Any, row: int) -> tuple[tuple[str, ...], str]:
        """The captions of a row and where they are from."""
        captions = captions_of(cell, f"row {row} of {self._name}, column {self.column}")
        self._rows += 1
        if captions:
            return captions, f"column {self.column}"
        self._empty += self.column is not None
        if not self._prompt:
            raise UserError(
                f"row {row} of {self._name} has no caption: mend it, or give an --instance_prompt to DreamBooth"
            )
        return (self._prompt,), "--instance_prompt"

    def notes(self, columns: Sequence[str]) -> Iterator[str]:
        """What is to be said of them, once all were read."""
        if self._empty:
            yield (
                f"{self._empty} of {self._rows} rows of {self._name} have an empty {self.column} and get the prompt "
                f'"{self._prompt}"'
            )
        unused = [column for column in columns if plain(column) in CAPTION_COLUMNS]
        if unused and self.column is None:
            yield (
                f"the column {unused[0]} of {self._name} is not used: --instance_prompt is the caption of every row. "
                f"With --caption_column {unused[0]} it would be"
            )


def _file(cell: Any) -> bytes:
    if cell is None:
        raise OSError("the row has no image")
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def _columns(dataset: Any, name: str) -> list[str]:
    """The columns; of a stream that does not declare any, those of its first row."""
    columns = dataset.column_names
    if columns is None:
        columns = list(next(iter(dataset), {}))
    if not columns:
        raise UserError(f"--dataset_name {name} has no rows")
    return list(columns)


def check_dataset(name: str) -> None:
    """Nothing, if ``name`` is there or may be a data set of the hub, and the package is installed.

    Raises:
        UserError: it is not.
    """
    try:
        check_installed(("datasets",), "datasets")
    except UserError as error:
        raise UserError(f"--dataset_name: {error}") from None
    path = Path(name)
    if path.is_file():
        raise UserError(f"--dataset_name {name} is a file: give the folder it lies in, or a hub name")
    if not path.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"--dataset_name {name}: there is no such folder (looked from {Path.cwd()})")


def _load(name: str, data: Data, cache_dir: Path | None) -> Any:
    check_dataset(name)
    import datasets

    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            return _train_split(saved, name).to_iterable_dataset() if data.streaming else saved
        where = str(cache_dir) if cache_dir else None
        return datasets.load_dataset(name, data.dataset_config_name, cache_dir=where, streaming=data.streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot load --dataset_name {name}: {error}") from error


def _train_split(loaded: Any, name: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise UserError(f'{name} has no split "train": it has {", ".join(loaded)}')


def _undecoded(dataset: Any, column: str, name: str) -> Any:
    """The data set with files instead of decoded images in its image column; one that is no stream loses the others."""
    import datasets

    try:
        if isinstance(dataset, datasets.IterableDataset):
            images = dataset.cast_column(column, datasets.Image(decode=False))
            next(iter(images), None)  # a stream is cast while it is read
            return images
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors derive from these
        raise UserError(f"the column {column!r} of {name} holds no images (--image_column): {error}") from error
