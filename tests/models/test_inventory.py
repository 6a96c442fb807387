"""What lies on the hub is told without fetching it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.models import fetching
from dreamlora.models.adapter import content_of, find_adapter
from dreamlora.models.inventory import inventory, problems_of
from dreamlora.models.loading import family_of, resolve_source
from tests.hubcache import FakeHub
from tests.tinymodels.sd import save

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> SimpleNamespace:
    """A repository of which all was downloaded but the weights of the UNet, and what the hub would say of these."""
    model = save(tmp_path / "model")
    size = (model / UNET).stat().st_size
    (model / UNET).unlink()
    fake = FakeHub(tmp_path / "cache")
    fake.commit("someone/model", "a" * 40, model)
    told = SimpleNamespace(
        files={UNET: size, "text_encoder/model.safetensors": 1}, cache=tmp_path / "cache", kind="BF16"
    )

    def listed(self, repository, revision=None, files_metadata=False):
        assert revision == "a" * 40 and files_metadata
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=n) for name, n in told.files.items()])

    def header(self, repository, name, revision=None):
        return SimpleNamespace(tensors={"one": 1, "two": 2}, parameter_count={told.kind: 1000})

    def absent(*args, **kwargs):
        raise EntryNotFoundError("there is none", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(HfApi, "model_info", listed)
    monkeypatch.setattr(HfApi, "parse_safetensors_file_metadata", header)
    monkeypatch.setattr(fetching, "find_file", _from(told.cache))
    return told


def _from(cache: Path):
    def find(path: str, name: str, revision: str | None, cache_dir: Path | None) -> Path:
        file = cache / "models--someone--model" / "snapshots" / ("a" * 40) / name
        assert not name.endswith(".safetensors"), "no weights are fetched"
        return file

    return find


def parts_of(hub) -> dict:
    source = resolve_source(
        Model(pretrained_model_name_or_path="someone/model", revision="a" * 40, cache_dir=hub.cache)
    )
    family = family_of(source)
    return {part.name: part for part in inventory(source, family)}


def test_what_is_to_be_downloaded_is_known_by_size_and_header(hub) -> None:
    parts = parts_of(hub)
    unet, text = parts["unet"], parts["text_encoder"]
    assert (unet.here, unet.size, unet.parameters, unet.precision) == (False, hub.files[UNET], 1000, "BF16")
    assert text.here and text.size > 1000, "that was downloaded before"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"unet/diffusion_pytorch_model.bin": 9}, "--allow_pickle"),
        (
            {"unet/diffusion_pytorch_model.fp16.safetensors": 9},
            "diffusion_pytorch_model.fp16.safetensors on the hub: check --variant",
        ),
        ({}, "found no weights on the hub"),
    ],
)
def test_what_the_hub_lacks_is_told(hub, files: dict, said: str) -> None:
    hub.files = files
    [problem] = problems_of(list(parts_of(hub).values()))
    assert said in problem


def test_a_hub_that_cannot_be_reached_is_told(hub, monkeypatch) -> None:
    def unreachable(self, *args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    [problem] = problems_of(list(parts_of(hub).values()))
    assert "no route" in problem


def test_adapters_are_files_or_in_folders(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    assert find_adapter(str(file), None, None) == file
    assert find_adapter("typo.safetensors", None, None) == Path("typo.safetensors"), "no name of a repository"
    assert find_adapter(str(tmp_path), "a.safetensors", None) == file
    before = content_of(file)
    file.write_bytes(b"two")
    assert content_of(file) != before and len(before) == 12


def test_of_several_on_the_hub_one_is_named(monkeypatch) -> None:
    files = ["v1.safetensors", "v2.safetensors", "folder/v3.safetensors"]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=1) for name in files])
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: info)
    monkeypatch.setattr(fetching.Place, "optional", lambda self, name: None)
    monkeypatch.setattr(fetching.Place, "file", lambda self, name: Path(self.path, name))
    with pytest.raises(UserError, match=r"v1\.safetensors, v2\.safetensors.*--training_adapter_weight_name"):
        find_adapter("someone/adapters", None, None)
    assert find_adapter("someone/adapters", "v2.safetensors", None) == Path("someone/adapters/v2.safetensors")
    info.siblings = info.siblings[:1]
    assert find_adapter("someone/adapters", None, None) == Path("someone/adapters/v1.safetensors")
