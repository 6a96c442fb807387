"""What is uploaded: what the run has made, nothing from behind links, no local path, no token in an error."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers.utils import hub_utils
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import RepositoryNotFoundError

from dreamlora import tiny
from dreamlora.config import NewTokens, RunConfig
from dreamlora.errors import UserError
from dreamlora.run import upload
from dreamlora.run.upload import check_hub, push_to_hub
from dreamlora.runfolder import LORA_FILE, RunFolder

TOKEN = "hf_ab cd"
NAME = "step_000100/p00_s42-1a2b3c4d5e6f.png"


class Hub:
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self.sent: dict[str, bytes] = {}
        self.failure: Exception | None = None

    def __call__(self, token: str | None) -> Hub:
        return self

    def create_repo(self, name: str, exist_ok: bool) -> Any:
        return SimpleNamespace(repo_id=f"me/{name}")

    def whoami(self) -> None:
        if self.failure:
            raise self.failure

    def create_commit(self, repository: str, operations: list[CommitOperationAdd], commit_message: str) -> None:
        if self.failure:
            raise self.failure
        for operation in operations:
            with operation.as_file() as content:
                self.sent[operation.path_in_repo] = content.read()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()

    def nothing(*_: Any, **__: Any) -> Any:
        raise RepositoryNotFoundError("none", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(upload, "HfApi", hub)
    monkeypatch.setattr(hub_utils.ModelCard, "load", nothing)
    return hub


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    for file in (run.lora_file, run.best / LORA_FILE, run.selection_file):
        write(file, b"made")
    write(run.samples / NAME, b"picture")
    fields = {"step": 100, "prompt_index": 0, "image_index": 0, "prompt": "a dog", "seed": 42, "file": NAME}
    row = {**fields, "sha256": hashlib.sha256(b"picture").hexdigest(), "note": f"{tmp_path}/x"}
    write(run.samples_file, json.dumps(row).encode())
    for stray in ("samples/notes.txt", "samples/step_000100/stray.png", "best/key", "config.yaml", "metrics.jsonl"):
        write(run.path / stray, b"private")
    return run


def config(model: str = "owner/name", **train: Any) -> RunConfig:
    base = RunConfig()
    own = replace(base.train, hub_token=TOKEN, **train)
    return replace(base, train=own, model=replace(base.model, pretrained_model_name_or_path=model))


MADE = {"README.md", LORA_FILE, f"best/{LORA_FILE}", "best/selection.json", f"samples/{NAME}", "samples/samples.jsonl"}


def test_what_the_run_made_is_uploaded_and_nothing_else(run: RunFolder, hub: Hub) -> None:
    push_to_hub(config(), run)
    assert set(hub.sent) == MADE and hub.sent[f"samples/{NAME}"] == b"picture"
    assert str(run.path.parent).encode() not in b"".join(hub.sent.values())


def test_embeddings_of_new_tokens_are_and_the_card_tells_of_them(run: RunFolder, hub: Hub) -> None:
    mine = {f"{place}embeddings/{name}.safetensors" for place in ("", "best/") for name in ("sks", "style")}
    for name in (*mine, "embeddings/stray.safetensors"):
        write(run.path / name, b"rows")
    push_to_hub(replace(config(), tokens=NewTokens(new_tokens=("sks=dog", "<style>"))), run)
    assert set(hub.sent) == MADE | mine
    assert "`embeddings/style.safetensors` for `<style>`" in hub.sent["README.md"].decode()


def test_formats_that_were_asked_for_are_uploaded(run: RunFolder, hub: Hub) -> None:
    made = {
        "run_kohya.safetensors",
        "best/run_peft/adapter_config.json",
        "best/run_peft/text_encoder/adapter_config.json",
    }
    for name in (*made, "run_comfyui.safetensors"):
        write(run.path / name, b"made")
    push_to_hub(config(save_format=("kohya", "peft")), run)
    assert set(hub.sent) == MADE | made


@pytest.mark.parametrize("name", sorted(MADE - {"README.md", "samples/samples.jsonl"}))
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_from_behind_a_link_is(kind: str, name: str, run: RunFolder, hub: Hub, tmp_path: Path) -> None:
    write(tmp_path / "id_rsa", b"secret")
    (run.path / name).unlink()
    (run.path / name).symlink_to(tmp_path / "id_rsa") if kind == "link" else os.mkfifo(run.path / name)
    push_to_hub(config(), run)
    assert name not in hub.sent and b"secret" not in hub.sent.values()


def test_a_link_in_the_cards_place_is_replaced(run: RunFolder, hub: Hub, tmp_path: Path) -> None:
    write(tmp_path / "notes", b"notes")
    (run.path / "README.md").symlink_to(tmp_path / "notes")
    push_to_hub(config(), run)
    assert (tmp_path / "notes").read_bytes() == b"notes" and b"A LoRA of rank" in hub.sent["README.md"]


@pytest.mark.parametrize("place", ["samples", "best"])
def test_nor_from_a_folder_behind_one(place: str, run: RunFolder, hub: Hub, tmp_path: Path) -> None:
    """It may be one of another run, which is not to be published."""
    (run.path / place).rename(tmp_path / "private")
    (run.path / place).symlink_to(tmp_path / "private")
    push_to_hub(config(), run)
    assert set(hub.sent) == {name for name in MADE if not name.startswith(place)}


@pytest.mark.parametrize("model", ["{}", "{}/none", "./model", "models/sd", "../a/b", "~/model", *tiny.MODELS])
def test_no_local_path_is_in_the_card(
    model: str, run: RunFolder, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd").mkdir(parents=True)
    push_to_hub(config(model.format(tmp_path / "models")), run)
    card = hub.sent["README.md"].decode()
    assert "base_model" not in card and str(tmp_path) not in card and "models" not in card


@pytest.mark.parametrize("model", ["owner/name", "gpt2"])
def test_a_model_of_the_hub_is_named(model: str, run: RunFolder, hub: Hub) -> None:
    push_to_hub(config(model), run)
    assert f"base_model: {model}" in hub.sent["README.md"].decode()


def test_a_card_of_before_loses_its_path(run: RunFolder, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    card = hub_utils.ModelCard("---\nbase_model: /home/me/models/sd\nlicense: mit\n---\nmine")
    monkeypatch.setattr(hub_utils.ModelCard, "load", lambda *_, **__: card)
    push_to_hub(config(), run)
    text = hub.sent["README.md"].decode()
    assert "/home/me" not in text and "license: mit" in text and "mine" in text


@pytest.mark.parametrize(
    "failure",
    [
        ValueError(f"Illegal header value b'Bearer {TOKEN}'"),
        OSError("no route"),
        UnicodeEncodeError("ascii", "é", 0, 1, "x"),
    ],
)
def test_a_failure_is_one_message_without_the_token(failure: Exception, run: RunFolder, hub: Hub) -> None:
    hub.failure = failure
    for call in (lambda: check_hub(config()), lambda: push_to_hub(config(), run)):
        with pytest.raises(UserError, match="--push_to_hub: ") as told:
            call()
        assert TOKEN not in str(told.value) and "\n" not in str(told.value)
    assert "is complete, but the upload failed" in str(told.value)
