"""``dreamlora sample``: the flags. Torch is imported only after they are known to be right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dreamlora.config.model import Precision
from dreamlora.config.ranges import finite, short
from dreamlora.errors import UserError


@dataclass(frozen=True)
class SampleConfig:
    """Draw a grid with trained LoRAs: rows are LoRAs, checkpoints and scales, columns are prompts."""

    lora: tuple[Path, ...]
    """LoRA files, folders with one, or run folders; the flag's name may be left out."""
    embeddings: tuple[Path, ...] = ()
    """Embeddings of new tokens to load besides (.safetensors), for all rows. Those that a run has trained with its LoRA
    lie beside it and need no flag."""
    trust_runs: bool = False
    """The runs are your own: open the models, photos and prompt files that their config.yaml names outside their
    folders. Without it these must be named by flags here, for a stranger's run could name any file."""
    lora_scales: tuple[float, ...] = (1.0,)
    """Every LoRA is drawn at each of these strengths."""
    checkpoints: bool = False
    """Draw all checkpoints of the run folders, not only their final LoRA."""
    best: bool = False
    """Draw the best checkpoint of the run folders too (see best/selection.json there)."""
    prompts: tuple[str, ...] = ()
    """Prompts, each in quotes. Default: those of the first run folder."""
    sample_prompts: Path | None = None
    """Text file with one prompt per line, instead of --prompts."""
    subject: str | None = None
    """Takes the place of {} in the prompts, such as "sks dog". Default: read from the run's --instance_prompt."""
    num_images_per_prompt: int | None = None
    """Images per prompt, each from a seed of its own. Default: the run's, or 1."""
    num_inference_steps: int | None = None
    """Denoising steps. Default: the run's, or the family's."""
    sample_guidance_scale: float | None = None
    """Classifier-free guidance. Default: the run's, or the family's."""
    sample_seed: int | None = None
    """Seed of the first image of a row; the others count up from it. Default: the run's, or 42."""
    negative_prompt: str | None = None
    """Negative prompt, for families that know one. Default: the run's."""
    validation_images: tuple[Path, ...] = ()
    """For models that edit: the images to edit, one for all prompts or one for each. Default: the run's own."""
    sample_batch_size: int = 4
    """Images made at a time."""
    resolution: int | None = None
    """Side of the images in pixels. Default: the run's, or the model's own."""
    output_dir: Path | None = None
    """Where grid.png and the images go. Default: outputs/sample-<name of the first LoRA>."""
    pretrained_model_name_or_path: str | None = None
    """The base model. Default: the one that the first run was trained on, else the embedded model."""
    family: str | None = None
    """Model family; by default read from the pipeline's model_index.json."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository. Default: the commit that the first run was trained on."""
    variant: str | None = None
    """Weight variant of the hub repository, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """An autoencoder to use instead of the pipeline's own: a folder, a hub name or a .safetensors file."""
    cache_dir: Path | None = None
    """Where downloads from the hub, and what single files are converted to, are kept."""
    allow_pickle: bool = False
    """Accept .bin/.ckpt weights of the base model. They can run any code while they load."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of denoiser and text encoders; LoRAs are fp32. Default: the first run's; for LoRAs without a run, bf16
    on a GPU that knows it, else fp16, and no on a CPU."""
    base_precision: Precision | None = None
    """Fewer bits for the denoiser's weights: fp8, int8, nf4 or bf16. Default: the first run's."""
    text_encoder_precision: Precision | None = None
    """The same for the text encoders. Default: the first run's."""
    offload_blocks: int | None = None
    """Blocks of the denoiser whose weights wait in the computer's memory and are copied to the GPU ahead of their use.
    Default: the first run's."""
    text_encoder_device: Literal["cpu"] | None = None
    """Where text encoders work: cpu spares the GPU, and is slow. Default: as in the first run."""

    def __post_init__(self) -> None:
        if not self.lora:
            raise UserError("--lora needs at least one file or folder")
        if not self.lora_scales:
            raise UserError("--lora_scales needs at least one number")
        finite(self, "lora_scales")
        short(self, "prompts", "subject", "negative_prompt")
        if self.prompts and self.sample_prompts:
            raise UserError("give either --prompts or --sample_prompts, not both")
        for name, lowest in (
            ("num_images_per_prompt", 1),
            ("num_inference_steps", 1),
            ("sample_batch_size", 1),
            ("resolution", 8),
            ("sample_guidance_scale", 0),
            ("sample_seed", 0),
            ("offload_blocks", 0),
        ):
            value = getattr(self, name)
            if value is not None and not lowest <= value < float("inf"):
                raise UserError(f"--{name} must be at least {lowest} (got {value})")
