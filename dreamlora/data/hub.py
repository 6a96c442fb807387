"""Images from Hugging Face ``datasets``: a hub name, a local data set, or a folder written by ``save_to_disk``."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dreamlora.cache_folder import cache_folder, own_place
from dreamlora.config import Data
from dreamlora.data.account import RowAccount, row_name
from dreamlora.data.caption_text import CAPTION_COLUMNS, captions_of, pick_caption_column, plain, tidy
from dreamlora.data.catalog import Catalog
from dreamlora.data.file_index import stamp_of
from dreamlora.data.folder import FolderPlace, Images
from dreamlora.data.hub_source import Origin, builder_of, is_saved, load_saved
from dreamlora.data.images import BrokenImage, decode
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
    origin: Origin

    def __call__(self) -> bytes:
        return self.origin.image(self.dataset[self.index][self.column])


@dataclass(frozen=True)
class _Rows:
    """The rows of a data set that can be read in any order; a ``catalog.Place``."""

    dataset: Any
    column: str
    name: str
    origin: Origin

    def reader(self, row: int, name: str) -> Callable[[], bytes]:
        """Reads the row."""
        return _HubRow(self.dataset, self.column, row, self.origin)

    def where(self, row: int, name: str) -> str:
        """Row and data set."""
        return f"in row {row} of {self.name}"

    def stamp(self, row: int, name: str) -> tuple[str, str] | None:
        """Of the files with all rows. What a data set calls its fingerprint it may have made up."""
        return (f"datasets/{row}/{self.name}", self._stamp) if self._stamp else None

    @cached_property
    def _stamp(self) -> str | None:
        stamps = [stamp_of(Path(file["filename"])) for file in self.dataset.cache_files]
        return hashlib.sha256(repr(stamps).encode()).hexdigest() if stamps and None not in stamps else None


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
    loaded, origin = _load(name, data, cache_dir)
    dataset = _train_split(loaded, name).with_format(None)
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
    if wanted and _holds_files((dataset.features or {}).get(wanted)):
        raise UserError(f"the column {wanted!r} of {name} holds files, no captions (--caption_column)")
    captions = _RowCaptions(data, wanted)
    if data.streaming:
        catalog = _streamed(data, dataset, origin, captions, progress)
    else:
        catalog = Catalog(_Rows(_undecoded(dataset, data.image_column, name), data.image_column, name, origin))
        texts = dataset.select_columns([wanted]) if wanted else dataset
        count = min(len(dataset), data.max_train_samples or len(dataset))
        with catalog.filling():
            for row in range(count):
                catalog.add(row_name(row), *captions.of(texts[row][wanted] if wanted else None, row))
    if not len(catalog):
        raise UserError(f"--dataset_name {name} has no rows")
    return Images(catalog, tuple(captions.notes(columns)), RowAccount(catalog))


def _holds_files(feature: Any) -> bool:
    """Whether cells of a column would be opened as files (images, sounds, ...) by whoever reads them."""
    inner = feature.values() if isinstance(feature, dict) else getattr(feature, "feature", feature)
    parts = inner if isinstance(feature, dict | list) else [] if inner is feature else [inner]
    return bool(getattr(feature, "decode", False)) or any(map(_holds_files, parts))


def _streamed(data: Data, dataset: Any, origin: Origin, captions: _RowCaptions, progress: bool) -> Catalog:
    """Rows in the order of the stream. Images lie as files in the cache, named by their hashes: each once, and none
    that is no image.
    """
    folder = make_folder(own_place(cache_folder(data.latents_cache_dir)) / "streamed")
    wanted = captions.column
    kept = dataset.select_columns([data.image_column, *([wanted] if wanted else [])])
    rows = _undecoded(kept, data.image_column, str(data.dataset_name))
    catalog = Catalog(FolderPlace(folder))
    stream = itertools.islice(rows, data.max_train_samples)
    with catalog.filling():
        for row, cells in enumerate(_bar(stream, progress)):
            where = f"in row {row} of {data.dataset_name}"
            try:
                content = origin.image(cells[data.image_column])
            except OSError as error:
                raise BrokenImage(where, str(error)) from error
            digest = hashlib.sha256(content).hexdigest()
            file = folder / digest[:2] / digest
            if not _is_there(file, content):
                decode(content, where)
                with replacing(file) as temporary:
                    temporary.write_bytes(content)
            catalog.add(f"{digest[:2]}/{digest}", *captions.of(cells[wanted] if wanted else None, row))
    return catalog


def _is_there(file: Path, content: bytes) -> bool:
    """Whether this was written before, as it is."""
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


def _load(name: str, data: Data, cache_dir: Path | None) -> tuple[Any, Origin]:
    check_dataset(name)
    try:
        if is_saved(Path(name)):
            saved = _train_split(load_saved(Path(name)), name)
            return saved.to_iterable_dataset() if data.streaming else saved, Origin((Path(name).resolve(),))
        builder, origin = builder_of(name, data.dataset_config_name, cache_dir)
        if data.streaming:
            return builder.as_streaming_dataset(), origin
        builder.download_and_prepare()
        return builder.as_dataset(), origin
    except UserError as error:
        raise UserError(f"cannot load --dataset_name {name}: {error}") from error
    except Exception as error:  # what a data set can be wrong in is nowhere said
        reason = error.__cause__ or error  # datasets' own error tells nothing but that there is one
        raise UserError(f"cannot load --dataset_name {name}: {str(reason) or type(reason).__name__}") from error


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
    except Exception as error:  # pyarrow's and those of files that the first row is from
        raise UserError(f"the column {column!r} of {name} holds no images (--image_column): {error}") from error
