"""Train-to-deploy check: does the saved file do, in a stock pipeline, what the LoRA did in training?

The file is loaded as a user loads it. The pipeline is a fresh one, all of it in memory; or, so that the end of a run
needs no more memory than its training, the base that has trained, after its adapters were taken out: that it is still
the model that everybody has is told by the sum of its bits. Its prompts are encoded by text encoders that are loaded
for that, and gone before the denoiser works.

Two things are compared. One call of the denoiser, with and without the LoRA, tells whether the LoRA is there, whole and
with the right scale, however little of it an image shows. An image tells whether all the rest is the same; in half
precision it differs by rounding that adds up over the denoising steps.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dreamlora.interfaces import Conditioning, Family
from dreamlora.lora.applying import apply_lora
from dreamlora.lora.assistant import switch
from dreamlora.lora.embeddings import files_beside
from dreamlora.lora.names import names_of
from dreamlora.lora.pairs import tuned_layers
from dreamlora.models.new_tokens import Vectors, by_token, load_embeddings, put_for_a_while
from dreamlora.models.parts import DTYPES, Parts
from dreamlora.pictures import own_picture
from dreamlora.precision import QuantizedLinear
from dreamlora.randomness import generator
from dreamlora.runfolder import LORA_FILE
from dreamlora.sampling.limits import CallLimits
from dreamlora.sampling.sampler import Asked, Guidance, SamplePlan, draw, embedding, prompting
from dreamlora.sampling.shown import Shown
from dreamlora.training.loop import Run
from dreamlora.training.prompt_encoder import PromptEncoder

MIDDLE = 0.5
"""Where in the schedule the call is made."""
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TF32 = 2**-10
"""Distance of neighbouring numbers in TF32, relative to them."""


@dataclass(frozen=True)
class Call:
    """One call of the denoiser, and what the training's model answered; all on the CPU.

    Attributes:
        noisy: ``[1, C, h, w]``, a training image's latents with noise.
        view: what belongs to that image besides.
        times: ``[1]``.
        guidance_scale: embedded guidance, for models that have it.
        prompt_length: tokens that the prompt is cut to; None: the family's own.
        with_lora: prediction ``[1, C, h, w]`` float32.
        without_lora: the base model's, in the same modules and precision; with new tokens as they were at first.
        rounded: ``with_lora`` once more, with every number of ``noisy`` moved by one unit of the precision, so that all
            that follows is rounded otherwise.
        start: of the new tokens.
    """

    noisy: Tensor
    view: Conditioning
    times: Tensor
    guidance_scale: float
    prompt_length: int | None
    with_lora: Tensor
    without_lora: Tensor
    rounded: Tensor
    start: Vectors = field(default_factory=dict)


@dataclass(frozen=True)
class ExpectedOutput:
    """What the saved file must do again: what training showed of its last step.

    Attributes:
        lora_folder: holds ``pytorch_lora_weights.safetensors``, and embeddings of new tokens.
        sample: a row of samples.jsonl, with the negative prompt.
        image_file: the image drawn while training.
        call: of the sample's prompt.
        shown: the image that the prompt edits; empty for models that do not edit.
        stock_loader: whether diffusers' ``load_lora_weights`` knows this kind of adapters; else ``apply_lora`` loads.
    """

    lora_folder: Path
    sample: dict[str, Any]
    image_file: Path
    call: Call
    shown: Shown
    stock_loader: bool = True


@torch.no_grad()
def ask(run: Run, prompt: str, prompt_length: int | None) -> Call:
    """Make the call in the model that has trained, in the precision that it trained in; its adapters are off then.

    Not to be followed by more training.
    """
    place = run.accelerator.device
    store = run.stream.sources[0].store
    latents, view = store.latents(0, 0)[0][None], store.view(0, 0)
    draws = generator(run.config.train.seed, "parity")
    noise = torch.randn(latents.shape, generator=draws)
    times = run.objective.spread_times(torch.tensor([MIDDLE]))
    noisy = run.objective.corrupt(latents, noise, times)
    conditioning = {name: value.to(place) for name, value in {**run.conditioning([prompt], view), **view}.items()}
    model = run.accelerator.unwrap_model(run.model).eval()
    switch(model.denoiser, on=False)  # the result is used without it

    def answer(latents: Tensor) -> Tensor:
        with run.accelerator.autocast():
            prediction: Tensor = model(latents.to(place), times.to(place), conditioning)
        return prediction.float().cpu()

    signs = torch.randn(noisy.shape, generator=draws).sign()
    with_lora, rounded = answer(noisy), answer(noisy * (1 + signs * _precision(run)))
    for tuned in tuned_layers(model):
        tuned.layer.enable_adapters(False)
    for part in run.new_tokens.values():
        part.rows.copy_(part.start)
    start = by_token({new.token: new.vectors for new in run.config.tokens.tokens}, run.new_tokens)
    scale = run.config.train.guidance_scale
    return Call(noisy, view, times, scale, prompt_length, with_lora, answer(noisy), rounded, start)


def _precision(run: Run) -> float:
    """Relative distance of two neighbouring numbers in what the run computes with."""
    own = torch.finfo(DTYPES[run.accelerator.mixed_precision]).eps
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return max(own, TF32) if tf32 and run.accelerator.device.type == "cuda" else own


def check(parts: Parts, expected: ExpectedOutput, *, full: bool) -> dict[str, Any]:
    """Load the LoRA as a user would, do again what training did, and compare.

    Args:
        parts: the base model; of ``full`` not loaded yet, else with the denoiser that has trained, without adapters.
        expected: what training showed.
        full: whether the pipeline is whole, and reads the prompt itself; else it draws from ready embeddings.

    Embeddings of new tokens are loaded by ``load_textual_inversion``.

    Returns:
        ``kind`` ("full" or "lean"), prompt, seed and step; the figures of ``compare_images``; as ``call`` those of
        ``compare_calls``; and ``loader``, if it is not diffusers'.
    """
    encode = PromptEncoder(parts, expected.call.prompt_length)
    guidance = _guidance(parts, expected)
    reads = full and _reads_itself(parts, expected, guidance)
    prompts, views = [expected.sample["prompt"]], expected.call.view
    with put_for_a_while(parts.text, expected.call.start):
        encode.prepare([(prompts, views)])
        conditioning = encode(prompts, views)
    encode.forget()
    _load(parts.resting_pipeline(), parts.family, expected)
    encode.prepare([(prompts, views), *(() if reads else guidance.encoded(prompts))])
    if not full:
        parts.free("text")
    pipeline = parts.pipeline() if full else parts.drawer()
    with_lora = _answer(parts, expected, encode(prompts, views))
    drawn, seen = _draw(pipeline, expected, prompting(guidance) if reads else embedding(guidance, encode))
    pipeline.unload_lora_weights()
    call = compare_calls(expected.call, with_lora, _answer(parts, expected, conditioning))
    of_sample = {key: expected.sample[key] for key in ("prompt", "seed", "step")}
    loader = {} if expected.stock_loader else {"loader": "dreamlora"}
    kind = {"kind": "full" if full else "lean"}
    return {**kind, **of_sample, **compare_images(seen, drawn), "call": call, **loader}


def _load(pipeline: Any, family: Family, expected: ExpectedOutput) -> None:
    """Load what was saved into a pipeline."""
    load_embeddings(pipeline, files_beside(expected.lora_folder / LORA_FILE), family.EMBEDDING_KEYS)
    if expected.stock_loader:
        pipeline.load_lora_weights(str(expected.lora_folder))
    else:
        names = names_of(family, dict(getattr(pipeline, family.DENOISER).config))
        apply_lora(pipeline, expected.lora_folder, model=names)


def _draw(pipeline: Any, expected: ExpectedOutput, asked: Asked) -> tuple[Image.Image, Image.Image]:
    """The image drawn again, and the one seen in training."""
    sample, seen = expected.sample, own_picture(expected.image_file)
    plan = SamplePlan(
        prompts=(sample["prompt"],),
        num_inference_steps=sample["num_inference_steps"],
        guidance_scale=sample["guidance_scale"],
        negative_prompt=sample.get("negative_prompt"),
        seed=sample["seed"],
        width=seen.width,
        height=seen.height,
        limits=CallLimits(tiles=sample.get("vae_tiling")),
    )
    [drawn] = draw(pipeline, plan, asked)
    return drawn.image, seen


def _guidance(parts: Parts, expected: ExpectedOutput) -> Guidance:
    sample = expected.sample
    return Guidance(parts.family, parts.source, sample["guidance_scale"], sample.get("negative_prompt"), expected.shown)


def _reads_itself(parts: Parts, expected: ExpectedOutput, guidance: Guidance) -> bool:
    """Whether the pipeline makes of the prompt what training did, as it reads it for a user: it knows no other number
    of tokens, no other layers of the text encoder and no other device of it, and some know no negative prompt.
    """
    known = inspect.signature(parts.resting_pipeline().__call__).parameters
    usual = expected.call.prompt_length in (None, parts.family.PROMPT_DEFAULT) and not parts.source.text_layers
    together = parts.text_device == parts.device
    return usual and together and (guidance.negative is None or "negative_prompt" in known)


@torch.no_grad()
def _answer(parts: Parts, expected: ExpectedOutput, conditioning: Conditioning) -> Tensor:
    """The same call in these modules, without autocast."""
    family, call = parts.family, expected.call
    denoiser = parts.get("denoiser")[family.DENOISER]
    conditioning = conditioning | {name: value.to(parts.device) for name, value in call.view.items()}
    noisy, times = (tensor.to(parts.device) for tensor in (call.noisy, call.times))
    return family.predict(denoiser, noisy, times, conditioning, call.guidance_scale).float().cpu()


@torch.no_grad()
def bits_of(module: nn.Module) -> int:
    """Sum of a model's weights without adapters, their bits read as whole numbers: another one after any change of them
    that does not cancel out.
    """
    total = 0
    for part in module.modules():
        stored = part.buffers(recurse=False) if isinstance(part, QuantizedLinear) else ()
        for tensor in (*part.parameters(recurse=False), *stored):
            total += int(tensor.detach().view(_WHOLE[tensor.element_size()]).sum(dtype=torch.int64))
    return total


def compare_calls(call: Call, with_lora: Tensor, without_lora: Tensor) -> dict[str, float]:
    """How far apart the answers y (with LoRA) and b (without) of training and of a fresh pipeline are.

    With ``Δ = y_training − b_training``, what the LoRA did in training:

    Returns:
        ``effect``: ``‖Δ‖ / ‖b_training‖``, and if that is not 0

        - ``error``: ``‖y_fresh − y_training‖ / ‖Δ‖``: 0 if the file does the same, 1 if it does nothing;
        - ``rounding``: what rounding alone makes: the larger of ``‖y_rounded − y_training‖ / ‖Δ‖`` and, as the base
          model has no LoRA to be wrong, ``‖b_fresh − b_training‖ / ‖Δ‖``;
        - ``scale``: ``⟨y_fresh − b_fresh, Δ⟩ / ‖Δ‖²``: 1, or what the file's LoRA is multiplied by.
    """
    y, b, rounded = (tensor.double() for tensor in (call.with_lora, call.without_lora, call.rounded))
    y_fresh, b_fresh = with_lora.double(), without_lora.double()
    change = y - b
    size = float(change.norm())
    effect = size / float(b.norm())
    if size == 0:
        return {"effect": effect}
    return {
        "effect": effect,
        "error": float((y_fresh - y).norm()) / size,
        "rounding": max(float((rounded - y).norm()), float((b_fresh - b).norm())) / size,
        "scale": float(((y_fresh - b_fresh) * change).sum()) / size**2,
    }


def compare_images(training_image: Image.Image, fresh_image: Image.Image) -> dict[str, float]:
    """How far two images of the same size are apart, on the 0-255 scale of their pixels.

    Returns:
        ``max_abs`` and ``mean_abs`` difference, and ``psnr_db`` (infinite for equal images, given as 999).
    """
    first, second = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (training_image, fresh_image))
    difference = np.abs(first - second)
    mean_square = float((difference**2).mean())
    psnr = 10 * np.log10(255**2 / mean_square) if mean_square else 999.0
    return {"max_abs": float(difference.max()), "mean_abs": float(difference.mean()), "psnr_db": float(psnr)}
