"""What can be set of samples, evaluation and metrics: groups of options of ``config.RunConfig``. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dreamlora.config.ranges import at_least, short, spelled, within
from dreamlora.errors import UserError

IMAGES_FOR_METRICS = ("eval_metrics_steps", "eval_prompts", "eval_num_images")
"""Options of ``Eval`` that ask for images besides the samples."""


@dataclass(frozen=True)
class Sample:
    """The images of every step."""

    sample_steps: int | None = None
    """Draw the sample prompts every N steps, at step 0 and at the end; 0 for never. Default: a fifth of the run."""
    sample_prompts: Path | None = None
    """Text file with one prompt per line. Default: the training and the class prompt, else captions of the images."""
    validation_prompt: str | None = None
    """One prompt more to draw."""
    num_images_per_prompt: int = 1
    """Images per prompt, each from a seed of its own."""
    num_inference_steps: int | None = None
    """Denoising steps of a sample. Default: the family's."""
    sample_guidance_scale: float | None = None
    """Classifier-free guidance of the samples. Default: the family's."""
    sample_seed: int = 42
    """Seed of the first image; the others count up from it."""
    negative_prompt: str | None = None
    """Negative prompt of the samples, for families that know one."""
    num_validation_images: int | None = None
    """diffusers' name for --num_images_per_prompt."""
    validation_images: tuple[Path, ...] = ()
    """For models that edit: the images that the samples are made of, one for all prompts or one for each. Default:
    those that belong to the images whose captions are drawn."""
    validation_epochs: int | None = None
    """diffusers' way to say --sample_steps, in epochs."""

    def __post_init__(self) -> None:
        at_least(self, 0, "sample_steps", "sample_guidance_scale", "sample_seed")
        at_least(self, 1, "num_images_per_prompt", "num_inference_steps", "num_validation_images", "validation_epochs")
        within(self, 1, 1001, "num_images_per_prompt", "num_inference_steps")  # a slip that would draw for weeks
        within(self, 0, 2**63, "sample_seed")
        short(self, "validation_prompt", "negative_prompt")


@dataclass(frozen=True)
class Eval:
    """The deterministic loss on held-out images, what is decided by it, and metrics of drawn images."""

    eval_steps: int | None = None
    """Measure every N steps, at step 0 and at the end; 0 for never. Default: a twentieth of the run, at least 25; less
    often where the evaluation would cost more than a tenth of the training."""
    eval_seed: int = 1234
    """Seed of the frozen times and noises; runs that are compared must share it."""
    eval_batch_size: int = 8
    """Items per forward pass."""
    final_eval_items: int | None = None
    """Items of the larger set that the base model, the best checkpoint and the last step are measured on; 0: none.
    Default: 256; 128 or 96 where that would cost more than a twentieth of the training."""
    save_best: bool = True
    """Keep the best checkpoint, by the evaluation loss, in best/, with the reason why it is the best."""
    early_stopping: int | None = None
    """End the run after N evaluations in a row without a clear improvement; 0 for never. Default: never."""
    eval_metrics: tuple[str, ...] = ()
    """Metrics of the sample images: {metrics}. No name: none."""
    eval_metrics_steps: int | None = None
    """Compute these metrics every N steps, at step 0 and at the end. Default: --sample_steps."""
    eval_prompts: Path | None = None
    """Text file with prompts of images for the metrics alone, instead of the samples."""
    eval_num_images: int | None = None
    """Images per prompt for the metrics alone, instead of the samples."""

    def __post_init__(self) -> None:
        at_least(self, 0, "eval_steps", "eval_seed", "final_eval_items", "early_stopping")
        at_least(self, 1, "eval_batch_size", "eval_metrics_steps", "eval_num_images")
        metrics = tuple(dict.fromkeys(spelled("eval_metrics", name, "metrics") for name in self.eval_metrics))
        object.__setattr__(self, "eval_metrics", metrics)
        if self.early_stopping and self.eval_steps == 0:
            raise UserError("--early_stopping needs evaluations: leave --eval_steps 0 out")


@dataclass(frozen=True)
class Encoders:
    """The models in whose eyes images are compared. Values by different ones must not be compared."""

    clip_model: str | None = None
    """CLIP or SigLIP model: folder, hub name or "tiny". Default: openai/clip-vit-base-patch32; of embedded
    models: tiny."""
    dino_model: str | None = None
    """DINO or DINOv2 model, or any CLIP: folder, hub name or "tiny". Default: facebook/dino-vits16; of embedded
    models: tiny."""
    inception_weights: Path | None = None
    """File weights-inception-2015-12-05-6726825d.pth of torch-fidelity: fid and kid then use Inception, not DINO."""
