"""Numbers of every precision are torch's; the sums are those of the bytes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dreamlora.commands.inspect.tensors import tensor_file
from dreamlora.reading import UnreadableError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_code_of_a_precision_is_the_number_that_torch_reads(dtype, tmp_path):
    """All of 8 and 16 bits, NaN and infinities too; many of the others."""
    bits = 8 * dtype.itemsize
    if bits <= 16:
        codes = torch.arange(2**bits, dtype=torch.int64).to(torch.uint8 if bits == 8 else torch.int16)
        tensor = codes.view(dtype)
    else:
        tensor = torch.randn(64, 3, dtype=dtype)
    save_file({"a": tensor, "b": torch.ones(2)}, tmp_path / "a.safetensors")
    with tensor_file(tmp_path / "a.safetensors") as file:
        found = file.numbers("a")
        assert file.numbers("b").tolist() == [1, 1]
    expected = tensor if dtype == torch.float64 else tensor.float()
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.dtype == (np.float64 if dtype == torch.float64 else np.float32)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_whole_numbers_are_read_too(dtype, tmp_path):
    save_file({"a": torch.tensor([0, 1, 1]).to(dtype)}, tmp_path / "a.safetensors")
    with tensor_file(tmp_path / "a.safetensors") as file:
        assert file.numbers("a").tolist() == [0, 1, 1]


def test_complex_numbers_are_none(tmp_path):
    save_file({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    with tensor_file(tmp_path / "a.safetensors") as file:
        assert file.numbers("a") is None


def test_sums_are_those_of_the_file_and_of_all_behind_its_header(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(300, 1001)}, path, metadata={"x": "y"})
    content = path.read_bytes()
    with tensor_file(path) as file:
        assert file.size == len(content)
        assert file.metadata == {"x": "y"}
        digests = file.digests()
    assert digests.file == hashlib.sha256(content).hexdigest()
    assert digests.tensors == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def test_a_file_cut_short_while_it_is_read_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(300, 1001)}, path)
    with tensor_file(path) as file:
        with path.open("r+b") as stream:
            stream.truncate(1000)
        with pytest.raises(UnreadableError, match="ends within a"):
            file.numbers("a")
