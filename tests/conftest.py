"""Fixtures of all tests: one thread, no network, and the small models, made once."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dreamlora import interfaces, registry
from dreamlora.models import parts as parts_module
from dreamlora.models import turns
from tests import tinymodels
from tests.fakemps import Bus, FakeMps


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


OPTIONAL = Path(sys.prefix, "optional")
"""Packages that ``make install`` puts apart, as every process would be slower to start with them."""


@pytest.fixture(scope="session")
def bitsandbytes() -> Iterator[ModuleType]:
    """Importable in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(OPTIONAL)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(OPTIONAL), os.environ.get("PYTHONPATH")])))
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that it lacks on a CPU
        yield pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small model of a family ("sdxl"), or a variant of it ("flux2-dev"), as a folder; not to be written to."""
    place = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: tinymodels.SAVERS[name](place / name))


@pytest.fixture(scope="session")
def sd_folder(tiny_folder: Callable[[str], Path]) -> Path:
    """A small StableDiffusionPipeline; not to be written to."""
    return tiny_folder("sd")


@pytest.fixture(scope="session")
def flux_folder(tiny_folder: Callable[[str], Path]) -> Path:
    """A small FluxPipeline; not to be written to."""
    return tiny_folder("flux")


@pytest.fixture
def glow(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A metric of sets that somebody has put into the folder of metrics; nothing else knows of it."""

    def compute(inputs: interfaces.MetricInputs) -> interfaces.Reading:
        assert inputs.references is not None
        bright = inputs.generated.mean() - inputs.references.mean()
        return interfaces.Reading(
            float(bright), len(inputs.generated), len(inputs.references), {"spread": float(inputs.generated.std())}
        )

    plugin = ModuleType("dreamlora.metrics.glow")
    vars(plugin).update(
        NAME="img/glow",
        ABOUT="Glow: how much brighter than the held-out images. Near 0 is better",
        ENCODER="dino",
        NEEDS=frozenset({"references"}),
        HIGHER_IS_BETTER=False,
        SELECTS=True,
        COMPARES_SETS=True,
        compute=compute,
    )
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda kind: [*names(kind), *(["glow"] if kind == "metrics" else [])])
    return plugin


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    """The device of ``FakeMps``, and what ``Parts`` has there."""
    bus = Bus()
    monkeypatch.setattr(turns, "move", bus.move)
    monkeypatch.setattr(parts_module, "move", bus.move)
    with FakeMps():
        yield bus


@pytest.fixture(scope="module")
def small_areas() -> Iterator[None]:
    """Qwen-Image-Edit's pipelines, and its family after them, resize what they edit to a megapixel; in here to less."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            inner = module.calculate_dimensions
            patch.setattr(module, "calculate_dimensions", lambda area, ratio, inner=inner: inner(area / 256, ratio))
        yield
