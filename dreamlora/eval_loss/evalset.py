"""Deterministic evaluation loss: the training objective on frozen items (image, time, noise).

The loss of a training step is mostly the noise of its random times. Measured on the same items at every step, and in
every run, differences between checkpoints and optimizers of a fraction of a percent become visible.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamlora.errors import UserError
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.eval_loss.price import curve_times, final_design
from dreamlora.files import replacing, write_atomically
from dreamlora.interfaces import Conditioning, Objective
from dreamlora.randomness import generator

SCHEMA_VERSION = 1

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy latents, times, conditioning) -> prediction, all batch first."""


@dataclass(frozen=True)
class EvalSet:
    """Frozen items. Item ``k`` is image ``image[k]`` at ``times[k]`` with noise of its own.

    Attributes:
        latents: ``[images, C, h, w]`` float32, means of the posterior.
        captions: one per image.
        masks: ``[images, 1, h, w]`` in [0, 1], how much of the loss every place has; None: all the same.
        image: ``[items]`` int64.
        times: ``[items]``, as the objective takes them.
        position: ``[items]`` float32 in (0, 1): how far along the schedule, whatever its units.
        noise_keys: one per item, for ``randomness.generator``.
        model_id: of the base model, and the prediction type where it is not the model's own.
        id: hash of all of the above; values with different ids must not be compared.
    """

    latents: Tensor
    captions: tuple[str, ...]
    image: Tensor
    times: Tensor
    position: Tensor
    noise_keys: tuple[str, ...]
    model_id: str
    id: str
    masks: Tensor | None = None

    def masked(self, masks: Tensor | None) -> EvalSet:
        """The same items with masks ``[images, 1, h, w]``, which are part of the identity; itself without any."""
        if masks is None:
            return self
        identity = _identity(self.latents, self.captions, self.times, self.noise_keys, self.model_id, masks)
        return replace(self, masks=masks, id=identity)

    def noise(self, items: Sequence[int]) -> Tensor:
        """``[len(items), C, h, w]`` float32; drawn anew each time, so that it need not be stored."""
        shape = self.latents.shape[1:]
        return torch.stack([torch.randn(shape, generator=generator(self.noise_keys[item])) for item in items])

    def losses(self) -> ItemLosses:
        """An empty table for the losses of these items."""
        return ItemLosses(self.id, self.image.numpy(), self.position.numpy())

    def save(self, file: Path) -> None:
        """Write ``file`` (.json) and the tensors beside it (.safetensors), so that other runs can be measured on it."""
        tensors = {"latents": self.latents, "image": self.image, "times": self.times, "position": self.position}
        tensors |= {} if self.masks is None else {"masks": self.masks}
        with replacing(file.with_suffix(".safetensors")) as temporary:
            # for flow models times and positions are one tensor, which safetensors does not take
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary)
        about = {
            "schema_version": SCHEMA_VERSION,
            "evalset_id": self.id,
            "model_id": self.model_id,
            "images": len(self.captions),
            "items": len(self.noise_keys),
            "captions": self.captions,
            "noise_keys": self.noise_keys,
        }
        write_atomically(file, json.dumps(about, indent=1))

    @classmethod
    def load(cls, file: Path) -> EvalSet:
        """Read what ``save`` wrote.

        Raises:
            UserError: a file is missing or damaged, or the two do not belong together.
        """
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            tensors = load_file(file.with_suffix(".safetensors"))
            keys, captions = tuple(about["noise_keys"]), tuple(about["captions"])
            model, claimed_id = about["model_id"], about["evalset_id"]
            parts = [tensors[name] for name in ("latents", "image", "times", "position")]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{file} is no evaluation set that can be read ({type(error).__name__})") from error
        latents, image, times, position = parts
        masks = tensors.get("masks")
        if _identity(latents, captions, times, keys, model, masks) != claimed_id:
            raise UserError(
                f"{file} and {file.with_suffix('.safetensors').name} do not belong together: copy both again"
            )
        return cls(latents, captions, image, times, position, keys, model, claimed_id, masks)


def build_eval_set(
    latents: Tensor, captions: Sequence[str], names: Sequence[str], objective: Objective, *, seed: int, model_id: str
) -> EvalSet:
    """The set of the curve: about 64 items, spread evenly over images and times.

    Times are midpoints of equal bins, shifted from image to image (a Latin design), so that together the images cover
    the whole schedule.

    Args:
        latents: ``[images, C, h, w]`` means of the posterior.
        captions: one per image.
        names: stable identity of every image (its content hash): decides the noise.
        objective: maps positions to times.
        seed: of the noises; runs that are compared share it.
        model_id: of the base model, for the set's id.
    """
    image, bins, position = _spread(len(latents), curve_times(len(latents)))
    keys = tuple(f"{seed}/{names[i]}/{j}" for i, j in zip(image.tolist(), bins.tolist(), strict=True))
    times = objective.spread_times(position)
    identity = _identity(latents, captions, times, keys, model_id)
    return EvalSet(latents, tuple(captions), image, times, position, keys, model_id, identity)


def build_final_set(
    curve: EvalSet, names: Sequence[str], objective: Objective, *, seed: int, n_items: int = 256
) -> EvalSet:
    """The larger set for the end of a run: the curve's images at more times, with one or two noises, none the curve's.

    Args:
        curve: gives images, captions and model.
        names: stable identity of every image.
        objective: maps positions to times.
        seed: of the noises.
        n_items: at least so many items; 256 of 8 images are 8 x 16 x 2.
    """
    n_images = len(curve.captions)
    n_times, n_noises = final_design(n_images, n_items)
    image, bins, position = (part.repeat_interleave(n_noises) for part in _spread(n_images, n_times))
    numbers = list(range(n_noises)) * (n_images * n_times)
    where = zip(image.tolist(), bins.tolist(), numbers, strict=True)
    keys = tuple(f"{seed}/final/{names[i]}/{j}/{k}" for i, j, k in where)
    times = objective.spread_times(position)
    identity = _identity(curve.latents, curve.captions, times, keys, curve.model_id, curve.masks)
    return EvalSet(curve.latents, curve.captions, image, times, position, keys, curve.model_id, identity, curve.masks)


def _spread(n_images: int, n_times: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, time bin and position of ``n_images * n_times`` items, image by image."""
    image = torch.arange(n_images).repeat_interleave(n_times)
    bins = torch.arange(n_times).repeat(n_images)
    shift = (image + 0.5) / n_images  # in bins; 0.5 is the plain midpoint of a single image
    return image, bins, ((bins + shift) / n_times).to(torch.float32)


def _identity(
    latents: Tensor,
    captions: Sequence[str],
    times: Tensor,
    keys: tuple[str, ...],
    model_id: str,
    masks: Tensor | None = None,
) -> str:
    digest = hashlib.sha256(repr((keys, tuple(captions), model_id, times.tolist())).encode())
    for tensor in (latents, masks):
        digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Attributes:
        predict: the model in eval mode.
        objective: of its training.
        conditioning: captions to batched conditioning on ``device``.
        device: of the model.
    """

    predict: Predict
    objective: Objective
    conditioning: Callable[[Sequence[str]], Conditioning]
    device: torch.device


@torch.no_grad()
def evaluate_loss(model: Measured, items: EvalSet, *, batch_size: int, rank: int = 0, world: int = 1) -> list[float]:
    """Mean squared error of every item in float32, unweighted but for its mask. Every process must call it, and gets
    all losses.

    Args:
        model: what is measured.
        items: what to measure on.
        batch_size: items per forward pass; does not change the values beyond rounding.
        rank: this process evaluates items ``rank, rank + world, ...``.
        world: number of processes.

    Returns:
        The losses in the order of the items.
    """
    from dreamlora.eval_loss.metric import EvalLoss

    mine = range(rank, len(items.times), world)
    losses = EvalLoss().to(model.device)
    for start in range(0, len(mine), batch_size):
        chunk = list(mine[start : start + batch_size])
        image = items.image[chunk]
        latents = items.latents[image].to(model.device)
        noise = items.noise(chunk).to(model.device)
        times = items.times[chunk].to(model.device)
        noisy = model.objective.corrupt(latents, noise, times)
        prediction = model.predict(noisy, times, model.conditioning([items.captions[i] for i in image.tolist()]))
        target = model.objective.target(latents, noise, times)
        masks = None if items.masks is None else items.masks[image].to(model.device)
        losses.update(torch.tensor(chunk), prediction, target, masks)
    return losses.compute().tolist()
