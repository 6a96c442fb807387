"""A run gone through with a model without numbers: how much every piece of it computes with at a time.

Every piece runs the family's own code on torch's meta device (``models.footprint``); at no time is a weight loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.interfaces import Components, Conditioning, Role, View
from dreamlora.lora.inject import trainable_parameters
from dreamlora.lora.pairs import tuned_layers
from dreamlora.models.building import without_weights
from dreamlora.models.configs import in_one_line
from dreamlora.models.footprint import META, Footprint, Stored, bytes_of
from dreamlora.models.offload import blocks_of, waiting_blocks
from dreamlora.models.parts import DTYPES, ROLES
from dreamlora.models.tiling import TILE, can_tile
from dreamlora.run.context import RunContext
from dreamlora.run.encoding import prompt_length
from dreamlora.run.trainable import add_adapter
from dreamlora.training.loop import Predictor
from dreamlora.training.stream import stack_conditioning

_SUM = "a sum over the layers: the model's own code goes by the numbers in its tensors"


class Trained(NamedTuple):
    """The adapter of one part: its layers and numbers, and the ranks and alphas that they were given."""

    part: str
    layers: int
    parameters: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


class Computing(NamedTuple):
    """What is held at most while something is computed.

    Attributes:
        peak: bytes; None: that cannot be told.
        rough: why it is only a sum over the layers, or why it cannot be told, in words.
    """

    peak: int | None
    rough: str = ""

    def times(self, count: int) -> Computing:
        """Of so many samples or images: to within a few per cent everything is proportional to them."""
        return self._replace(peak=None if self.peak is None else count * self.peak)

    def plus(self, more: int) -> Computing:
        """With what comes on top."""
        return self._replace(peak=None if self.peak is None else self.peak + more)


class Passes:
    """What the pieces of a run compute with, each found once.

    Args:
        context: with all options that the model decides.
        prompt: the longest.
        size: width and height of the largest images, in pixels.

    Attributes:
        dtype: that denoiser and text encoders compute in.
    """

    def __init__(self, context: RunContext, prompt: str, size: tuple[int, int]) -> None:
        self._context = context
        self._family = context.family
        self.dtype = DTYPES[context.config.model.mixed_precision or "no"]
        self._prompt = prompt
        self._size = size
        self._decoded: tuple[int, ...] = ()
        self._found: dict[tuple[object, ...], Computing] = {}

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """The weights of every part that has some, without LoRA."""
        return {name: Stored.of(module) for name, module in self._modules.items()}

    @cached_property
    def blocks(self) -> dict[nn.Module, Stored]:
        """The weights of each of the denoiser's repeated blocks."""
        return {block: Stored.of(block, inside=True) for block in blocks_of(self._modules[self._family.DENOISER])}

    def waiting(self, count: int) -> list[Stored]:
        """The weights of each of the blocks that ``--offload_blocks`` means."""
        return [self.blocks[block] for block in waiting_blocks(self._modules[self._family.DENOISER], count)]

    @property
    def text_encoders(self) -> list[str]:
        """Their names."""
        return [name for name in self.stored if name in self._parts["text"]]

    def parameters(self) -> int:
        """Numbers that train."""
        return sum(one.parameters for one in self.trained())

    def trained(self) -> list[Trained]:
        """What gets a LoRA.

        Raises:
            UserError: there are no such layers.
        """
        found = []
        for name, module in self._trainable.items():
            layers = list(tuned_layers(module))
            ranks = tuple(sorted({layer.rank for layer in layers}))
            alphas = tuple(sorted({round(layer.given, 6) for layer in layers}))
            numbers = sum(parameter.numel() for parameter in trainable_parameters(module).values())
            found.append(Trained(name, len(layers), numbers, ranks, alphas))
        return found

    @property
    def prompt_bytes(self) -> int | None:
        """Of the embeddings of the longest prompt, as the cache keeps them; None: that cannot be told."""
        try:
            return bytes_of(self._conditioning.values())
        except Exception:  # see _work
            return None

    def prompts(self) -> Computing:
        """Of encoding one prompt."""
        return self._once(("prompts",), lambda: self._conditioning)

    def encoding(self, tiled: bool = False) -> Computing:
        """Of encoding one image, or a tile of it."""
        width, height = (min(side, TILE) if tiled else side for side in self._size)
        if (width, height) == self._size:
            return self._once(("encoding",), lambda: self._latents)
        pixels = torch.empty(1, 3, height, width, device=META)
        return self._once(("encoding a tile",), lambda: self._family.encode_images(self._parts["vae"], pixels))

    @property
    def can_tile(self) -> bool:
        """Whether the autoencoder takes images in tiles."""
        return can_tile(self._autoencoder)

    def decoding(self, tiled: bool = False) -> Computing:
        """Of decoding one image, or a tile of it beside what the other tiles have become."""
        assert self._latents is not None  # finds the latents' shape
        *before, height, width = self._decoded
        if tiled:
            width, height = (
                -(-of * min(side, TILE) // side) for of, side in zip((width, height), self._size, strict=True)
            )
        latents = torch.empty(1, *before, height, width, device=META)
        work = self._once(("decoding", width, height), lambda: self._autoencoder.decode(latents))
        return work.plus(3 * 3 * 4 * self._size[0] * self._size[1] if tiled else 0)  # three images in float32

    def call(self) -> Computing:
        """Of the denoiser's call for an image that is drawn, with guidance."""
        return self._once(("call",), self._call, self._of_layers, autocast=True)

    def step(self, checkpointing: bool) -> Computing:
        """Of one sample, forwards and backwards."""

        def compute() -> None:
            self._set_checkpointing(checkpointing)
            self._step()

        otherwise = functools.partial(self._of_layers_kept, checkpointing)
        return self._once(("step", checkpointing), compute, otherwise, autocast=True, grad=True)

    def _once(
        self,
        key: tuple[object, ...],
        compute: Callable[[], Any],
        otherwise: Callable[[], int] | None = None,
        *,
        autocast: bool = False,
        grad: bool = False,
    ) -> Computing:
        if key not in self._found:
            self._found[key] = self._work(compute, otherwise, self.dtype if autocast else None, grad)
        return self._found[key]

    def _work(
        self, compute: Callable[[], Any], otherwise: Callable[[], int] | None, autocast: torch.dtype | None, grad: bool
    ) -> Computing:
        for module in self._trainable.values():
            module.train(grad)
        try:
            with torch.set_grad_enabled(grad), Footprint(self._modules.values(), autocast) as footprint:
                compute()
        except Exception as error:  # of the model's code, where it asks a tensor for a number that it does not have
            if otherwise is None:
                return Computing(None, in_one_line(error))
            return Computing(otherwise(), _SUM)
        finally:
            for parameter in (one for module in self._trainable.values() for one in module.parameters()):
                parameter.grad = None
        return Computing(footprint.peak)

    @cached_property
    def _parts(self) -> dict[Role, Components]:
        """The parts as the family loads them, without numbers."""
        context, own = self._context, self.dtype
        with without_weights({part.place: part.weights for part in context.inventory}):
            return {
                role: self._family.load(context.source, role, torch.float32 if role == "vae" else own) for role in ROLES
            }

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        parts = (item for components in self._parts.values() for item in components.items())
        return {name: part for name, part in parts if isinstance(part, nn.Module)}

    @cached_property
    def _trainable(self) -> dict[str, nn.Module]:
        """The parts that train, with their LoRA."""
        assert self.stored and isinstance(self.blocks, dict)  # found before the LoRA comes to them
        config, family = self._context.config, self._family
        wanted = [family.DENOISER]
        if config.lora.train_text_encoder:
            wanted += [name for name in family.TEXT_ENCODERS if name in self._modules]
        for name in wanted:
            module: Any = self._modules[name]
            with META:
                add_adapter(self._context, name, module)
            for parameter in trainable_parameters(module).values():
                parameter.data = parameter.data.to(self.dtype)  # as layers take them, and keep them until backwards
        for name in family.EMBEDDING_KEYS if config.tokens.new_tokens else ():
            encoder: Any = self._modules[name]
            encoder.enable_input_require_grads()  # embeddings of new tokens
        return {name: self._modules[name] for name in wanted}

    def _set_checkpointing(self, on: bool) -> None:
        for name, module in self._trainable.items():
            any_module: Any = module
            if name == self._family.DENOISER:
                (any_module.enable_gradient_checkpointing if on else any_module.disable_gradient_checkpointing)()
            else:
                (any_module.gradient_checkpointing_enable if on else any_module.gradient_checkpointing_disable)()

    def _of_layers(self) -> int:
        """What a call of the denoiser holds, roughly, where its code cannot be run without numbers: the widest layer's
        input and output, twice.
        """
        guided = 1 + (self._context.guidance(self._context.config.sample.negative_prompt).encoded_negative is not None)
        widest = max(layer.in_features + layer.out_features for layer in self._linear)
        return 2 * guided * self._token_bytes * widest

    def _of_layers_kept(self, checkpointing: bool) -> int:
        """The same of a sample in training, where every linear layer keeps its input, of every token (those that share
        one make up for what lies between layers); with gradient checkpointing that is so for one block at a time,
        besides the input of each.
        """
        denoiser = self._modules[self._family.DENOISER]
        blocks = [block for child in denoiser.children() if isinstance(child, nn.ModuleList) for block in child]
        widths = [
            sum(layer.in_features for layer in block.modules() if isinstance(layer, nn.Linear)) for block in blocks
        ]
        if checkpointing:
            kept = max(widths, default=0) + len(blocks) * min((layer.in_features for layer in self._linear), default=0)
        else:
            kept = sum(layer.in_features for layer in self._linear)
        return self._token_bytes * kept

    @property
    def _linear(self) -> list[nn.Linear]:
        denoiser = self._modules[self._family.DENOISER]
        return [module for module in denoiser.modules() if isinstance(module, nn.Linear)]

    @property
    def _token_bytes(self) -> int:
        """Of one number for every token of a sample."""
        denoiser = self._modules[self._family.DENOISER]
        patch = denoiser.config.get("patch_size") or 2  # type: ignore[union-attr, operator]
        side = patch if isinstance(patch, int) else patch[-1]
        tokens = self._latents.shape[-2] * self._latents.shape[-1] // side**2
        return ((1 + self._edits) * tokens + self._prompt_tokens) * self.dtype.itemsize

    @property
    def _prompt_tokens(self) -> int:
        """Of the longest prompt; where it cannot be gone through, as many as it is cut to."""
        try:
            return max((value.shape[1] for value in self._conditioning.values() if value.dim() > 2), default=0)
        except Exception:  # see _work
            return prompt_length(self._context) or 0

    @cached_property
    def _conditioning(self) -> Conditioning:
        """Of one prompt: what training is given of it.

        Raises:
            UserError: the text encoder sees an image with it, whose patches it counts by their numbers.
        """
        if self._family.text_pictures(self._context.source):
            raise UserError("the text encoder sees the image before the edit too, which is not gone through")
        with torch.no_grad():
            tokens = self._family.tokenize(self._parts["text"], [self._prompt], prompt_length(self._context))
            if self._context.config.encodes_in_training:
                return self._family.encode_frozen(self._parts["text"], tokens)
            return self._family.encode_tokens(self._parts["text"], tokens)

    @property
    def _autoencoder(self) -> Any:
        [name] = self._family.PARTS["vae"]
        return self._modules[name]

    @cached_property
    def _latents(self) -> Tensor:
        module = self._autoencoder
        encode = module.encode

        def noted(*args: Any, **kwargs: Any) -> Any:
            encoded = encode(*args, **kwargs)
            posterior = getattr(encoded, "latent_dist", None)
            plain: Any = getattr(encoded, "latents", None) if posterior is None else posterior.mean
            self._decoded = tuple((encoded.latent if plain is None else plain).shape[1:])
            return encoded

        module.encode = noted
        try:
            with torch.no_grad():
                return self._family.encode_images(self._parts["vae"], self._pixels).mean
        finally:
            module.encode = encode

    @property
    def _pixels(self) -> Tensor:
        width, height = self._size
        return torch.empty(1, 3, height, width, device=META)

    @property
    def _edits(self) -> bool:
        """Whether the denoiser sees images before their edit."""
        return any(one.conditioning_data_dir for one in self._context.config.data.each())

    @cached_property
    def _shown(self) -> Conditioning:
        """Of an image before its edit, if the run edits."""
        if not self._edits:
            return {}
        with torch.no_grad():
            return self._family.encode_conditioning(self._parts["vae"], self._pixels)

    def _step(self) -> None:
        config = self._context.config
        text = self._parts["text"] if config.encodes_in_training else None
        model = Predictor(self._family, self._trainable[self._family.DENOISER], text, config.train.guidance_scale)
        prediction = model(*self._inputs(1))
        torch.autograd.backward((prediction.float() ** 2).sum())

    def _call(self) -> None:
        config, family = self._context.config, self._family
        negative = self._context.guidance(config.sample.negative_prompt).encoded_negative
        noisy, times, conditioning = self._inputs(1 if negative is None else 2)
        if config.encodes_in_training:
            conditioning = family.encode_tokens(self._parts["text"], conditioning)
        family.predict(self._modules[family.DENOISER], noisy, times, conditioning, config.train.guidance_scale)

    def _inputs(self, batch: int) -> tuple[Tensor, Tensor, Conditioning]:
        family, config, axes = self._family, self._context.config, self._family.LENGTH_AXES
        objective = family.objective(self._parts["scheduler"]["scheduler"], config.train)
        latents = self._latents
        times = objective.spread_times(torch.tensor([0.5])).expand(batch)
        views = family.describe_views([View(self._size, (0, 0), self._size)] * batch)
        each: Mapping[str, Tensor] = stack_conditioning([{**self._conditioning, **self._shown}] * batch, axes)
        return torch.empty(batch, *latents.shape[1:], device=META), times, {**each, **views}
