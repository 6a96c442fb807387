"""Images from Hugging Face ``datasets``: a hub name, a local data set, or a folder written by ``save_to_disk``."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dreamlora.config import Data
from dreamlora.data.cache import cache_folder
from dreamlora.data.catalog import Catalog
from dreamlora.data.folder import FolderPlace, pick_caption_column, tidy
from dreamlora.errors import UserError
from dreamlora.files import make_folder, replacing


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


def load_hub(data: Data, cache_dir: Path | None = None, progress: bool = False) -> Catalog:
    """The first ``max_train_samples`` rows (all by default) of the split "train", or of the only split.

    Without ``caption_column``, ``instance_prompt`` is the caption of every row (as in diffusers' scripts); without that
    too, a column ``text`` or ``caption`` is used. With ``streaming`` only rows that are used are fetched; their image
    files are kept in the cache.

    Raises:
        UserError: the package is missing, the data set or a column does not exist, or a row has no caption.
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
    if data.streaming:
        catalog = _streamed(data, dataset, wanted, progress)
    else:
        catalog = Catalog(_Rows(_undecoded(dataset, data.image_column, name), data.image_column, name))
        texts = dataset.select_columns([wanted]) if wanted else dataset
        count = min(len(dataset), data.max_train_samples or len(dataset))
        with catalog.filling():
            for row in range(count):
                text = texts[row][wanted] if wanted else None
                catalog.add(_row_name(row), _caption(text, data, row))
    if not len(catalog):
        raise UserError(f"--dataset_name {name} has no rows")
    return catalog


def _streamed(data: Data, dataset: Any, wanted: str | None, progress: bool) -> Catalog:
    """Rows in the order of the stream. Images lie as files in the cache, named by their hashes: each once."""
    folder = make_folder(cache_folder(data.latents_cache_dir) / "streamed")
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
            if not file.exists():
                with replacing(file) as temporary:
                    temporary.write_bytes(content)
            catalog.add(f"{digest[:2]}/{digest}", _caption(cells[wanted] if wanted else None, data, row))
    return catalog


def _bar(rows: Iterator[Any], progress: bool) -> Any:
    return tqdm(rows, "streaming rows", unit="row", delay=3, leave=False, disable=not progress)


def _row_name(row: int) -> str:
    return f"row-{row:06d}"


def _caption(text: Any, data: Data, row: int) -> str:
    caption = tidy(text) or tidy(data.instance_prompt)
    if not caption:
        raise UserError(
            f"row {row} of {data.dataset_name} has no caption: mend it, or give an --instance_prompt to DreamBooth"
        )
    return caption


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


def _load(name: str, data: Data, cache_dir: Path | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError('--dataset_name needs the package datasets: pip install "dreamlora[datasets]"') from None
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
