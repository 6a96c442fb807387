"""``dreamlora evaluate``: the flags. Torch is imported only after they are known to be right."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dreamlora import registry
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.config import Encoders
from dreamlora.config.ranges import short
from dreamlora.errors import UserError

LOSS_METRIC = "eval_loss"
"""The metric that needs no images."""


@dataclass(frozen=True)
class EvaluateConfig(SampleConfig):
    """Measure LoRAs, checkpoints and scales, or folders of images. Images are drawn where they are not there yet."""

    lora: tuple[Path, ...]
    """LoRA files, folders with one, run folders, or folders of images; the flag's name may be left out."""
    metrics: tuple[str, ...] = ()
    """What is measured: eval_loss, {metrics}. Default: all but fid, which needs thousands of images."""
    evalset: Path | None = None
    """Evaluation set that the loss is measured on: an evalset.json or evalset_final.json of a run, made with the same
    base model. Default: evalset.json of the first run."""
    eval_batch_size: int = 8
    """Items of the evaluation set per forward pass."""
    references: Path | None = None
    """Folder of real images that were not trained on. Default: those that the first run held out."""
    training_images: Path | None = None
    """Folder of the images that were trained on, for the metric copy. Default: those of the first run."""
    class_prompt: str | None = None
    """What the subject is one of, such as "a photo of a dog". CLIP scores take it in the place of the subject.
    Default: the run's, else the subject without its first word."""
    num_images_per_prompt: int = 4
    """Images per prompt, each from a seed of its own."""
    output_dir: Path | None = None
    """Where metrics.json and the images go. Default: outputs/evaluate-<name of the first LoRA>."""
    latents_cache_dir: Path | None = None
    """Where embeddings are kept. Default: .cache/dreamlora in the home folder."""
    encoders: Encoders = field(default_factory=Encoders)

    def __post_init__(self) -> None:
        super().__post_init__()
        short(self, "class_prompt")
        try:
            names = tuple(dict.fromkeys(map(_metric, self.metrics)))
        except UserError as error:
            raise UserError(f"--metrics: {error} {LOSS_METRIC} is one too, of LoRAs alone.") from None
        object.__setattr__(self, "metrics", names)
        for name in ("references", "training_images"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise UserError(f"--{name}: there is no folder {folder} (looked from {Path.cwd()})")
        for path in self.lora:
            if not path.exists():
                raise UserError(f"--lora: there is no {path} (looked from {Path.cwd()})")
        if self.evalset is not None and not self.evalset.is_file():
            raise UserError(f"--evalset: there is no file {self.evalset} (looked from {Path.cwd()})")
        if self.evalset is not None and self.metrics and LOSS_METRIC not in self.metrics:
            raise UserError(f"--evalset is only used together with {LOSS_METRIC}, which --metrics leaves out")
        if self.eval_batch_size < 1:
            raise UserError(f"--eval_batch_size must be at least 1 (got {self.eval_batch_size})")


def _metric(name: str) -> str:
    """The name as it is spelled here."""
    spelled = name.lower().replace("-", "").replace("_", "")
    return LOSS_METRIC if spelled == LOSS_METRIC.replace("_", "") else registry.check("metrics", name)
