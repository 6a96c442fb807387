"""A run gone through with a model without numbers: what would be trained, and how much memory every stage takes.

Every stage runs the family's own code on torch's meta device (``models.footprint``); at no time is a weight loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.interfaces import Components, Conditioning, Role, View
from dreamlora.lora.files import read_lora
from dreamlora.lora.inject import trainable_parameters
from dreamlora.lora.pairs import tuned_layers
from dreamlora.models.building import without_weights
from dreamlora.models.configs import in_one_line
from dreamlora.models.footprint import META, Footprint, bytes_of
from dreamlora.models.parts import DTYPES, ROLES
from dreamlora.run.context import RunContext
from dreamlora.run.encoding import prompt_length
from dreamlora.run.trainable import add_adapter
from dreamlora.training.loop import Predictor
from dreamlora.training.stream import stack_conditioning

LORA_BYTES = 16
"""Per number of the LoRA: itself, its gradient and two moments of the optimizer, in float32. As many are in a
checkpoint, which has its LoRA twice and no gradient."""
AVERAGE_BYTES = 8
"""Of a moving average besides: itself, and the trained weights while it is shown. A checkpoint has one of them."""
HOW = (
    "weights as they are held, and the most that the model's own code holds at a time in a passage without numbers; "
    f"{LORA_BYTES} bytes per parameter of the LoRA, {AVERAGE_BYTES} more with --ema_decay; not the driver's and "
    "the kernels' own"
)
"""How memory is estimated, in words."""


class Trained(NamedTuple):
    """The adapter of one part: its layers and numbers, and the ranks and alphas that they were given."""

    part: str
    layers: int
    parameters: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


@dataclass(frozen=True)
class Stage:
    """A stage of a run, in bytes.

    Attributes:
        held: by weights that stay, and by LoRA and optimizer.
        work: by what is computed, at most; None: that cannot be told.
        rough: why it is only a sum over the layers, or why it cannot be told, in words.
    """

    name: str
    held: int
    work: int | None
    rough: str = ""


class Rehearsal:
    """What a run holds and computes.

    Args:
        context: with all options that the model decides.
        prompt: the longest.
        size: width and height of the largest images, in pixels.
        images: of a call that draws samples; 0: none are drawn.
    """

    def __init__(self, context: RunContext, prompt: str, size: tuple[int, int], images: int) -> None:
        self._context = context
        self._family = context.family
        self._prompt = prompt
        self._size = size
        self._images = images
        self._decoded: tuple[int, ...] = ()

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

    def stages(self) -> list[Stage]:
        """The stages of a run, in their order."""
        text, vae, denoiser = (self._held(role) for role in ("text", "vae", "denoiser"))
        config = self._context.config
        encoding = Stage("encoding prompts", text, *self._work(lambda: self._conditioning))
        kept = self._held("text", self._family.TEXT_ENCODERS) if config.encodes_in_training else 0
        images = Stage("encoding images", vae, *self._work(lambda: self._latents))
        per_number = LORA_BYTES + (AVERAGE_BYTES if config.optim.ema_decay else 0)
        lora = per_number * sum(each.parameters for each in self.trained()) + self._adapter_bytes
        shown = vae if self._images else 0
        training = Stage(
            "training",
            denoiser + kept + lora + shown,
            *self._work(self._step, lambda: self._of_layers(True), grad=True),
        )
        stages = [images, encoding, training]
        if self._images:
            drawing = self._work(lambda: self._drawing(self._images), lambda: self._of_layers(False))
            stages.append(Stage("drawing samples", denoiser + kept + lora + vae, *drawing))
            if config.train.parity_check:
                check = self._work(lambda: self._drawing(1), lambda: self._of_layers(False))
                stages.append(Stage("check at the end", denoiser + text + vae, *check))
        return stages

    @property
    def prompt_bytes(self) -> int | None:
        """Of the embeddings of the longest prompt, as the cache keeps them; None: that cannot be told."""
        try:
            return bytes_of(self._conditioning.values())
        except Exception:  # see _work
            return None

    @property
    def _adapter_bytes(self) -> int:
        """Of the frozen training adapter, in float32."""
        file = self._context.training_adapter
        return 4 * sum(map(math.prod, read_lora(file).shapes.values())) if file else 0

    @cached_property
    def _parts(self) -> dict[Role, Components]:
        """The parts as the family loads them, without numbers."""
        context, own = self._context, DTYPES[self._context.accelerator.mixed_precision]
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
        config, family = self._context.config, self._family
        wanted = [family.DENOISER]
        if config.lora.train_text_encoder:
            wanted += [name for name in family.TEXT_ENCODERS if name in self._modules]
        for name in wanted:
            module: Any = self._modules[name]
            dtype = next(module.parameters()).dtype
            with META:
                add_adapter(self._context, name, module)
            for parameter in trainable_parameters(module).values():
                parameter.data = parameter.data.to(dtype)  # where autocast would, which meta tensors do not have
            if config.model.gradient_checkpointing:
                of_text = name != family.DENOISER
                (module.gradient_checkpointing_enable if of_text else module.enable_gradient_checkpointing)()
        for name in family.EMBEDDING_KEYS if config.tokens.new_tokens else ():
            encoder: Any = self._modules[name]
            encoder.enable_input_require_grads()  # embeddings of new tokens
        return {name: self._modules[name] for name in wanted}

    def _held(self, role: Role, only: Collection[str] | None = None) -> int:
        modules = {name: part for name, part in self._parts[role].items() if isinstance(part, nn.Module)}
        return sum(
            bytes_of((*module.parameters(), *module.buffers()))
            for name, module in modules.items()
            if only is None or name in only
        )

    def _work(
        self, compute: Callable[[], Any], otherwise: Callable[[], int] | None = None, *, grad: bool = False
    ) -> tuple[int | None, str]:
        trainable = self._trainable
        for module in trainable.values():
            module.train(grad)
        try:
            with torch.set_grad_enabled(grad), Footprint(self._modules.values()) as footprint:
                compute()
        except Exception as error:  # of the model's code, where it asks a tensor for a number that it does not have
            if otherwise is None:
                return None, in_one_line(error)
            return otherwise(), "a sum over the layers: the model's own code goes by the numbers in its tensors"
        return footprint.peak, ""

    def _of_layers(self, grad: bool) -> int:
        """What a pass through the denoiser holds, roughly, where its code cannot be run without numbers.

        In training every linear layer keeps its input, of every token (those that share one make up for what lies
        between layers); with gradient checkpointing that is so for one block at a time, besides the input of each.
        Without gradients the widest layer's input and output are held twice.
        """
        config, denoiser = self._context.config, self._modules[self._family.DENOISER]
        patch = denoiser.config.get("patch_size") or 2  # type: ignore[union-attr, operator]
        side = patch if isinstance(patch, int) else patch[-1]
        length = max((value.shape[1] for value in self._conditioning.values() if value.dim() > 2), default=0)
        tokens = self._latents.shape[-2] * self._latents.shape[-1] // side**2 + length
        linear = [module for module in denoiser.modules() if isinstance(module, nn.Linear)]
        size = next(denoiser.parameters()).element_size()
        if not grad:
            return 2 * tokens * size * max(layer.in_features + layer.out_features for layer in linear)
        blocks = [block for child in denoiser.children() if isinstance(child, nn.ModuleList) for block in child]
        widths = [
            sum(layer.in_features for layer in block.modules() if isinstance(layer, nn.Linear)) for block in blocks
        ]
        batch = (config.train.train_batch_size or 1) * (1 + config.data.with_prior_preservation)
        if config.model.gradient_checkpointing:
            kept = max(widths, default=0) + len(blocks) * min((layer.in_features for layer in linear), default=0)
        else:
            kept = sum(layer.in_features for layer in linear)
        return batch * tokens * size * kept

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

    @cached_property
    def _shown(self) -> Conditioning:
        """Of an image before its edit, for models that edit."""
        if not self._family.shows_images(self._context.source):
            return {}
        with torch.no_grad():
            return self._family.encode_conditioning(self._parts["vae"], self._pixels)

    def _step(self) -> None:
        """Forwards and backwards through one micro-batch."""
        config = self._context.config
        batch = (config.train.train_batch_size or 1) * (1 + config.data.with_prior_preservation)
        text = self._parts["text"] if config.encodes_in_training else None
        model = Predictor(self._family, self._trainable[self._family.DENOISER], text, config.train.guidance_scale)
        prediction = model(*self._inputs(batch))
        torch.autograd.backward((prediction.float() ** 2).sum())

    def _drawing(self, images: int) -> None:
        """A call of the denoiser for images with guidance, then their decoding."""
        config, family = self._context.config, self._family
        negative = self._context.guidance(config.sample.negative_prompt).encoded_negative
        noisy, times, conditioning = self._inputs(images * (1 if negative is None else 2))
        if config.encodes_in_training:
            conditioning = family.encode_tokens(self._parts["text"], conditioning)
        family.predict(self._modules[family.DENOISER], noisy, times, conditioning, config.train.guidance_scale)
        self._autoencoder.decode(torch.empty(images, *self._decoded, device=META))

    def _inputs(self, batch: int) -> tuple[Tensor, Tensor, Conditioning]:
        family, config, axes = self._family, self._context.config, self._family.LENGTH_AXES
        objective = family.objective(self._parts["scheduler"]["scheduler"], config.train)
        latents = self._latents
        times = objective.spread_times(torch.tensor([0.5])).expand(batch)
        views = family.describe_views([View(self._size, (0, 0), self._size)] * batch)
        each: Mapping[str, Tensor] = stack_conditioning([{**self._conditioning, **self._shown}] * batch, axes)
        return torch.empty(batch, *latents.shape[1:], device=META), times, {**each, **views}
