"""What the contract's tests must know of a family's small model, to compare it with the stock pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor


class Seen(NamedTuple):
    """A call of the denoiser by the stock pipeline, in the contract's terms.

    Attributes:
        noisy: ``[B, C, h, w]``.
        times: ``[B]``, as the objective has them.
        prediction: ``[B, C, h, w]``, of the objective's target.
    """

    noisy: Tensor
    times: Tensor
    prediction: Tensor


def plain_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    """Of a UNet: latents as they are."""
    noisy, times = arguments["sample"], arguments["timestep"]
    return Seen(noisy, times.expand(len(noisy)), output[0])


def diffusion(latents: Tensor, noise: Tensor, times: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and ε as the target, written anew for the tests."""
    alpha = alphas_cumprod[times].view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, noise


def flow(latents: Tensor, noise: Tensor, times: Tensor, alphas_cumprod: Tensor | None) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity ε - x."""
    sigma = times.view(-1, 1, 1, 1)
    return latents + sigma * (noise - latents), noise - latents


def kl_moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[B, C, h, w]`` of an AutoencoderKL's posterior, shifted and scaled."""
    posterior = vae.encode(pixels).latent_dist
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    return (posterior.mean - shift) * scale, posterior.std * scale


def kl_decoded(pipeline: Any, vae: Any, latents: Tensor) -> Tensor:
    """Pixels of latents, as pipelines with an AutoencoderKL decode them."""
    return vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample


def kl_round_trip(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels after encoding and decoding by the autoencoder alone."""
    return vae.decode(vae.encode(pixels).latent_dist.mode()).sample


@dataclass(frozen=True)
class Tiny:
    """A family's small model.

    Attributes:
        save: writes the pipeline's folder.
        embeddings: what the stock pipeline's ``encode_prompt`` makes of prompts, by the names of the family's
            conditioning (padded as a batch is, with a mask, where lengths are the prompts' own).
        read_call: takes the denoiser's arguments by name, its output, and the latents' sides (h, w).
        recipe: takes latents, noise, times and ᾱ (of diffusion models); gives noisy latents and target.
        moments: takes the autoencoder and pixels; gives what ``encode_images`` should.
        default_side: of the images that the stock pipeline draws unless told otherwise.
        decoded: takes the stock pipeline, an autoencoder and latents; gives pixels, as the pipeline decodes them.
        round_trip: takes the autoencoder and pixels; gives what encoding and decoding alone make of them.
        prepare: makes the stock pipeline draw images of this height and width, if it scales what it is asked for.
        call: more arguments of the stock pipeline's call, such as those that keep prompts short.
        length: of prompts in tokens, as the family's option has it, where ``call`` says one.
        guidance: a guidance at which negative prompts count, if they ever do.
        side: of images, in pixels.
        latents: channels and sides of their latents.
        prompt_limit: tokens that count of a prompt, with ``length``.
        filler: a letter or word that is one token.
        edited: the image that the stock pipeline edits, if it does not draw without one.
        stock: loads the stock pipeline from a folder.
        mended: takes a stock pipeline and gives it back without a known mistake in what it makes of prompts.
        idle: parts of names of adapted layers that the prediction does not depend on: the last that becomes of the
            prompt in transformers of two streams.
    """

    save: Callable[[Path], Path]
    embeddings: Callable[[Any, list[str]], dict[str, Tensor]]
    read_call: Callable[[Mapping[str, Any], Any, tuple[int, int]], Seen]
    recipe: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
    default_side: Callable[[Any], int]
    prompt_limit: int
    moments: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = kl_moments
    decoded: Callable[[Any, Any, Tensor], Tensor] = kl_decoded
    round_trip: Callable[[Any, Tensor], Tensor] = kl_round_trip
    prepare: Callable[[Any, int, int], None] = lambda pipeline, height, width: None
    call: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None
    guidance: float = 4.0
    side: int = 16
    latents: tuple[int, int, int] = (4, 8, 8)
    filler: str = "a"
    edited: Image.Image | None = None
    stock: Callable[..., Any] = DiffusionPipeline.from_pretrained
    mended: Callable[[Any], Any] = lambda pipeline: pipeline
    idle: tuple[str, ...] = ()
