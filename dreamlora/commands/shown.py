"""The images that LoRAs of models that edit are drawn with, in ``sample`` and ``evaluate``."""

from __future__ import annotations

from dataclasses import replace

from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.commands.trained import TrainedRun
from dreamlora.data.images import open_image
from dreamlora.errors import UserError
from dreamlora.sampling.sampler import SamplePlan
from dreamlora.sampling.shown import kept, require_for_prompts, shown_with


def with_shown(
    plan: SamplePlan, config: SampleConfig, run: TrainedRun | None, *, edits: bool, must: bool = False
) -> SamplePlan:
    """The plan with the image that each prompt edits: as given, else as the run had them.

    Args:
        plan: what is drawn.
        config: the flags.
        run: whose images hold where none are given.
        edits: whether the model does.
        must: whether it does nothing without an image.

    Raises:
        UserError: it does not, and images are given; there is not one for all prompts or one for each, or one cannot be
            read; or the run has none for a prompt.
    """
    files = config.validation_images
    if files and not edits:
        raise UserError("--validation_images: the model draws from prompts alone, and edits no images: leave it out")
    if not edits:
        return plan
    require_for_prompts(files, plan.prompts)
    images = [open_image(file, f"--validation_images {file}") for file in files]
    shown = {} if images or run is None else kept(plan.prompts, run.folder)
    if must and not images and not shown:
        raise UserError(
            "--validation_images is needed: the model edits images, and does nothing without one; give one for all "
            "prompts, or one for each"
        )
    if images or run is None:
        return replace(plan, shown=shown_with(plan.prompts, images, plan.width or 0))
    lacking = [prompt for prompt in plan.prompts if prompt not in shown]
    if shown and lacking:
        raise UserError(
            f"{run.name} has drawn no image of the prompt {lacking[0]!r}, so which image it is to edit is not known: "
            "give --validation_images, one for all prompts or one for each"
        )
    own = [shown_with([prompt], [image], plan.width or image.width) for prompt, image in shown.items()]
    return replace(plan, shown={prompt: image for each in own for prompt, image in each.items()})
