"""What a data set of Hugging Face ``datasets`` may read: its own files, as data.

Its README.md, its saved state and its rows can all name files, and ``datasets`` opens most of what they name: other
files of this machine, other repositories, any address. So what is named is checked, before it is looked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from typing_extensions import TypedDict

from dreamlora.data.images import IMAGE_BYTES, file_reader
from dreamlora.errors import UserError
from dreamlora.reading import (
    Schema,
    UnreadableError,
    is_regular,
    lies_inside,
    opened,
    read_json,
    shortened,
    utf8_text,
    yaml_of,
)

STATE, SPLITS = "state.json", "dataset_dict.json"
"""That ``save_to_disk`` writes."""
CARD, CONFIGS = "README.md", ".huggingface.yaml"
"""That can say which files belong to a data set, and how they are read."""
BUILDERS = {"arrow", "csv", "imagefolder", "json", "parquet", "webdataset"}
"""Readers of ``datasets`` that give images; others follow references inside of their files."""
SETTINGS = {
    *("config_name", "data_dir", "data_files", "default", "description", "drop_labels", "drop_metadata", "features"),
    "version",
}
"""What a README.md may decide of the reader. Others can make it wait or take all memory."""
CARD_BYTES = 2**22
ROWS_AT_ONCE = 2**22
"""Rows of a row group of a parquet file, which is read whole: images have a thousand."""
BYTES_AT_ONCE = 2**33
"""The same in bytes."""


class _Splits(TypedDict):
    splits: list[str]


class _File(TypedDict):
    filename: str


class _SavedState(TypedDict):
    _data_files: list[_File]


@dataclass(frozen=True)
class Origin:
    """Where the files of a data set lie.

    Attributes:
        folders: of this machine. The first is its own: what is named without a folder lies there.
        address: of its repository, such as "hf://datasets/someone/set"; None: it has none.
    """

    folders: tuple[Path, ...]
    address: str | None = None

    def image(self, cell: Any) -> bytes:
        """The image file of a row, undecoded.

        Args:
            cell: of the column of images: ``{"bytes": ..., "path": ...}``.

        Raises:
            OSError: there is none, it cannot be read, or is none of the data set's own files.
        """
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, None)
        if content is None and path is None:
            raise OSError("the row has no image")
        if content is None:
            content = self._read(str(path))
        if len(content) > IMAGE_BYTES:
            raise OSError(f"it has more than the {IMAGE_BYTES // 2**20} MiB that an image can have")
        return bytes(content)

    def holds(self, path: str) -> bool:
        """Whether a path or an address leads to a file of the data set. That file may be a link, as one in a folder of
        images, but no link leads to another folder.
        """
        if "://" in path:
            own = f"{self.address}@", f"{self.address}/"
            return self.address is not None and path.startswith(own) and ".." not in PurePosixPath(path).parts
        file = self.folders[0] / path
        return any(lies_inside(file.parent, folder) for folder in self.folders)

    def _read(self, path: str) -> bytes:
        archive = path.split("::")
        inside = len(archive) == 2 and archive[0].startswith("zip://")
        if (len(archive) > 1 and not inside) or not self.holds(archive[-1]):
            raise OSError(f"its path {shortened(path)} leads to none of the data set's own files")
        if not inside and "://" not in path:
            try:
                return file_reader(self.folders[0] / path)()
            except UnreadableError as error:
                raise OSError(error.reason) from None
        import fsspec

        try:
            if inside and "://" not in archive[1]:
                with opened(self.folders[0] / archive[1]):  # it is no pipe
                    path = f"{archive[0]}::{self.folders[0] / archive[1]}"
            with fsspec.open(path, "rb") as stream:
                return bytes(stream.read(IMAGE_BYTES + 1))
        except Exception as error:  # of archives and of the network: anything
            raise OSError(f"{type(error).__name__}: {error}") from error


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote it."""
    return any((folder / file).is_file() for file in (STATE, SPLITS))


def load_saved(folder: Path) -> Any:
    """What ``save_to_disk`` wrote.

    Raises:
        UserError: it names files elsewhere.
    """
    import datasets

    if (folder / STATE).is_file():
        _check_saved(folder)
    else:
        for split in read_json(folder / SPLITS, Schema(_Splits))["splits"]:
            _check_plain(folder / SPLITS, split)
            if not lies_inside(folder / split, folder):
                raise UnreadableError(folder / SPLITS, f"the split {split} leads out of {folder} through a link")
            _check_saved(folder / split)
    return datasets.load_from_disk(str(folder))


def _check_saved(folder: Path) -> None:
    for name in [file["filename"] for file in read_json(folder / STATE, Schema(_SavedState))["_data_files"]]:
        _check_plain(folder / STATE, name)
        if not is_regular(folder / name):
            raise UnreadableError(folder / STATE, f"there is no file {shortened(name)} in {folder}")


def _check_plain(file: Path, name: str) -> None:
    if name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise UnreadableError(file, f"it names {shortened(name)}, which is no file or split of its folder")


def builder_of(name: str, config_name: str | None, cache_dir: Path | None) -> tuple[Any, Origin]:
    """What ``datasets`` will read a data set with, and where the files lie that may be read.

    Args:
        name: of a folder, or of the hub.
        config_name: of its configuration.
        cache_dir: where downloads are kept.

    Raises:
        UserError: files elsewhere, or settings of the reader, are named in it.
    """
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(name).resolve() if Path(name).is_dir() else None
    extracted = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "downloads" / "extracted"
    if folder:
        origin = Origin((folder, extracted))
        check_cards(folder / CARD, folder / CONFIGS, folder)
    else:
        own = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset")
        origin = Origin((own, extracted), f"hf://datasets/{name}")
        check_cards(_downloaded(name, CARD), _downloaded(name, CONFIGS), None)
    where = str(cache_dir) if cache_dir else None
    # by its full path, a folder is not taken for a reader of its name
    builder = datasets.load_dataset_builder(str(folder or name), config_name, cache_dir=where)
    _check_builder(builder, name, origin)
    return builder, origin


def _check_builder(builder: Any, name: str, origin: Origin) -> None:
    """What came out of all that was named."""
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in BUILDERS:
        raise UserError(f"{name} holds files of the kind {kind}: only {', '.join(sorted(BUILDERS))} are read")
    for file in itertools.chain.from_iterable((builder.config.data_files or {}).values()):
        if not origin.holds(str(file)):
            raise UserError(f"{name} names the file {shortened(str(file))}, which is none of its own")
        if str(file).endswith(".parquet") and "://" not in str(file):
            _check_row_groups(Path(str(file)))


def _check_row_groups(file: Path) -> None:
    import pyarrow.parquet

    with opened(file) as stream:
        facts = pyarrow.parquet.read_metadata(stream)
    for number in range(facts.num_row_groups):
        group = facts.row_group(number)
        if group.num_rows > ROWS_AT_ONCE or group.total_byte_size > BYTES_AT_ONCE:
            raise UnreadableError(
                file, f"its row group {number} has {group.num_rows:,} rows and {group.total_byte_size:,} bytes at once"
            )


def _downloaded(name: str, file: str) -> Path | None:
    """A file of a repository; None if it has none, or cannot be reached, which ``datasets`` will tell."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except Exception:
        return None


def check_cards(card: Path | None, configs: Path | None, folder: Path | None) -> None:
    """Nothing, if all files that a data set says are its own can be; raises UserError.

    Args:
        card: its README.md, which may begin with YAML.
        configs: the same YAML as a file.
        folder: that it lies in; None: of a repository.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    for file in (card, configs):
        try:
            text = utf8_text(file, CARD_BYTES) if file else ""
        except FileNotFoundError:
            continue
        if file == card:
            block = REGEX_YAML_BLOCK.search(text)
            text = block.group(2) if block else ""
        if file and text.strip():
            for place in _named_in(text, file):
                _check_place(place, file, folder)


def _named_in(text: str, file: Path) -> Iterator[str]:
    """The patterns of files and the folders that YAML names; raises UserError for other settings."""
    try:
        content = yaml_of(text)
    except ValueError as error:
        raise UnreadableError(file, str(error)) from None
    entries = content.get("configs") if isinstance(content, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            raise UnreadableError(file, f"a configuration is a mapping (got {shortened(entry)})")
        if not entry.keys() <= SETTINGS:
            odd = ", ".join(sorted(map(shortened, entry.keys() - SETTINGS)))
            raise UnreadableError(file, f"it sets {odd} of the reader, which a data set does not decide here")
        yield from _texts(entry.get("data_dir"))
        yield from _texts(entry.get("data_files"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for own in value.values() if isinstance(value, dict) else value:
            yield from _texts(own)
    elif value is not None:
        yield str(value)


def _check_place(place: str, file: Path, folder: Path | None) -> None:
    fixed = "".join(itertools.takewhile(lambda character: character not in "*?[{", place))
    leads_out = urlparse(place).scheme or Path(place).anchor or set(place) & set("\\:\0") or ".." in place.split("/")
    if leads_out or place.startswith("~") or (folder and not lies_inside((folder / fixed), folder)):
        raise UnreadableError(file, f"it names {shortened(place)}, which is no place inside of the data set")
