"""Fixtures of all tests: one thread, no network, and the small models, made once."""

from __future__ import annotations

import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tinymodels


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def frozen_imports() -> None:
    """A run collects garbage at each of its stages, and would look through all that was imported, 0.2 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and what tests start and interrupt would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small StableDiffusionPipeline; not to be written to."""
    return tinymodels.save_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FluxPipeline; not to be written to."""
    return tinymodels.save_flux(tmp_path_factory.mktemp("models") / "flux")
