"""What would keep a run from ending well, seen before any long work: at the start of every training, and by doctor."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from dreamlora.data.encode import bytes_lacking, bytes_of
from dreamlora.data.images import ImageRecord
from dreamlora.data.transforms import Preparations
from dreamlora.errors import UserError
from dreamlora.figures import gibibytes
from dreamlora.interfaces import Components
from dreamlora.lora.applying import weights_for
from dreamlora.lora.names import names_of
from dreamlora.lora.targets import layer_names, require_patterns, wanted_layers
from dreamlora.lora.weights import LayerWeights
from dreamlora.models import kernels
from dreamlora.models.inventory import PartFiles, empty_part, problems_of
from dreamlora.models.loading import read_settings
from dreamlora.models.offload import SLOTS, waiting_blocks
from dreamlora.models.parts import DTYPES
from dreamlora.run import continuing, formats
from dreamlora.run.context import RunContext
from dreamlora.run.encoding import latent_filling


def require_parts(parts: Sequence[PartFiles]) -> None:
    """Nothing, if the files of all parts are there and may be loaded.

    Raises:
        UserError: one is not; the message tells of the first, and how many there are.
    """
    problems = list(problems_of(parts))
    if problems:
        more = f" (and {len(problems) - 1} more parts cannot be loaded)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def require_layers(context: RunContext) -> None:
    """Nothing, if the denoiser has the layers that are to be trained, and those of the training adapter; and what
    patterns of ranks and alphas name; and can be computed as is asked for.

    Raises:
        UserError: it has none of a name that was given, or the training adapter is for another model; or one has no
            name in a format that is asked for; or see ``kernels.require``.
    """
    family, lora = context.family, context.config.lora
    module = empty_part(context.inventory, family.DENOISER)
    device, precision = context.accelerator.device, DTYPES[context.accelerator.mixed_precision]
    kernels.require(family, module, context.source, device, precision)
    found = {family.DENOISER: _layers(context, family.DENOISER, module)}
    if lora.rank_pattern or lora.alpha_pattern:
        encoders = family.TEXT_ENCODERS if lora.train_text_encoder else ()
        for name in encoders:
            found[name] = _layers(context, name, empty_part(context.inventory, name))
        require_patterns(lora, found)
    if context.training_adapter:
        settings = read_settings(context.source, family.SETTINGS)
        assistant_of(context, {family.DENOISER: module, "settings": settings})
    formats.require_names(context, module, found[family.DENOISER])


def require_blocks(context: RunContext) -> None:
    """Nothing, if the denoiser has as many blocks as are to wait in host memory.

    Raises:
        UserError: it has not.
    """
    if count := context.config.model.offload_blocks:
        waiting_blocks(empty_part(context.inventory, context.family.DENOISER), count)


def _layers(context: RunContext, name: str, module: nn.Module) -> list[str]:
    """Names of the layers of a part that are to be trained."""
    config, family = context.config, context.family
    if context.predecessor:
        return continuing.layers_of(config, family, context.predecessor, name, module)
    if name == family.DENOISER:
        return layer_names(module, wanted_layers(config.lora, family), config.lora.lora_blocks)
    return layer_names(module, family.TEXT_LORA_LAYERS)


def assistant_of(context: RunContext, components: Components) -> dict[str, LayerWeights]:
    """The training adapter by layer, as it fits a denoiser that has no LoRA yet; empty: there is none.

    Args:
        components: the denoiser and the pipeline's settings.

    Raises:
        UserError: it cannot be read, or is for another model.
    """
    if context.training_adapter is None:
        return {}
    family = context.family
    alone = {name: components[name] for name in (family.DENOISER, "settings")}
    model = names_of(family, components[family.DENOISER].config)
    return weights_for(family.pipeline(alone), context.training_adapter, model)[family.DENOISER]


def require_room(context: RunContext, records: Sequence[ImageRecord], how: Preparations) -> None:
    """Nothing, if the latents of all images that the cache lacks fit on its disk. Main process only.

    Raises:
        UserError: they do not.
    """
    free, filling = free_bytes(context.cache.folder), latent_filling(context)
    if bytes_of(records, how, filling.latents) <= free:  # at most so many; which are there already is slower to tell
        return
    needed = bytes_lacking(records, how, filling)
    if needed > free:
        raise UserError(
            f"the cache of latents {context.cache.folder} needs {gibibytes(needed)} more for {len(records)} images, "
            f"and {gibibytes(free)} are free: free some space, or give --latents_cache_dir on another disk, or fewer "
            "--crop_variants"
        )


def warnings(context: RunContext) -> Iterator[str]:
    """What a person would hardly want, and the run does all the same; one sentence each."""
    count = context.config.model.offload_blocks
    if count and context.accelerator.device.type != "cuda":
        yield f"--offload_blocks {count} saves nothing on this device, and costs copies: it is for GPUs of CUDA"
    elif 0 < count <= SLOTS:
        yield f"--offload_blocks {count} saves nothing: the ring on the GPU holds {SLOTS} blocks in any case"
    distilled = context.family.distilled(context.source)
    if distilled and not context.training_adapter:
        yield f"this model was distilled to few steps, and plain training undoes that: {distilled}"
    if context.accelerator.mixed_precision == "fp16":
        wide = [part.name for part in context.inventory if part.precision == "BF16" and part.role != "vae"]
        if wide:
            yield (
                f"the weights of {', '.join(wide)} are bf16, and fp16 holds no numbers above 65,504: losses that are "
                "not finite, or black images, come from there. Give --mixed_precision bf16 where the device knows it"
            )


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder is, or will be, on."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free
