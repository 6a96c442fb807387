"""Inception with made-up weights gives what torch-fidelity's network gives with them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file
from torch import Tensor

from dreamlora.errors import UserError
from dreamlora.evaluation.inception import DIM, Inception, load_inception, resize_like_tensorflow
from tests.fuzzing import damaged, fuzzed, harmless

PLACES = (0, 319, 320, 703, 704, 1087, 1088, 1471, 1472, 1855, 1856, 2047)
"""The first and last feature of every branch of the last block."""

GOLDEN: list[tuple[list[float], float]] = [
    (
        [
            8.040545,
            3.636146,
            0.158595,
            2.16125,
            0.002089,
            0.028139,
            3.288546,
            0.420068,
            11.980955,
            0.426029,
            29.493443,
            0.0,
        ],
        6.824286,
    ),
    (
        [8.847895, 3.986805, 0.15371, 2.085373, 0.0, 0.012076, 3.626098, 0.382962, 12.355742, 0.584218, 31.239487, 0.0],
        7.173146,
    ),
]
"""Per picture the features at PLACES and the mean of all, by tests/golden/make_inception.py."""


def made_up_weights() -> dict[str, Tensor]:
    """Weights under the names and with the shapes of the real ones, the same on every machine."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Inception().state_dict().items()}
    draw = np.random.default_rng(0)

    def values(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(0)
        if name.endswith(("running_var", "bn.weight")):
            return torch.from_numpy(draw.uniform(0.5, 1.5, shape).astype(np.float32))
        spread = 0.1 if len(shape) == 1 else (2 / np.prod(shape[1:])) ** 0.5
        return torch.from_numpy((spread * draw.standard_normal(shape, dtype=np.float32)).astype(np.float32))

    return {name: values(name, shape) for name, shape in shapes.items()}


def pictures() -> list[np.ndarray]:
    """Two pictures of different sizes."""
    draw = np.random.default_rng(1)
    return [draw.integers(0, 256, size, dtype=np.uint8) for size in ((64, 80, 3), (350, 300, 3))]


def test_features_are_those_of_torch_fidelity(tmp_path: Path) -> None:
    torch.save(made_up_weights(), tmp_path / "weights.pth")
    encoder = load_inception(tmp_path / "weights.pth", torch.device("cpu"))
    features = encoder.images(pictures())
    assert features.shape == (2, DIM) and encoder.dim == DIM
    assert encoder.id.startswith("inception-2015-12-05@") and encoder.id.endswith("/tf-bilinear299/pool3")
    for row, (expected, mean) in zip(features, GOLDEN, strict=True):
        assert row[list(PLACES)].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert float(row.mean()) == pytest.approx(mean, rel=1e-4)
    with pytest.raises(UserError, match="knows no texts"):
        encoder.texts(["a"])


def test_images_are_resized_as_tensorflow_1_did() -> None:
    """Output pixel i is at i * length / side, between its neighbours; the last one repeats."""
    found = resize_like_tensorflow(torch.tensor([[[[0.0, 10.0], [20.0, 40.0]]]]), 4)
    assert found[0, 0].tolist() == [[0, 5, 10, 10], [10, 17.5, 25, 25], [20, 30, 40, 40], [20, 30, 40, 40]]


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"no weights")
    for name in ("a.pth", "b.pth"):
        with pytest.raises(UserError, match=rf"{name} does not hold Inception's weights: --inception_weights takes"):
            load_inception(tmp_path / name, torch.device("cpu"))


def test_weights_may_be_safetensors(tmp_path: Path) -> None:
    weights = made_up_weights()
    torch.save(weights, tmp_path / "weights.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    first, second = (load_inception(tmp_path / f"weights.{end}", torch.device("cpu")) for end in ("pth", "safetensors"))
    assert torch.equal(first.images(pictures()[:1]), second.images(pictures()[:1]))


def test_a_pickle_runs_no_code_and_no_file_is_larger_than_the_release(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        load_inception(tmp_path / "evil.pth", torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    with (tmp_path / "large.pth").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(UserError, match="is larger than Inception's weights can be"):
        load_inception(tmp_path / "large.pth", torch.device("cpu"))


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@fuzzed
@given(damaged(saved({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)})))
def test_fuzz_inception(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "inception.pth"
    file.write_bytes(content)
    assert isinstance(harmless(lambda: load_inception(file, torch.device("cpu"))), UserError)
