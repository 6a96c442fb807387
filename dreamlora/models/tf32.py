"""Whether Ampere and newer GPUs may round the inputs of float32 products to TF32 (10 bits of mantissa, not 23)."""

from __future__ import annotations

import torch


def set_tf32(allowed: bool) -> None:
    """Let matrix products and convolutions use TF32, or neither; until another call, for the whole process.

    torch's own start is neither: it lets convolutions use it, and matrix products not. Nothing in half precision is
    touched; the autoencoder, which is float32 in every run, is.
    """
    # not fp32_precision: torch below 2.9 lacks it, and above it whoever still reads allow_tf32 would get an error
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
