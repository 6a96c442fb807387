"""The disk cache: what it trusts, what it makes anew, and who may share it."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dreamlora.data import cache as cache_module
from dreamlora.data import encode as encode_module
from dreamlora.data.buckets import bucket_sizes
from dreamlora.data.cache import Recent, TensorCache, content_key
from dreamlora.data.cache_folder import cache_folder
from dreamlora.data.dataset import examine
from dreamlora.data.encode import Filling, encode_dataset, encode_prompts
from dreamlora.data.folder import load_folder
from dreamlora.data.transforms import Preparation, Preparations, prepare, variants
from dreamlora.errors import UserError
from dreamlora.interfaces import Latents

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
    places = [cache_module.Wanted(key, None) for key in keys]
    recent = Recent(cache, limit=2 * (1024 + cache_module._OBJECT_BYTES))
    kept = [recent[places[0]], recent[places[1]]]
    assert recent[places[0]] is kept[0]
    _ = recent[places[2]]  # pushes out 1, the longest unused
    assert recent[places[0]] is kept[0] and recent[places[1]] is not kept[1]
    assert recent[places[3]]["x"][0] == 3 and Recent(cache, limit=0)[places[3]]["x"][0] == 3


def test_entries_of_any_shape(tmp_path):
    cache = TensorCache(tmp_path)
    base = torch.arange(6).view(2, 3)
    tensors = {"scalar": torch.tensor(3), "none": torch.zeros(0, 4), "plain": base, "same": base, "strided": base.T}
    cache.put("ab" * 32, tensors)
    loaded = cache.load(cache_module.Wanted("ab" * 32, None))
    assert set(loaded) == set(tensors) and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
