"""Train-to-deploy check: does the saved file give, in a fresh stock pipeline, the image that training showed?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlora.sampling.sampler import SamplePlan, draw


def compare(training_image: Image.Image, fresh_image: Image.Image) -> dict[str, float]:
    """How far two images of the same size are apart, on the 0-255 scale of their pixels.

    Returns:
        ``max_abs`` and ``mean_abs`` difference, and ``psnr_db`` (infinite for equal images, given as 999).
    """
    first, second = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (training_image, fresh_image))
    difference = np.abs(first - second)
    mean_square = float((difference**2).mean())
    psnr = 10 * np.log10(255**2 / mean_square) if mean_square else 999.0
    return {"max_abs": float(difference.max()), "mean_abs": float(difference.mean()), "psnr_db": float(psnr)}


def check(pipeline: Any, lora_folder: Path, sample: dict[str, Any], image_file: Path) -> dict[str, Any]:
    """Load the LoRA as a user would, draw the sample again from its prompt's text, and compare.

    Args:
        pipeline: the untouched base pipeline, freshly loaded.
        lora_folder: holds ``pytorch_lora_weights.safetensors``.
        sample: its row of samples.jsonl.
        image_file: the image drawn while training.
    """
    with Image.open(image_file) as opened:
        seen = opened.convert("RGB")
    pipeline.load_lora_weights(str(lora_folder))
    plan = SamplePlan(
        prompts=(sample["prompt"],),
        num_inference_steps=sample["num_inference_steps"],
        guidance_scale=sample["guidance_scale"],
        negative_prompt=sample.get("negative_prompt"),
        seed=sample["seed"],
        width=seen.width,
        height=seen.height,
    )
    [drawn] = draw(pipeline, plan)
    return {**{key: sample[key] for key in ("prompt", "seed", "step")}, **compare(seen, drawn.image)}
