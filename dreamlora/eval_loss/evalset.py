"""Deterministic evaluation loss: the training objective on frozen items (image, time, noise).

The loss of a training step is mostly the noise of its random times. Measured on the same items at every step, and in
every run, differences between checkpoints and optimizers of a fraction of a percent become visible.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Len, MaxLen
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.eval_loss.price import curve_times, final_design
from dreamlora.files import replacing, write_atomically
from dreamlora.interfaces import Conditioning, Objective
from dreamlora.randomness import generator, permutation
from dreamlora.reading import LARGEST, Schema, UnreadableError, read_json, shortened

SCHEMA_VERSION = 1
_MOST_NUMBERS = 2**27
"""In latents: 500 images of 1024² pixels for a model of 16 channels."""
_VIEW = "view."
"""Before the names of tensors that are of ``EvalSet.views``."""
_MOST_VIEWS = 16
_BOUNDS = {"latents": (-1e6, 1e6), "masks": (0, 1), "position": (0, 1), "times": (0, LARGEST)}

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy latents, times, conditioning) -> prediction, all batch first."""


@dataclass(frozen=True)
class EvalSet:
    """Frozen items. Item ``k`` is image ``image[k]`` at ``times[k]`` with noise of its own.

    Attributes:
        latents: ``[images, C, h, w]`` float32, means of the posterior.
        captions: one per image.
        masks: ``[images, 1, h, w]`` in [0, 1], how much of the loss every place has; None: all the same.
        views: what belongs to the images besides (``LatentStore.view``), ``[images, ...]`` by name: float32, but for
            pictures (uint8).
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
    views: Conditioning = field(default_factory=dict)

    def of_images(self, masks: Tensor | None, views: Conditioning) -> EvalSet:
        """The same items with masks and views, which are part of the identity; itself without any."""
        if masks is None and not views:
            return self
        more = replace(self, masks=masks, views=views)
        return replace(more, id=_identity(more))

    def subset(self, count: int, *key: int | str) -> EvalSet:
        """So many of the items, drawn by ``key``; itself where there are no more."""
        if count >= len(self.noise_keys):
            return self
        chosen = sorted(permutation(len(self.noise_keys), *key)[:count])
        image, times, position = (tensor[chosen] for tensor in (self.image, self.times, self.position))
        keys = tuple(self.noise_keys[item] for item in chosen)
        fewer = replace(self, image=image, times=times, position=position, noise_keys=keys)
        return replace(fewer, id=_identity(fewer))

    def noise(self, items: Sequence[int]) -> Tensor:
        """``[len(items), C, h, w]`` float32; drawn anew each time, so that it need not be stored."""
        shape = self.latents.shape[1:]
        return torch.stack([torch.randn(shape, generator=generator(self.noise_keys[item])) for item in items])

    def suits(self, objective: Objective) -> bool:
        """Whether the times are those of this objective, which takes no others."""
        return bool(torch.equal(objective.spread_times(self.position).double(), self.times.double()))

    def losses(self) -> ItemLosses:
        """An empty table for the losses of these items."""
        return ItemLosses(self.id, self.image.numpy(), self.position.numpy())

    def save(self, file: Path) -> None:
        """Write ``file`` (.json) and the tensors beside it (.safetensors), so that other runs can be measured on it."""
        tensors = {"latents": self.latents, "image": self.image, "times": self.times, "position": self.position}
        tensors |= {} if self.masks is None else {"masks": self.masks}
        tensors |= {_VIEW + name: tensor for name, tensor in self.views.items()}
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
    def load(cls, file: Path, inside: Path | None = None) -> EvalSet:
        """Read what ``save`` wrote.

        Args:
            file: the .json file; the tensors lie beside it.
            inside: see ``reading.opened``.

        Raises:
            UserError: a file is missing or damaged, or the two do not belong together.
        """
        beside = file.with_suffix(".safetensors")
        try:
            about = read_json(file, Schema(_About), inside)
            tensors = _read_tensors(beside, inside, images=len(about["captions"]), items=len(about["noise_keys"]))
        except FileNotFoundError:
            missing = beside if file.exists() else file
            raise UserError(f"{file} is no evaluation set that can be read: there is no {missing.name}") from None
        captions, keys = tuple(about["captions"]), tuple(about["noise_keys"])
        views = {name.removeprefix(_VIEW): tensors.pop(name) for name in sorted(tensors) if name.startswith(_VIEW)}
        model, claimed_id = about["model_id"], about["evalset_id"]
        items = cls(**tensors, views=views, captions=captions, noise_keys=keys, model_id=model, id=claimed_id)
        if _identity(items) != claimed_id:
            raise UserError(f"{file} and {beside.name} do not belong together: copy both again")
        return items


class _About(TypedDict):
    evalset_id: Annotated[str, MaxLen(100)]
    model_id: Annotated[str, MaxLen(4096)]
    captions: Annotated[list[Annotated[str, MaxLen(2**16)]], Len(1, 2**16)]
    noise_keys: Annotated[list[Annotated[str, MaxLen(4096)]], Len(1, 2**20)]


def _read_tensors(file: Path, inside: Path | None, *, images: int, items: int) -> dict[str, Tensor]:
    """The tensors of a set of so many images and items.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is damaged, or holds other tensors or values than ``save`` writes.
    """
    wanted = {"latents": "F32", "image": "I64", "times": "F32 or I64", "position": "F32", "masks": "F32"}
    with open_tensors(file, inside=inside) as stored:
        names = set(stored.keys())
        views = sorted(name for name in names if name.startswith(_VIEW))[:_MOST_VIEWS]
        wanted |= dict.fromkeys(views, "F32 or U8")
        if not wanted.keys() - {"masks", *views} <= names <= wanted.keys():
            raise UnreadableError(file, f"it holds {shortened(', '.join(sorted(names)))}, and not {', '.join(wanted)}")
        slices = {name: stored.get_slice(name) for name in names}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        latents = shapes["latents"]
        if len(latents) != 4 or latents[0] != images or not 0 < math.prod(latents) < _MOST_NUMBERS:
            raise UnreadableError(file, f"latents are {latents}, and not those of {images} images")
        fit = dict.fromkeys(wanted, (items,)) | {"latents": latents, "masks": (images, 1, *latents[2:])}
        fit |= {name: (images, *shapes[name][1:]) for name in views}
        if sum(_size(slices[name]) for name in views) > _MOST_NUMBERS:
            raise UnreadableError(file, f"{', '.join(views)} are larger than those of any images")
        for name, shape in shapes.items():
            if shape != fit[name] or slices[name].get_dtype() not in wanted[name]:
                found = f"{slices[name].get_dtype()} {shape}"
                raise UnreadableError(file, f"{name} is {found}, and not {wanted[name]} {fit[name]}")
        tensors: dict[str, Tensor] = {name: stored.get_tensor(name) for name in sorted(names)}
    for name, (low, high) in {**_BOUNDS, "image": (0, images - 1), **dict.fromkeys(views, _BOUNDS["latents"])}.items():
        tensor = tensors.get(name)
        if tensor is not None and not bool(((tensor >= low) & (tensor <= high)).all()):
            raise UnreadableError(file, f"{name} has values that are not in [{low:g}, {high:g}]")
    return tensors


def _size(part: Any) -> float:
    """Of a tensor in a file, in numbers of four bytes."""
    return float(math.prod(part.get_shape())) * (0.25 if part.get_dtype() == "U8" else 1.0)


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
    items = EvalSet(latents, tuple(captions), image, times, position, keys, model_id, "")
    return replace(items, id=_identity(items))


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
    items = replace(curve, image=image, times=times, position=position, noise_keys=keys)
    return replace(items, id=_identity(items))


def _spread(n_images: int, n_times: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, time bin and position of ``n_images * n_times`` items, image by image."""
    image = torch.arange(n_images).repeat_interleave(n_times)
    bins = torch.arange(n_times).repeat(n_images)
    shift = (image + 0.5) / n_images  # in bins; 0.5 is the plain midpoint of a single image
    return image, bins, ((bins + shift) / n_times).to(torch.float32)


def _identity(items: EvalSet) -> str:
    told = (items.noise_keys, items.captions, items.model_id, items.times.tolist())
    digest = hashlib.sha256(repr(told).encode())
    for tensor in (items.latents, items.masks):
        digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
    for name, tensor in sorted(items.views.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Attributes:
        predict: the model in eval mode.
        objective: of its training.
        conditioning: captions to batched conditioning on ``device``, by what belongs to their images.
        device: of the model.
    """

    predict: Predict
    objective: Objective
    conditioning: Callable[[Sequence[str], Conditioning], Conditioning]
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
        views = {name: view[image] for name, view in items.views.items()}
        conditioning = model.conditioning([items.captions[i] for i in image.tolist()], views)
        conditioning = {**conditioning, **{name: view.to(model.device) for name, view in views.items()}}
        prediction = model.predict(noisy, times, conditioning)
        target = model.objective.target(latents, noise, times)
        masks = None if items.masks is None else items.masks[image].to(model.device)
        losses.update(torch.tensor(chunk), prediction, target, masks)
    return losses.compute().tolist()
