"""The Inception network that FID is defined by, in plain torch: neither torchvision nor torch-fidelity is needed.

It differs from torchvision's Inception as the TensorFlow graph of 2015 does: average pooling leaves the padding out,
the last block takes the maximum instead, and images are resized by TensorFlow 1's bilinear rule (no antialiasing, no
shift by half a pixel). So its numbers are those of torch-fidelity, within rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamlora.errors import UserError
from dreamlora.evaluation.preprocessing import Picture, as_image
from dreamlora.models.configs import in_one_line
from dreamlora.models.weights import read_header, read_tensors

SIDE = 299
DIM = 2048
BATCH = 16
MOST_BYTES = 2**28
"""The release has 95 MB."""
CLASSES = 1008
RELEASE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
FILE = "weights-inception-2015-12-05-6726825d.pth"


class Step(NamedTuple):
    """A convolution of a branch: its name in the weights, output channels, kernel (height, width) and stride."""

    name: str
    outputs: int
    size: tuple[int, int]
    stride: int = 1


Branch = tuple[tuple[Step, ...], ...]
"""Steps one after the other; several in one place see the same input, and their outputs are joined."""


def _chain(name: str, *steps: tuple[int, tuple[int, int]], stride: int = 1, fork: bool = False) -> Branch:
    """``name_1``, ``name_2``, ...; the last with ``stride``, or as a fork into 1 x 3 and 3 x 1."""
    count = len(steps) + fork
    numbered: list[tuple[Step, ...]] = [
        (Step(f"{name}_{i}" if count > 1 else name, outputs, size, stride if i == len(steps) else 1),)
        for i, (outputs, size) in enumerate(steps, start=1)
    ]
    if fork:
        numbered.append((Step(f"{name}_{count}a", 384, (1, 3)), Step(f"{name}_{count}b", 384, (3, 1))))
    return tuple(numbered)


_1, _3, _5, _ROW, _COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _a() -> tuple[Branch, ...]:
    return (
        _chain("branch1x1", (64, _1)),
        _chain("branch5x5", (48, _1), (64, _5)),
        _chain("branch3x3dbl", (64, _1), (96, _3), (96, _3)),
    )


def _b() -> tuple[Branch, ...]:
    return (
        _chain("branch3x3", (384, _3), stride=2),
        _chain("branch3x3dbl", (64, _1), (96, _3), (96, _3), stride=2),
    )


def _c(width: int) -> tuple[Branch, ...]:
    return (
        _chain("branch1x1", (192, _1)),
        _chain("branch7x7", (width, _1), (width, _ROW), (192, _COLUMN)),
        _chain("branch7x7dbl", (width, _1), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)),
    )


def _d() -> tuple[Branch, ...]:
    return (
        _chain("branch3x3", (192, _1), (320, _3), stride=2),
        _chain("branch7x7x3", (192, _1), (192, _ROW), (192, _COLUMN), (192, _3), stride=2),
    )


def _e() -> tuple[Branch, ...]:
    return (
        _chain("branch1x1", (320, _1)),
        _chain("branch3x3", (384, _1), fork=True),
        _chain("branch3x3dbl", (448, _1), (384, _3), fork=True),
    )


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, step: Step, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, step.outputs, step.size, step.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(step.outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, outputs, h, w]``."""
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Branches side by side, and a pooling branch; their outputs are joined.

    Args:
        inputs: channels.
        branches: of convolutions.
        pooled: channels that the pooling branch is brought to; 0: it halves the picture, as the convolutions do.
        largest: whether its pooling takes the maximum instead of the mean.
    """

    def __init__(self, inputs: int, branches: tuple[Branch, ...], pooled: int, largest: bool = False) -> None:
        super().__init__()
        self._branches = branches
        self._pooled = pooled
        self._largest = largest
        for branch in branches:
            width = inputs
            for fork in branch:
                for step in fork:
                    same = (step.size[0] // 2, step.size[1] // 2) if step.stride == 1 else (0, 0)
                    self.add_module(step.name, Conv(width, step, same))
                width = sum(step.outputs for step in fork)
        if pooled:
            self.branch_pool = Conv(inputs, Step("branch_pool", pooled, _1), (0, 0))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` to ``[B, C', h', w']``."""
        return torch.cat([*(self._along(branch, x) for branch in self._branches), self._pool(x)], 1)

    def _along(self, branch: Branch, x: Tensor) -> Tensor:
        for fork in branch:
            x = torch.cat([self.get_submodule(step.name)(x) for step in fork], 1)
        return x

    def _pool(self, x: Tensor) -> Tensor:
        if not self._pooled:
            return F.max_pool2d(x, 3, 2)
        if self._largest:
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


class Inception(nn.Module):
    """Pixels ``[B, 3, h, w]`` in 0..255 to the 2048 features before the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, Step("", 32, _3, 2), (0, 0))
        self.Conv2d_2a_3x3 = Conv(32, Step("", 32, _3), (0, 0))
        self.Conv2d_2b_3x3 = Conv(32, Step("", 64, _3), (1, 1))
        self.Conv2d_3b_1x1 = Conv(64, Step("", 80, _1), (0, 0))
        self.Conv2d_4a_3x3 = Conv(80, Step("", 192, _3), (0, 0))
        self.Mixed_5b = InceptionBlock(192, _a(), 32)
        self.Mixed_5c = InceptionBlock(256, _a(), 64)
        self.Mixed_5d = InceptionBlock(288, _a(), 64)
        self.Mixed_6a = InceptionBlock(288, _b(), 0)
        self.Mixed_6b = InceptionBlock(768, _c(128), 192)
        self.Mixed_6c = InceptionBlock(768, _c(160), 192)
        self.Mixed_6d = InceptionBlock(768, _c(160), 192)
        self.Mixed_6e = InceptionBlock(768, _c(192), 192)
        self.Mixed_7a = InceptionBlock(768, _d(), 0)
        self.Mixed_7b = InceptionBlock(1280, _e(), 192)
        self.Mixed_7c = InceptionBlock(2048, _e(), 192, largest=True)
        self.fc = nn.Linear(DIM, CLASSES)  # not used; the weights have it

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 2048]``."""
        x = (resize_like_tensorflow(pixels, SIDE) - 128) / 128
        for name, part in self.named_children():
            if name == "fc":
                break
            x = part(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        return x.mean((2, 3))


def resize_like_tensorflow(pixels: Tensor, side: int) -> Tensor:
    """``[B, C, h, w]`` to ``[B, C, side, side]``: output pixel i lies at i * h / side of the input, between pixels."""
    for axis in (2, 3):
        length = pixels.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=pixels.device) * (length / side)
        low = place.long()
        high = (low + 1).clamp_max(length - 1)
        share = (place - low).reshape(-1, 1) if axis == 2 else place - low
        first, second = pixels.index_select(axis, low), pixels.index_select(axis, high)
        pixels = first + (second - first) * share
    return pixels


class InceptionEncoder:
    """Inception as :class:`~dreamlora.interfaces.Encoder`; it knows no texts.

    Args:
        encoder_id: see there.
        network: frozen, in eval mode.
    """

    dim = DIM

    def __init__(self, encoder_id: str, network: Inception) -> None:
        self.id = encoder_id
        self._network = network

    def images(self, images: Sequence[Picture]) -> Tensor:
        """Features ``[n, 2048]`` float32 on the CPU, of images of any size.

        Raises:
            TypeError: not PIL images or uint8 arrays ``[H, W, 3]``.
        """
        parts = [self._features(batch) for batch in _of_one_size([as_image(image) for image in images])]
        return torch.cat(parts) if parts else torch.zeros(0, DIM)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Never.

        Raises:
            UserError: always.
        """
        raise UserError("Inception knows no texts: a CLIP or SigLIP model is needed (--clip_model)")

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self._network.to(device)

    def _features(self, batch: np.ndarray) -> Tensor:
        device = self._network.fc.weight.device
        pixels = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float()
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            features: Tensor = self._network(pixels)
        return features.cpu()


def _of_one_size(images: Sequence[Picture]) -> Iterator[np.ndarray]:
    """Batches ``[b, H, W, 3]`` of neighbours that have one size."""
    batch: list[np.ndarray] = []
    for pixels in map(np.asarray, images):
        if batch and (len(batch) == BATCH or pixels.shape != batch[0].shape):
            yield np.stack(batch)
            batch = []
        batch.append(pixels)
    if batch:
        yield np.stack(batch)


def load_inception(file: Path, device: torch.device) -> InceptionEncoder:
    """Inception with the weights of a local file; tensors only are read from it, no other pickled objects.

    Args:
        file: of torch, or of safetensors.
        device: where it computes.

    Raises:
        UserError: the file is not there, or holds something else; the message says where the right one is.
    """
    remedy = f"--inception_weights takes {FILE}, downloaded from {RELEASE}"
    if not file.is_file():
        raise UserError(f"there is no file {file}: {remedy}")
    if file.stat().st_size > MOST_BYTES:
        raise UserError(f"{file} is larger than Inception's weights can be: {remedy}")
    try:
        if file.suffix == ".safetensors":
            read_header(file)
        weights = read_tensors(file)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            network = Inception()
        network.load_state_dict(weights)
    except Exception as error:  # of many kinds: a pickle is a program, and this one a stranger's
        raise UserError(
            f"{file} does not hold Inception's weights: {remedy}. The reason given: {in_one_line(error)}"
        ) from error
    content = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    frozen = network.requires_grad_(False).eval().to(device)
    return InceptionEncoder(f"inception-2015-12-05@{content}/tf-bilinear{SIDE}/pool3", frozen)
