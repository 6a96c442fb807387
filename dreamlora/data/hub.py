"""Images from Hugging Face ``datasets``: a hub name, a local data set, or a folder written by ``save_to_disk``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlora.config import Data
from dreamlora.data.folder import pick_caption_column, tidy
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError


@dataclass(frozen=True)
class _Row:
    """Reads one row's image file, undecoded."""

    dataset: Any
    column: str
    index: int

    def __call__(self) -> bytes:
        cell = self.dataset[self.index][self.column]
        if cell is None:
            raise OSError("the row has no image")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def load_hub(data: Data, cache_dir: Path | None = None) -> list[ImageRecord]:
    """The first ``max_train_samples`` rows (all by default) of the split "train", or of the only split.

    Without ``caption_column``, ``instance_prompt`` is the caption of every row (as in diffusers' scripts); without that
    too, a column ``text`` or ``caption`` is used.

    Raises:
        UserError: the package is missing, the data set or a column does not exist, or a row has no caption.
    """
    name = str(data.dataset_name)
    dataset = _train_split(_load(name, data.dataset_config_name, cache_dir), name)
    columns = list(dataset.column_names)
    if data.image_column not in columns:
        raise UserError(f"{name} has no column {data.image_column!r} (--image_column): it has {', '.join(columns)}")
    wanted = None
    if data.caption_column or not data.instance_prompt:
        wanted = pick_caption_column(columns, data.caption_column, name)
    if wanted is None and not data.instance_prompt:
        raise UserError(f"give --caption_column (one of {', '.join(columns)}) or --instance_prompt for {name}")
    if data.max_train_samples is not None:
        dataset = dataset.select(range(min(data.max_train_samples, len(dataset))))
    texts = list(dataset[wanted]) if wanted else [None] * len(dataset)
    images = _undecoded(dataset, data.image_column, name)
    records = []
    for index, text in enumerate(texts):
        caption = tidy(text) or tidy(data.instance_prompt)
        if not caption:
            raise UserError(f"row {index} of {name} has no caption: mend it, or give --instance_prompt")
        read = _Row(images, data.image_column, index)
        records.append(ImageRecord(f"row-{index:06d}", caption, read, f"in row {index} of {name}"))
    if not records:
        raise UserError(f"--dataset_name {name} has no rows")
    return records


def _load(name: str, config: str | None, cache_dir: Path | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError('--dataset_name needs the package datasets: pip install "dreamlora[datasets]"') from None
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, config, cache_dir=str(cache_dir) if cache_dir else None)
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
    """The image column alone, giving files instead of decoded images."""
    import datasets

    try:
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors derive from these
        raise UserError(f"the column {column!r} of {name} holds no images (--image_column): {error}") from error
