"""The disk cache: what it trusts, what it makes anew, and who may share it."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from PIL import Image
from torch import Tensor

from dreamlora import cache_folder as cache_folder_module
from dreamlora.cache_folder import cache_folder
from dreamlora.data import cache as cache_module
from dreamlora.data import encode as encode_module
from dreamlora.data.buckets import bucket_sizes
from dreamlora.data.cache import TensorCache, Wanted, content_key, is_finite
from dreamlora.data.dataset import examine
from dreamlora.data.encode import Filling, LatentSize, encode_dataset, encode_prompts
from dreamlora.data.folder import load_folder
from dreamlora.data.stores import _OBJECT_BYTES, Recent
from dreamlora.data.transforms import Preparation, Preparations, prepare, variants
from dreamlora.errors import UserError
from dreamlora.interfaces import Latents
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless
from tests.limits import memory_limit, open_files_limit

HOW = Preparation(resolution=16)
EACH = Preparations((HOW,))


class Encoder:
    """Stands for an autoencoder: halves the resolution; counts what it encodes."""

    def __init__(self) -> None:
        self.images = 0
        self.calls = 0

    def __call__(self, pixels: Tensor) -> Latents:
        self.images += len(pixels)
        self.calls += 1
        mean = torch.nn.functional.avg_pool2d(pixels, 2)
        return Latents(mean, mean.abs() / 10)


class TextEncoder:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        self.seen += prompts
        states = torch.tensor([[float(ord(text[0]))] * 6 for text in prompts]).view(-1, 2, 3).to(torch.bfloat16)
        return {"prompt_embeds": states, "ids": torch.tensor([len(text) for text in prompts])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two wide images, a square one, and a copy of it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"a": (40, 20), "b": (20, 30), "c": (32, 32)}.items():
        image = Image.radial_gradient("L").resize(size).convert("RGB")
        image.putpixel((0, 0), (ord(name), 0, 0))
        image.save(folder / f"{name}.png")
    (folder / "d.png").write_bytes((folder / "c.png").read_bytes())
    return folder


@pytest.fixture
def filling(tmp_path: Path) -> Filling:
    return Filling(TensorCache(tmp_path / "cache"), {"model_id": "m", "dtype": "float32"}, progress=False)


def encode(folder: Path, filling: Filling, how: Preparation = HOW):
    """The store, and how many images were encoded for it."""
    encoder = Encoder()
    store = encode_dataset(load_folder(folder, "p").records, Preparations((how,)), encoder, filling)
    return store, encoder.images


def entries(filling: Filling) -> list[Path]:
    return sorted(file for file in filling.cache.folder.rglob("*") if file.is_file())


def test_store_holds_every_variant(folder, filling):
    how = replace(HOW, random_flip=True)
    store, _ = encode(folder, filling, how)
    records = load_folder(folder, "p").records
    assert (
        [*store.names] == ["a.png", "b.png", "c.png", "d.png"] and [*store.captions] == [("p",)] * 4 and len(store) == 4
    )
    assert list(store.content_hashes) == [record.content_hash() for record in records]
    for index, record in enumerate(records):
        expected = variants(record.facts.size, record.content_hash(), how)
        assert store.count(index) == len(expected) == (8 if index < 2 else 2)
        for number, variant in enumerate(expected):
            mean, std = store.latents(index, number)
            made = Encoder()(prepare(record.open(), variant, how)[None])
            assert torch.equal(mean, made.mean[0]) and torch.equal(std, made.std[0]) and mean.dtype == torch.float32


def test_encoded_once(folder, filling):
    first, made = encode(folder, filling)
    assert made == len(entries(filling)) <= 9  # copies and coinciding crops are encoded once
    second, made = encode(folder, filling)
    assert made == 0 and torch.equal(first.latents(1, 2)[0], second.latents(1, 2)[0])


def test_renamed_image_is_reused(folder, filling):
    encode(folder, filling)
    (folder / "a.png").rename(folder / "z.png")
    assert encode(folder, filling)[1] == 0


def test_changed_pixel_is_encoded_again(folder, filling):
    before, _ = encode(folder, filling)
    old = before.latents(2, 0)[0]
    stamp = (folder / "c.png").stat()
    with Image.open(folder / "c.png") as image:
        image.load()
    image.putpixel((9, 9), (255, 0, 255))
    image.save(folder / "c.png")
    os.utime(folder / "c.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the time must not matter
    store, made = encode(folder, filling)
    assert made == 1
    assert not torch.equal(store.latents(2, 0)[0], old) and torch.equal(store.latents(3, 0)[0], old)


@pytest.mark.parametrize(
    "change", [{"resolution": 18}, {"interpolation": "box"}, {"random_flip": True}, {"center_crop": True}, {"seed": 5}]
)
def test_changed_option_is_encoded_again(folder, filling, change):
    encode(folder, filling)
    assert encode(folder, filling, replace(HOW, **change))[1] > 0
    assert encode(folder, filling)[1] == 0


@pytest.mark.parametrize("change", [{"model_id": "n"}, {"dtype": "float16"}, {"revision": "main"}])
def test_changed_model_is_encoded_again(folder, filling, change):
    made = encode(folder, filling)[1]
    other = replace(filling, key_parts={**filling.key_parts, **change})
    assert encode(folder, other)[1] == made
    assert encode(folder, replace(filling, key_parts=dict(reversed(filling.key_parts.items()))))[1] == 0


def test_changed_format_is_encoded_again(folder, filling, monkeypatch):
    made = encode(folder, filling)[1]
    monkeypatch.setattr(cache_module, "CACHE_FORMAT", cache_module.CACHE_FORMAT + 1)
    assert encode(folder, filling)[1] == made


def test_keys_are_unambiguous():
    assert content_key("k", "ab", "c") != content_key("k", "a", "bc")
    assert content_key("k", "1") != content_key("k", 1)
    assert content_key("k", {"a": 1, "b": 2}) == content_key("k", {"b": 2, "a": 1})


def _damage_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def _damage_one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def _damage_header(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:9] + b"\xff" + data[10:])


def _damage_swap(file: Path) -> None:
    other = next(entry for entry in file.parents[1].rglob("*.safetensors") if entry != file)
    file.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [_damage_cut, _damage_empty, _damage_one_bit, _damage_header, _damage_swap])
def test_damaged_entry_is_encoded_again(folder, filling, damage, caplog):
    encode(folder, filling)
    victim = entries(filling)[0]
    sound = victim.read_bytes()
    damage(victim)
    with caplog.at_level(logging.WARNING):
        _, made = encode(folder, filling)
    assert made == 1 and victim.read_bytes() == sound
    assert len(caplog.records) == 1 and victim.name in caplog.text and "damaged" in caplog.text


@pytest.mark.parametrize("damage", [_damage_cut, _damage_empty, _damage_header])
def test_a_glance_sees_a_damaged_file(folder, filling, damage, monkeypatch):
    monkeypatch.setattr(encode_module, "CHECKED_WHOLE", 0)
    encode(folder, filling)
    assert encode(folder, filling)[1] == 0
    damage(entries(filling)[0])
    assert encode(folder, filling)[1] == 1


def test_damage_that_a_glance_misses_is_mended_at_the_next_start(folder, filling, monkeypatch):
    monkeypatch.setattr(encode_module, "CHECKED_WHOLE", 0)
    encode(folder, filling)
    for file in entries(filling):
        _damage_one_bit(file)
    store, made = encode(folder, filling)
    assert made == 0
    with pytest.raises(UserError, match="damaged during the run: start again"):
        store.latents(2, 0)
    store, made = encode(folder, filling)
    assert made == 1 and store.latents(2, 0)[0].isfinite().all()


def test_buckets(folder, filling):
    how = replace(HOW, sizes=bucket_sizes(16, 4), crop_variants=1)
    store, _ = encode(folder, replace(filling, batch_size=3), how)
    shapes = [tuple(store.latents(index, 0)[0].shape[1:]) for index in range(4)]
    assert shapes == [(5, 10), (10, 6), (8, 8), (8, 8)] or shapes == [(6, 10), (10, 6), (8, 8), (8, 8)]
    expected = prepare(store_record(folder, 0).open(), variants((40, 20), "", how)[0], how)
    assert expected.shape[1:] == (2 * shapes[0][0], 2 * shapes[0][1])
    assert encode(folder, filling, how.fixed())[0].latents(0, 0)[0].shape == (3, 8, 8)


def store_record(folder, index):
    return load_folder(folder, "p").records[index]


def test_entry_lost_during_the_run(folder, filling):
    store, _ = encode(folder, filling)
    for file in entries(filling):
        file.unlink()
    with pytest.raises(UserError, match="removed or damaged during the run: start again"):
        store.latents(0, 0)


@pytest.mark.parametrize("code, why", [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "Read-only file system")])
def test_cannot_write(folder, filling, monkeypatch, code, why):
    def refuse(file: Path, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=rf"cannot write to the cache .*cache: {why}.*--latents_cache_dir"):
        encode(folder, filling)
    assert entries(filling) == []  # no temporary files stay


def test_folder_cannot_be_made(folder, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="--latents_cache_dir"):
        encode(folder, Filling(TensorCache(tmp_path / "file" / "cache"), {}, progress=False))


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DREAMLORA_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "dreamlora"
    monkeypatch.setenv("DREAMLORA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path and cache_folder(tmp_path / "x") == tmp_path / "x"


def test_broken_image_stops(folder, filling):
    data = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(data[:-200])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^cannot read the image .*photos/b\.png"):
            encode(folder, replace(filling, workers=workers))


def test_image_changed_while_read(folder, filling):
    records = load_folder(folder, "p").records
    examine(records, filling.cache.folder)
    (folder / "a.png").write_bytes((folder / "c.png").read_bytes())
    with pytest.raises(UserError, match=r"a\.png changed while"):
        encode_dataset(records, EACH, Encoder(), filling)


def test_non_finite_latents_stop(folder, filling):
    def broken(pixels: Tensor) -> Latents:
        return Latents(pixels * float("nan"), pixels)

    with pytest.raises(UserError, match=r"not finite for the image .*a\.png"):
        encode_dataset(load_folder(folder, "p").records, EACH, broken, filling)
    assert entries(filling) == []


def test_workers_make_the_same_bits(folder, filling, tmp_path):
    alone, _ = encode(folder, filling)
    many = replace(filling, cache=TensorCache(tmp_path / "other"), workers=2)
    encode(folder, many)
    files = entries(filling)
    assert [file.name for file in files] == [file.name for file in entries(many)]
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in entries(many)]
    assert alone.count(0) == 4


def test_global_random_state_is_untouched(folder, filling):
    before = torch.get_rng_state()
    encode(folder, filling)
    encode(folder, filling)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches(folder, filling):
    encoder = Encoder()
    encode_dataset(load_folder(folder, "p").records, EACH, encoder, replace(filling, batch_size=4))
    assert encoder.images == len(entries(filling)) and encoder.calls == -(-encoder.images // 4)


def test_processes_share_the_work(folder, filling):
    """Also when one is done before the other looks what is missing."""
    made = [encode(folder, replace(filling, rank=rank, world=2))[1] for rank in (0, 1)]
    assert min(made) > 0
    assert encode(folder, filling)[1] == 0
    prompts = [f"{letter} prompt" for letter in "abcde"]
    encoder = TextEncoder()
    for rank in (0, 1):
        encode_prompts(prompts, encoder, replace(filling, rank=rank, world=2))
    assert sorted(encoder.seen) == prompts


def _fill(folder: Path, cache: Path, barrier) -> None:
    torch.set_num_threads(1)
    barrier.wait()
    encode(folder, Filling(TensorCache(cache), {}, progress=False))


def test_two_runs_at_once(folder, tmp_path):
    """Two real processes fill one cache at the same time; what is there then is what one alone makes."""
    for number in range(12):
        Image.new("RGB", (30, 20), (number, 200, 0)).save(folder / f"more{number}.png")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    runs = [context.Process(target=_fill, args=(folder, tmp_path / "shared", barrier)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    shared = Filling(TensorCache(tmp_path / "shared"), {}, progress=False)
    alone = Filling(TensorCache(tmp_path / "alone"), {}, progress=False)
    assert encode(folder, shared)[1] == 0
    encode(folder, alone)
    assert [f.name for f in entries(shared)] == [f.name for f in entries(alone)]
    assert [f.read_bytes() for f in entries(shared)] == [f.read_bytes() for f in entries(alone)]


def test_entries_that_another_run_made_meanwhile_are_not_made_again(folder, filling):
    made = len(variants((40, 20), "", HOW)) + len(variants((20, 30), "", HOW)) + 1
    inner, outer = Encoder(), Encoder()
    records = load_folder(folder, "p").records

    def overtaken(pixels: Tensor) -> Latents:
        if outer.calls == 0:
            encode_dataset(records, EACH, inner, filling)
        return outer(pixels)

    encode_dataset(records, EACH, overtaken, filling)
    assert inner.images == len(entries(filling)) <= made
    assert outer.images <= 4  # the crops of the image it had begun


def test_prompts(filling):
    encoder = TextEncoder()
    table = encode_prompts(["a cat", "a dog", "b", "a cat", "é"], encoder, filling)
    assert encoder.seen == ["a cat", "a dog", "b", "é"]
    entry = table["b"]
    assert entry["prompt_embeds"].shape == (1, 2, 3) and entry["prompt_embeds"].dtype == torch.bfloat16
    assert entry["prompt_embeds"].unique().item() == 98 and entry["ids"].tolist() == [1]
    encode_prompts(["b", "c"], encoder, replace(filling, batch_size=8))
    assert encoder.seen[4:] == ["c"]
    encode_prompts(["b"], encoder, replace(filling, key_parts={**filling.key_parts, "max_length": 77}))
    assert encoder.seen[5:] == ["b"]
    with pytest.raises(UserError, match="start again"):
        table["zebra"]


def test_non_finite_prompt_stops(filling):
    with pytest.raises(UserError, match="not finite for the prompt 'a cat'"):
        encode_prompts(["a cat"], lambda prompts: {"x": torch.full((1, 2), torch.inf)}, filling)


def test_ram_is_bounded(tmp_path):
    cache = TensorCache(tmp_path)
    keys = [content_key("t", number) for number in range(4)]
    for number, key in enumerate(keys):
        cache.put(key, {"x": torch.full((256,), float(number))})  # 1 KiB each
    places = [Wanted(key, None) for key in keys]
    recent = Recent(cache, limit=2 * (1024 + _OBJECT_BYTES))
    kept = [recent[places[0]], recent[places[1]]]
    assert recent[places[0]] is kept[0]
    _ = recent[places[2]]  # pushes out 1, the longest unused
    assert recent[places[0]] is kept[0] and recent[places[1]] is not kept[1]
    assert recent[places[3]]["x"][0] == 3 and Recent(cache, limit=0)[places[3]]["x"][0] == 3


SIZE = LatentSize(3, 2)
"""What ``Encoder`` makes."""


def replaced(filling: Filling, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], number: int = 0) -> Path:
    """An entry of the cache with other tensors and a right checksum, as whoever can write there can make it."""
    file = entries(filling)[number]
    filling.cache.put(file.stem, change(safetensors.torch.load_file(file)))
    return file


WRONG: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "another type": lambda entry: {name: tensor.half() for name, tensor in entry.items()},
    "whole numbers": lambda entry: {name: tensor.int() for name, tensor in entry.items()},
    "no mean": lambda entry: {"std": entry["std"]},
    "another name": lambda entry: {"mean": entry["mean"], "scale": entry["std"]},
    "one more": lambda entry: {**entry, "more": entry["std"].clone()},
    "none": lambda entry: {},
    "other places": lambda entry: {name: tensor[:, :1, :1] for name, tensor in entry.items()},
    "other channels": lambda entry: {name: tensor[:1] for name, tensor in entry.items()},
    "a flat std": lambda entry: {**entry, "std": entry["std"][0, 0, 0]},
    "an empty one": lambda entry: {**entry, "std": entry["std"][:, :0]},
    "turned": lambda entry: {name: tensor.transpose(0, 1) for name, tensor in entry.items()},
}


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_an_entry_that_holds_other_things_is_encoded_again(folder, filling, change, thorough, monkeypatch, caplog):
    """Though its checksum is right; before, latents of any shape were trained on."""
    monkeypatch.setattr(encode_module, "CHECKED_WHOLE", 1000 if thorough else 0)
    filling = replace(filling, latents=SIZE)
    encode(folder, filling)
    sound = entries(filling)[0].read_bytes()
    file = replaced(filling, change)
    assert encode(folder, filling)[1] == 1 and file.read_bytes() == sound
    assert "instead of (('mean', 'F32', (3, 8, 8)), ('std', 'F32', (3, 8, 8)))" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_damage(tmp_path, dtype, odd):
    cache, values = TensorCache(tmp_path), torch.randn(3, 700).to(dtype)
    cache.put("ab" * 32, {"x": values, "none": values[:0], "ids": torch.tensor([2**62])})
    assert cache.holds(Wanted("ab" * 32, None))
    values[1, 333] = odd
    cache.put("ab" * 32, {"x": values})
    assert not cache.holds(Wanted("ab" * 32, None))


def test_numbers_that_are_not_finite_are_encoded_again(folder, filling, monkeypatch):
    filling = replace(filling, latents=SIZE)
    encode(folder, filling)
    replaced(filling, lambda entry: {**entry, "std": entry["std"] / 0})
    assert encode(folder, filling)[1] == 1
    monkeypatch.setattr(encode_module, "CHECKED_WHOLE", 0)  # a glance does not see them; who reads them does
    for number in range(len(entries(filling))):
        replaced(filling, lambda entry: {**entry, "std": entry["std"] / 0}, number)
    store, made = encode(folder, filling)
    assert made == 0
    with pytest.raises(UserError, match="damaged during the run: start again"):
        store.latents(0, 0)


def test_an_entry_replaced_during_the_run_ends_it(folder, filling):
    store, _ = encode(folder, replace(filling, latents=SIZE))
    for number in range(len(entries(filling))):
        replaced(filling, WRONG["other places"], number)
    with pytest.raises(UserError, match="damaged during the run: start again"):
        store.latents(0, 0)


def _as_link(file: Path) -> None:
    file.rename(file.with_suffix(".away"))
    file.symlink_to(file.with_suffix(".away"))


def _as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _as_endless(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.truncate(2**33)


def _as_long_header(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes((2**40).to_bytes(8, "little") + data[8:])


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("put", [_as_link, _as_pipe, _as_endless, _as_long_header])
def test_what_is_no_entry_is_encoded_again(folder, filling, put, thorough, monkeypatch):
    """A pipe was waited for, for ever."""
    monkeypatch.setattr(encode_module, "CHECKED_WHOLE", 1000 if thorough else 0)
    encode(folder, filling)
    file = entries(filling)[0]
    sound = file.read_bytes()
    put(file)
    assert encode(folder, filling)[1] == 1
    assert file.is_file() and not file.is_symlink() and file.read_bytes() == sound


def test_masks_and_vectors_are_checked_too(tmp_path):
    cache = TensorCache(tmp_path)
    for layout, wrong in (
        ((("mask", "U8", (1, 4, 6)),), {"mask": torch.zeros(1, 6, 4, dtype=torch.uint8)}),
        ((("vector", "F32", (5,)),), {"vector": torch.zeros(4)}),
    ):
        cache.put("ab" * 32, wrong)
        assert cache.missing([Wanted("ab" * 32, layout)]) == cache.missing([Wanted("ab" * 32, layout)], False) != []


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    "change",
    [
        lambda entry: {**entry, "prompt_embeds": entry["prompt_embeds"][:, :1].clone()},
        lambda entry: {"prompt_embeds": entry["prompt_embeds"]},
        lambda entry: {**entry, "prompt_embeds": entry["prompt_embeds"].float()},
    ],
)
def test_a_prompt_unlike_the_others_is_encoded_again(filling, number, change, monkeypatch):
    """Whichever comes first: the text encoder says which are right."""
    prompts, encoder = ["a", "b", "c", "d"], TextEncoder()
    table = encode_prompts(prompts, encoder, filling)
    sound = {prompt: table[prompt] for prompt in prompts}
    replaced(filling, change, number)
    monkeypatch.setattr(encode_module, "CHECKED_WHOLE", 3)
    encoder.seen.clear()
    table = encode_prompts(prompts, encoder, filling)
    assert 1 <= len(encoder.seen) <= 3
    for prompt in prompts:
        assert all(torch.equal(table[prompt][name], tensor) for name, tensor in sound[prompt].items())
    assert encode_prompts(prompts, encoder, filling) and len(encoder.seen) <= 3


def test_prompts_that_all_are_other_than_the_encoder_s(filling, monkeypatch):
    encode_prompts(["a", "b"], lambda texts: {"x": torch.zeros(len(texts), 2)}, filling)
    monkeypatch.setattr(encode_module, "CHECKED_WHOLE", 1)
    with pytest.raises(UserError, match=r"the cache .* has embeddings of other shapes than the text encoder makes"):
        encode_prompts(["a", "b", "c"], TextEncoder(), filling)


# --- whose entries count ---


class Owners:
    """Files and folders as if they were of other users (tests may not have the right to give them away)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[str, int] = {}
        true_fstat, true_stat = os.fstat, Path.stat
        monkeypatch.setattr(cache_folder_module, "this_user", lambda: 1000)
        monkeypatch.setattr(cache_module.os, "fstat", lambda fd: self._seen(true_fstat(fd)))
        monkeypatch.setattr(Path, "stat", lambda path, **how: self._seen(true_stat(path, **how)))
        cache_folder_module._owner.cache_clear()
        cache_folder_module._tell.cache_clear()

    def give(self, path: Path, user: int) -> None:
        self.of[str(path.lstat().st_ino)] = user
        cache_folder_module._owner.cache_clear()

    def _seen(self, status: os.stat_result) -> Any:
        user = self.of.get(str(status.st_ino), 1000)
        return os.stat_result((*status[:4], user, *status[5:10]))


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> Iterator[Owners]:
    yield Owners(monkeypatch)
    monkeypatch.undo()
    cache_folder_module._owner.cache_clear()


def test_entries_of_other_users_do_not_count(folder, filling, owners, caplog):
    encode(folder, filling)
    for file in entries(filling)[:3]:
        owners.give(file, 1001)
    owners.give(entries(filling)[3], 0)  # root's do
    assert encode(folder, filling)[1] == 3
    assert caplog.text.count("another user (number 1001)") == 1 and "damaged" not in caplog.text
    owners.of.clear()  # new files may have the old ones' numbers
    assert encode(folder, filling)[1] == 0, "they are one's own now"


def test_a_cache_of_somebody_else(folder, filling, owners, caplog):
    """Its owner's entries count, those of third users do not, and what is new lies apart."""
    encode(folder, filling)
    theirs = entries(filling)
    for file in theirs:
        owners.give(file, 1001)
    owners.give(theirs[0], 1002)
    owners.give(filling.cache.folder, 1001)
    assert encode(folder, filling)[1] == 1
    [mine] = [file for file in entries(filling) if file not in theirs]
    assert mine.relative_to(filling.cache.folder) == Path("users/1000") / theirs[0].relative_to(filling.cache.folder)
    assert caplog.text.count("belongs to another user (number 1001)") == 1
    assert encode(folder, filling)[1] == 0


def test_where_files_have_no_owners_all_count(folder, filling, owners, monkeypatch):
    encode(folder, filling)
    for file in entries(filling):
        owners.give(file, 1001)
    monkeypatch.setattr(cache_folder_module, "this_user", lambda: None)
    assert encode(folder, filling)[1] == 0


def test_a_place_that_gives_all_files_one_owner(folder, filling, owners, monkeypatch):
    """Network drives, and root on some of them: nothing is made twice, and what was written is believed."""
    encode(folder, filling)
    for path in (filling.cache.folder, *filling.cache.folder.rglob("*")):
        owners.give(path, 65534)
    store, made = encode(folder, filling)
    assert made == 0 and store.latents(0, 0)[0].isfinite().all()


# --- low limits, damage ---


def test_few_open_files_are_enough(folder, filling):
    with open_files_limit(4):
        store, _ = encode(folder, filling)
        for index in range(4):
            store.latents(index, 0)
        assert filling.cache.missing([Wanted(file.stem, None) for file in entries(filling)]) == []


def test_little_memory_is_enough(folder, filling):
    encode(folder, filling)
    _as_endless(entries(filling)[0])
    with memory_limit(300 * 2**20):
        assert encode(folder, filling)[1] == 1


@pytest.fixture(scope="module")
def fuzzed_cache(tmp_path_factory: pytest.TempPathFactory) -> TensorCache:
    return TensorCache(tmp_path_factory.mktemp("cache"))


def _sound() -> bytes:
    cache, key = TensorCache(Path("/nowhere")), "ab" * 32
    tensors = {"mean": torch.ones(4, 2, 2), "std": torch.ones(4, 2, 2)}
    assert cache.file(key).name == f"{key}.safetensors"
    return safetensors.torch.save(tensors, {"sha256": cache_module._digest(key, tensors)})


@fuzzed
@given(data=damaged(_sound()))
def test_fuzz_entries(fuzzed_cache, data):
    shape = (4, 2, 2)
    wanted = Wanted("ab" * 32, (("mean", "F32", shape), ("std", "F32", shape)))
    file = fuzzed_cache.file(wanted.key)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    harmless(lambda: fuzzed_cache.missing([wanted]))
    harmless(lambda: fuzzed_cache.missing([wanted], thorough=False))
    entry = harmless(lambda: fuzzed_cache.load(wanted))
    assert isinstance(entry, UserError) or entry["mean"].shape == shape


header = {
    "__metadata__": {"sha256": "00"},
    "mean": {"dtype": "F32", "shape": [4, 2, 2], "data_offsets": [0, 64]},
    "std": {"dtype": "F32", "shape": [4, 2, 2], "data_offsets": [64, 128]},
}


@fuzzed
@given(content=changed(header))
def test_fuzz_headers(fuzzed_cache, content):
    text = as_json(content)
    test_fuzz_entries.hypothesis.inner_test(fuzzed_cache, len(text).to_bytes(8, "little") + text + bytes(128))


def test_entries_of_any_shape(tmp_path):
    cache = TensorCache(tmp_path)
    base = torch.arange(6).view(2, 3)
    tensors = {"scalar": torch.tensor(3), "none": torch.zeros(0, 4), "plain": base, "same": base, "strided": base.T}
    cache.put("ab" * 32, tensors)
    loaded = cache.load(Wanted("ab" * 32, None))
    assert set(loaded) == set(tensors) and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, odd: float) -> None:
    tensor = torch.arange(-3.0, 3.0).to(dtype)
    assert is_finite(tensor)
    tensor[2] = odd
    assert not is_finite(tensor)


@pytest.mark.parametrize("tensor", [torch.ones(3, dtype=torch.long), torch.ones(2, dtype=torch.bool), torch.ones(0)])
def test_whole_numbers_and_no_numbers_are_finite(tensor: torch.Tensor) -> None:
    assert is_finite(tensor)
