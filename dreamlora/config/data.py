"""Which images and captions are trained on: those of one data set, or of several. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from dreamlora.config.ranges import above as _above
from dreamlora.config.ranges import at_least as _at_least
from dreamlora.config.ranges import short as _short
from dreamlora.config.ranges import within as _within
from dreamlora.errors import UserError

LARGEST = 2**14
"""Side of an image in pixels: one such image takes 3 GB."""
SOURCES = ("instance_data_dir", "train_data_dir", "dataset_name")
"""Options that say where images come from: a folder (of DreamBooth, or with captions), or Hugging Face datasets."""
OWN_IMAGES = (*SOURCES, "datasets")
"""Options of ``Data`` that name a person's own images: no built-in ones are drawn then."""


@dataclass(frozen=True)
class DataSet:
    """One of several data sets; what it leaves open is as the flag of the same name says for all."""

    instance_data_dir: Path | None = None
    """Folder with its images."""
    train_data_dir: Path | None = None
    """Folder with its captioned images."""
    dataset_name: str | None = None
    """A Hugging Face datasets name instead."""
    dataset_config_name: str | None = None
    """Configuration of that data set."""
    image_column: str | None = None
    """Its column with the images."""
    caption_column: str | None = None
    """Its column with the captions."""
    instance_prompt: str | None = None
    """Caption of its images that have none of their own."""
    repeats: int | None = None
    """How often each of its images is seen in an epoch."""
    max_train_samples: int | None = None
    """Use only its first N images."""
    resolution: int | None = None
    """Side of its square training images in pixels."""
    mask_data_dir: Path | None = None
    """Folder with masks of its images."""
    alpha_mask: bool | None = None
    """Whether what is transparent in its images is left alone."""
    conditioning_data_dir: Path | None = None
    """Folder with what a model that edits is shown of its images."""
    loss_weight: float = 1.0
    """Factor of its images' loss."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "repeats", "max_train_samples")
        _within(self, 8, LARGEST + 1, "resolution")
        _above(self, 0, "loss_weight")
        _short(self, "instance_prompt", "caption_column", "image_column")
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise UserError(f"a data set needs one of {', '.join(SOURCES)} (got {got})")

    @property
    def name(self) -> str:
        """Of the folder, or of the Hugging Face data set."""
        folder = self.instance_data_dir or self.train_data_dir
        return folder.resolve().name if folder else Path(str(self.dataset_name)).name

    def given(self) -> dict[str, Any]:
        """What the entry says, by option."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Data:
    """Which images and captions are trained on, and how they are prepared."""

    train_data_dir: Path | None = None
    """Folder with captioned images. Captions lie beside them (name.txt, .caption, .json), or in metadata."""
    style: str | None = None
    """A built-in style of the embedded models, drawn with captions on demand; used when no images are given."""
    instance_data_dir: Path | None = None
    """Folder with the images to learn. Captions may lie beside them (name.txt, .caption, .json), or in metadata."""
    subject: str | None = None
    """A built-in subject of the embedded models, drawn on demand; used when no images are given."""
    instance_prompt: str | None = None
    """Caption of every image that has none of its own, such as "a photo of sks dog"."""
    dataset_name: str | None = None
    """A Hugging Face datasets name to train on instead of a folder."""
    dataset_config_name: str | None = None
    """Configuration of that data set."""
    streaming: bool = False
    """Fetch only the rows of --dataset_name that are used (see --max_train_samples), not the whole data set."""
    image_column: str = "image"
    """Its column with the images."""
    caption_column: str | None = None
    """Its column with the captions, or that of a folder's metadata and .json captions; by default text or caption."""
    captions_per_line: bool = False
    """Every line of a .txt or .caption file is a caption of its own; each time its image is seen, one is drawn."""
    caption_dropout: float = 0.0
    """Probability that an image is seen without its caption, which keeps classifier-free guidance working."""
    shuffle_tags: bool = False
    """Put the tags of a caption, which commas separate, into another order each time its image is seen."""
    keep_tags: int = 0
    """The first N tags stay where they are."""
    caption_variants: int = 4
    """Random orders of the tags kept in the cache for each caption; each time an image is seen, one is drawn."""
    datasets: tuple[DataSet, ...] = ()
    """Several data sets instead of one: a list in a --config file, each with its folder, repeats, prompt, ..."""
    mask_data_dir: Path | None = None
    """Folder with masks named like their images: white is learned, black is left alone, grey in between."""
    alpha_mask: bool = False
    """The transparency of an image is its mask: what is opaque is learned, what is transparent is left alone."""
    conditioning_data_dir: Path | None = None
    """For models that edit: folder with the images before the edit, named like those after it, which are learned."""
    class_data_dir: Path | None = None
    """Folder with images of the class; missing ones are made by the base model. Default: outputs/class_images/..."""
    class_prompt: str | None = None
    """Prompt of the class images, such as "a photo of a dog"."""
    with_prior_preservation: bool = False
    """Train on class images too, so that the class keeps its look."""
    prior_loss_weight: float = 1.0
    """Weight of the class images' loss."""
    num_class_images: int = 100
    """How many class images there should be; all that you give count, and what is missing is made."""
    sample_batch_size: int = 4
    """Images made at a time, class images and samples alike."""
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = None
    """Precision for making class images. Default: --mixed_precision."""
    repeats: int = 1
    """How often each image is seen in an epoch."""
    max_train_samples: int | None = None
    """Use only the first N images."""
    resolution: int | None = None
    """Side of the square training images in pixels. Default: the model's own."""
    center_crop: bool = False
    """Crop the middle instead of a random place."""
    random_flip: bool = False
    """Mirror images half of the time."""
    image_interpolation_mode: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "lanczos"
    """Filter for resizing."""
    buckets: bool = False
    """Train images at the size with the nearest aspect ratio and the area of the square, instead of squares."""
    bucket_step: int | None = None
    """Sides of these sizes are multiples of it. Default: 64, or an eighth of --resolution if that is less."""
    crop_variants: int = 4
    """Random crops kept in the cache for an image that must be cropped; each time it is seen, one is drawn."""
    holdout: int | None = None
    """Images kept out of training for the evaluation. Default: 20 % of them (at most 16), 1 or 2 of 6 to 11, else 0."""
    latents_cache_dir: Path | None = None
    """Where encoded images and prompts are kept. Default: .cache/dreamlora in the home folder."""
    tokenizer_max_length: int | None = None
    """Tokens kept of a prompt, begin and end included. Default: the tokenizer's."""
    max_token_length: int | None = None
    """Tokens kept of a prompt for CLIP encoders, which take 75, in chunks of 75: 150 or 225."""
    max_sequence_length: int | None = None
    """Tokens kept of a prompt for T5 and language models. Default: the model's own."""
    dataloader_num_workers: int = 0
    """Processes that read and crop images while the cache is filled."""
    pre_compute_text_embeddings: bool = True
    """Always so here, unless the text encoder is trained; kept so that diffusers' command lines work."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "prior_loss_weight", "holdout", "dataloader_num_workers", "keep_tags")
        _at_least(self, 1, "num_class_images", "sample_batch_size", "repeats", "max_train_samples", "crop_variants")
        _at_least(self, 1, "caption_variants", "bucket_step")
        _within(self, 0, 1, "caption_dropout")
        _within(self, 8, LARGEST + 1, "resolution")
        _at_least(self, 8, "max_sequence_length")
        _at_least(self, 3, "tokenizer_max_length")
        _at_least(self, 1, "max_token_length")
        _short(self, "instance_prompt", "class_prompt", "caption_column", "image_column")
        if self.max_token_length and self.tokenizer_max_length not in (None, self.max_token_length + 2):
            raise UserError("give either --max_token_length or --tokenizer_max_length, not both")
        if self.dataset_name == "":  # a shell variable that is not set; the built-in images are not meant then
            raise UserError("--dataset_name needs a name (got nothing)")
        if self.train_data_dir and self.dataset_name:
            raise UserError("give either --train_data_dir or --dataset_name, not both")
        for_one = (*SOURCES, "max_train_samples", "mask_data_dir", "conditioning_data_dir")
        of_one = next((name for name in for_one if getattr(self, name)), None)
        if self.datasets and of_one:
            raise UserError(f"give either --{of_one} or datasets, not both: it can be said in each of its entries")
        self._check_folders_beside()
        if self.streaming and not any(one.dataset_name for one in self.each()):
            raise UserError("--streaming is only used together with --dataset_name")
        if self.captions_per_line and all(one.dataset_name for one in self.each()):
            raise UserError("--captions_per_line is about text files beside images, which --dataset_name has none of")
        if self.keep_tags and not self.shuffle_tags:
            raise UserError("--keep_tags is only used together with --shuffle_tags")
        if self.bucket_step and not self.buckets:
            raise UserError("--bucket_step is only used together with --buckets")

    def _check_folders_beside(self) -> None:
        for flag in ("mask_data_dir", "conditioning_data_dir"):
            if getattr(self, flag) and self.dataset_name:
                raise UserError(f"--{flag} belongs to a folder of images, and --dataset_name is none: leave one out")
        if any(one.conditioning_data_dir for one in self.each()) and self.with_prior_preservation:
            raise UserError(
                "--with_prior_preservation makes class images, of which there is nothing before the edit: leave it out "
                "with --conditioning_data_dir"
            )

    def each(self) -> tuple[Data, ...]:
        """The options of every data set by themselves: those of its entry, and for the others the flags."""
        if not self.datasets:
            return (self,)
        common = replace(self, datasets=(), streaming=False, captions_per_line=False)

        def options(entry: DataSet) -> Data:
            own = {name: value for name, value in entry.given().items() if name != "loss_weight"}
            of_kind = "streaming" if entry.dataset_name else "captions_per_line"
            return replace(common, **own, **{of_kind: getattr(self, of_kind)})

        return tuple(map(options, self.datasets))

    @property
    def brings_images(self) -> bool:
        """Whether a person's images are named: none means those of the embedded models."""
        return any(getattr(self, name) for name in OWN_IMAGES)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Factor of the loss of every data set's images."""
        return tuple(entry.loss_weight for entry in self.datasets) or (1.0,)

    @property
    def subject_prompt(self) -> str | None:
        """The prompt that names the subject: the flag's, or that of the first data set with one."""
        return next((one.instance_prompt for one in (self, *self.each()) if one.instance_prompt), None)


def instance_prompt_of(options: Mapping[str, Any]) -> str | None:
    """The prompt that names the subject, in the options of a saved run: the flag's, or that of the first data set with
    one.
    """
    entries = [options, *(options.get("datasets") or ())]
    return next((entry["instance_prompt"] for entry in entries if entry.get("instance_prompt")), None)
