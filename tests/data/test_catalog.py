"""Rows on disk: what goes in comes out, in other processes too, and nothing stays behind."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from pathlib import Path

import pytest

from dreamlora.data.catalog import Catalog, RecordSubset, hash_prefixes
from dreamlora.data.folder import FolderPlace
from dreamlora.data.images import ImageFacts


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog(FolderPlace(tmp_path))
    with catalog.filling():
        for number, name in enumerate(["a.png", "sub/é.png", "c\udcff.png"]):
            (tmp_path / "sub").mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(name.encode("utf-8", "surrogateescape"))
            catalog.add(name, [f"caption {number}"])
            catalog.examined(number, ImageFacts(f"{number:064x}", (number + 1, 7)))
    return catalog


def test_records_come_back(catalog: Catalog, tmp_path: Path) -> None:
    assert [record.name for record in catalog] == ["a.png", "sub/é.png", "c\udcff.png"]
    assert (catalog[1].caption, catalog[-1].caption) == ("caption 1", "caption 2")
    assert catalog[1].facts == ImageFacts(f"{1:064x}", (2, 7)) and catalog[1].load() == "sub/é.png".encode()
    assert catalog[2].where == str(tmp_path / "c\udcff.png") and catalog[2].load() == b"c\xff.png"
    assert [record.name for record in catalog[1:]] == [record.name for record in catalog][1:]
    with pytest.raises(IndexError):
        catalog[3]


def test_selections_of_selections(catalog: Catalog) -> None:
    chosen = RecordSubset(catalog, [2, 0])
    assert [record.caption for record in chosen] == ["caption 2", "caption 0"]
    assert [record.caption for record in chosen[1:]] == ["caption 0"] and len(chosen[:1]) == 1


def test_hash_prefixes_sort_as_hashes_do(catalog: Catalog) -> None:
    catalog.examined(0, ImageFacts("f" * 64, (1, 1)))
    prefixes = hash_prefixes(catalog).tolist()
    assert prefixes == [2**64 - 1, 0, 0] and len(prefixes) == 3


def test_truncated(catalog: Catalog) -> None:
    catalog.truncate(2)
    assert len(catalog) == 2 and len(list(catalog)) == 2
    catalog.truncate(9)
    assert len(catalog) == 2


def _read(catalog: Catalog, results) -> None:
    results.put([record.caption for record in catalog])


def test_forked_and_pickled(catalog: Catalog) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_read, args=(catalog, results))
    child.start()
    assert results.get(timeout=30) == ["caption 0", "caption 1", "caption 2"]
    child.join(30)
    again = pickle.loads(pickle.dumps(catalog))
    assert [record.facts for record in again] == [record.facts for record in catalog]


def test_the_file_goes_with_the_catalogue(tmp_path: Path) -> None:
    catalog = Catalog(FolderPlace(tmp_path))
    file = catalog._file
    assert file.exists()
    del catalog
    gc.collect()
    assert not file.parent.exists()
