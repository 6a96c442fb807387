"""Models that try to reach further than their numbers, and what shows whether they did."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pydantic  # our own reader's, imported when the first file is read
import pytest

NETWORK = (
    *("hf_hub_download", "snapshot_download", "http_get", "get_hf_file_metadata", "get_session", "model_info"),
    *("list_repo_templates", "get_kernel", "get_local_kernel", "get_class_from_dynamic_module", "auto_conversion"),
)
"""What asks the hub, or runs what it gives, in whichever module of the libraries it is known by that name."""
LIBRARIES = ("huggingface_hub", "transformers", "diffusers", "peft", "accelerate", "dreamlora")


def edit_json(file: Path, **values: Any) -> None:
    """Set fields of a JSON file that holds a mapping."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | values), encoding="utf-8")


@contextmanager
def nothing_foreign() -> Iterator[None]:
    """Fails if the network is asked, code of another package is imported, or a terminal, in this block."""
    assert pydantic.VERSION
    before, asked = set(sys.modules), []

    def refuse(name: str) -> Any:
        def called(*arguments: Any, **options: Any) -> None:
            asked.append((name, arguments))
            raise AssertionError(f"{name} was called: {arguments}")

        return called

    with pytest.MonkeyPatch.context() as patch:
        for module in [module for name, module in sys.modules.items() if name.split(".")[0] in LIBRARIES]:
            for name in NETWORK:
                if callable(vars(module).get(name)):
                    patch.setattr(module, name, refuse(name))
        for name in [name for name in dir(huggingface_hub.HfApi) if not name.startswith("_")]:
            patch.setattr(huggingface_hub.HfApi, name, refuse(f"HfApi.{name}"))
        patch.setattr("socket.socket.connect", refuse("connect"))
        patch.setattr("builtins.input", refuse("input"))
        yield
    assert not asked
    known = {name.split(".")[0] for name in before} | sys.stdlib_module_names
    new = {name for name in set(sys.modules) - before if name.split(".")[0] not in known}
    assert not new, f"imported: {new}"
    assert not {"transformers_modules", "diffusers_modules"} & sys.modules.keys()
