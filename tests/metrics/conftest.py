"""Small embeddings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def rows() -> Callable[..., Tensor]:
    """``rows(n, d, seed)``: ``[n, d]`` float32, correlated columns, mean not zero."""

    def make(n: int, d: int = 6, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99))
        return torch.randn(n, d, generator=generator) @ mixing + 0.5

    return make
