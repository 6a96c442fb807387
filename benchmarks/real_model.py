"""Check a real model in minutes: does dreamlora do with it what the stock pipeline does, and what does that take?

    python benchmarks/real_model.py --model black-forest-labs/FLUX.2-klein-base-4B --images photos/

Draws an image with the stock diffusers pipeline from a prompt, and again from the embeddings that dreamlora makes of
it; looks at what the denoiser is given, by the pipeline and by training; trains a LoRA for some steps, and draws with
it in the stock pipeline (``load_lora_weights``). Prints figures, time and memory of every stage, and writes them to a
JSON file, without names of folders of this machine, that can be sent as an issue. Flags that are not known here are
given to the training (dreamlora dreambooth --help).
"""

from __future__ import annotations

import argparse
import gc
import inspect
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _cli
import _machine
import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from dreamlora import registry
from dreamlora.cli.parse import parse_run
from dreamlora.config import Train
from dreamlora.interfaces import Conditioning, Family, ModelSource, View
from dreamlora.models.inventory import inventory
from dreamlora.models.loading import family_of, read_model_index, resolve_source
from dreamlora.models.parts import DTYPES, ROLES, Parts, give_back_memory
from dreamlora.pictures import own_picture
from dreamlora.run import assemble
from dreamlora.run.context import RunContext
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.sampler import Asked, Guidance, SamplePlan, draw, embedding, prompting
from dreamlora.training.parity import compare_images

SEED = 7
CALL_ERROR = 0.05
"""Of the LoRA's effect on a call of the denoiser, beyond what rounding explains."""
ALIKE_DB = 30.0
"""Images of the same numbers, rounded otherwise, are at least so near to each other."""


@dataclass
class Check:
    """What is checked and found.

    Attributes:
        stages: seconds and peak memory by stage.
        findings: figures by stage, or the error that ended it.
        hidden: texts that the result must not have, and what stands for them.
    """

    device: torch.device
    hidden: dict[str, str]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A block whose time and memory are taken; an error in it is noted, and the next block goes on."""
        found: dict[str, Any] = {}
        with self.measured(name):
            try:
                yield found
            except Exception as error:  # it is what the result is for
                found["error"] = self.public(f"{type(error).__name__}: {error}")
        self.findings[name] = found
        gc.collect()
        give_back_memory()
        print(f"{name}: {found}", flush=True)

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """A block whose time and memory are taken."""
        forget_peak(self.device)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = round(time.perf_counter() - started, 2)
            self.stages[name] = {"seconds": seconds, "peak_gib": round(peak(self.device) / 2**30, 3)}

    def public(self, text: str) -> str:
        """A text without names of folders of this machine."""
        for private, name in self.hidden.items():
            text = text.replace(private, name)
        return text


def forget_peak(device: torch.device) -> None:
    """Begin to look for the peak anew; where the system does not allow that, it is the whole process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    place = Path("/proc/self/clear_refs")
    try:
        place.write_text("5", encoding="utf-8")
    except OSError:
        return


def peak(device: torch.device) -> int:
    """Bytes at most since ``forget_peak``: of the GPU's memory by torch, on a CPU those of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def arguments_of(module: nn.Module, call: Callable[[], Any]) -> tuple[dict[str, Tensor], Any]:
    """The tensors that the first call of a module was given, by name, and what ``call`` gave."""
    seen: dict[str, Tensor] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        if not seen:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            for path, value in tree_flatten_with_path(dict(given))[0]:
                if isinstance(value, Tensor):
                    seen[".".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)] = (
                        value.detach().float().cpu()
                    )

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return seen, call()
    finally:
        handle.remove()


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Any]:
    """By argument the largest difference, relative to the largest number; or what is not alike.

    Where the second has one row and the first several, as under guidance, it is compared with the one nearest to it;
    where one is longer, which is padding, the beginnings are compared.
    """
    found: dict[str, Any] = {}
    for name in sorted(first.keys() | second.keys()):
        one, other = first.get(name), second.get(name)
        if one is None or other is None:
            found[name] = f"given by {'the second' if one is None else 'the first'} alone"
            continue
        if one.ndim != other.ndim:
            found[name] = f"{list(one.shape)} and {list(other.shape)}"
            continue
        rows = one[:, None] if one.ndim and len(other) == 1 else one[None]
        common = tuple(slice(min(sides)) for sides in zip(rows.shape[1:], other.shape, strict=True))
        apart = round(min(distance(row[common], other[common]) for row in rows), 8)
        alike = rows.shape[1:] == other.shape
        found[name] = apart if alike else f"{apart} where both are: {list(one.shape)} and {list(other.shape)}"
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-12)) if one.numel() else 0.0


@dataclass(frozen=True)
class Subject:
    """The model, and what is asked of it."""

    family: Family
    source: ModelSource
    plan: SamplePlan
    dtype: torch.dtype
    device: torch.device
    offload: bool

    @property
    def guidance(self) -> Guidance:
        """Of all images."""
        return Guidance(self.family, self.source, self.plan.guidance_scale)

    @property
    def settings(self) -> Any:
        """Of the pipeline."""
        return self.family.load(self.source, "scheduler", None)["settings"]

    def stock(self) -> Any:
        """The pipeline as a user loads it."""
        index = read_model_index(self.source)
        options: dict[str, Any] = {"safety_checker": None} if "safety_checker" in index else {}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            self.source.path,
            revision=self.source.revision,
            variant=self.source.variant,
            cache_dir=self.source.cache_dir,
            torch_dtype=self.dtype,
            **options,
        )
        if self.offload:
            pipeline.enable_model_cpu_offload()
            return pipeline
        return pipeline.to(self.device)

    def drawn(self, pipeline: Any, asked: Asked, plan: SamplePlan | None = None) -> tuple[dict[str, Tensor], Any]:
        """What the denoiser was given first, and the image."""
        denoiser = getattr(pipeline, self.family.DENOISER)
        seen, [image] = arguments_of(denoiser, lambda: list(draw(pipeline, plan or self.plan, asked)))
        return seen, image.image


def subject_of(options: argparse.Namespace, config: Any, device: torch.device, precision: str) -> Subject:
    """The model, and one image of the training's prompt."""
    source = resolve_source(config.model)
    family = family_of(source, config.model.family)
    defaults = family.sample_defaults(source)
    side = config.data.resolution or family.resolution(source)
    plan = SamplePlan(
        (options.prompt,), options.inference_steps, defaults.guidance_scale, 1, SEED, width=side, height=side
    )
    return Subject(family, source, plan, DTYPES[precision], device, options.cpu_offload)


def check_conditioning(subject: Subject, check: Check) -> None:
    """Embeddings of the prompt, as the pipeline makes them and as training does; what the denoiser is given by both.

    Of models that draw nothing without an image to edit, the training and its parity check tell.
    """
    if subject.family.text_pictures(subject.source) is not None:
        return
    with check.stage("stock pipeline, from the prompt") as found:
        given, image = subject.drawn(subject.stock(), prompting(subject.guidance))
        found["arguments"] = {name: list(tensor.shape) for name, tensor in given.items()}
    if "error" in found:
        return
    parts = Parts(subject.family, subject.source, subject.device, subject.dtype)
    text: dict[str, Conditioning] = {}

    @torch.no_grad()
    def encode(prompts: Any, views: Conditioning) -> Conditioning:
        [prompt] = set(prompts)
        if prompt not in text:
            loaded = parts.get("text")
            text[prompt] = subject.family.encode_tokens(loaded, subject.family.tokenize(loaded, [prompt], None))
        return {name: torch.cat([value] * len(prompts)) for name, value in text[prompt].items()}

    with check.stage("embeddings of the prompt") as found:
        encode([subject.plan.prompts[0]], {})
        if (negative := subject.guidance.encoded_negative) is not None:
            encode([negative], {})
        parts.free("text")
    with check.stage("stock pipeline, from embeddings") as found:
        components = {name: part for role in ("denoiser", "vae", "scheduler") for name, part in parts.get(role).items()}
        pipeline = subject.family.pipeline(components)
        ours, again = subject.drawn(pipeline, embedding(subject.guidance, encode))
        found["arguments"] = differences(given, ours)
        found["mended"] = is_mended(subject)
        found["image"] = compare_images(image, again)
    with check.stage("a training's call of the denoiser") as found:
        found["arguments"] = differences(given, called_in_training(subject, parts, encode))
    parts.free(*ROLES)


def is_mended(subject: Subject) -> bool:
    """Whether the family's pipeline is not quite the stock one, so that images differ: docs/families.md says why."""
    stock = getattr(diffusers, read_model_index(subject.source)["_class_name"])
    made = subject.family.pipeline({"settings": subject.settings})
    return type(made) is not stock or any(inspect.isfunction(value) for value in vars(made).values())


@torch.no_grad()
def called_in_training(subject: Subject, parts: Parts, encode: Callable[..., Conditioning]) -> dict[str, Tensor]:
    """What ``predict`` gives the denoiser: latents and times are others than a pipeline's, all else should be alike."""
    family, plan = subject.family, subject.plan
    size = (plan.width or 0, plan.height or 0)
    pixels = torch.zeros(1, 3, size[1], size[0], device=subject.device)
    noisy = family.encode_images(parts.get("vae"), pixels).mean
    conditioning = {**encode(plan.prompts, {}), **family.describe_views([View(size, (0, 0), size)])}
    conditioning = {name: value.to(subject.device) for name, value in conditioning.items()}
    objective = family.objective(parts.get("scheduler")["scheduler"], Train())
    times = objective.spread_times(torch.tensor([0.5])).to(subject.device)
    denoiser = parts.get("denoiser")[family.DENOISER]
    call = lambda: family.predict(denoiser, noisy, times, conditioning, plan.guidance_scale)  # noqa: E731
    seen, _ = arguments_of(denoiser, call)
    return seen


def check_training(subject: Subject, config: Any, optimizer: Any, check: Check) -> None:
    """Train, and draw with the result in the stock pipeline."""
    timed = RunContext.timed

    @contextmanager
    def measured(context: RunContext, name: str) -> Iterator[None]:
        with check.measured(f"training: {name}"), timed(context, name):
            yield

    RunContext.timed = measured  # type: ignore[method-assign]
    folder: RunFolder | None = None
    try:
        with check.stage("training, all of it") as found:
            folder = assemble.train(config, optimizer)
            summary = folder.summary()
            found["parity"] = summary.get("parity")
            losses = [row["value"] for row in folder.metrics() if row["name"] == "train/loss"]
            found["loss"] = {"first": losses[0], "last": losses[-1]} if losses else None
            found["steps"] = config.train.max_train_steps
            seconds = check.stages.get("training: training", {}).get("seconds", 0.0)
            found["seconds_per_step_with_samples"] = round(seconds / (config.train.max_train_steps or 1), 3)
    finally:
        RunContext.timed = timed  # type: ignore[method-assign]
    if folder is None or "error" in found:
        return
    with check.stage("stock pipeline, with the LoRA loaded") as found:
        found["mended"] = is_mended(subject)
        row = max(folder.sample_rows(), key=lambda row: row["step"])
        drawn = own_picture(folder.samples / row["file"])
        pipeline = subject.stock()
        pipeline.load_lora_weights(str(folder.path), weight_name=folder.lora_file.name)
        size = {"width": drawn.width, "height": drawn.height}
        plan = SamplePlan((row["prompt"],), row["num_inference_steps"], row["guidance_scale"], 1, row["seed"], **size)
        _, image = subject.drawn(
            pipeline, prompting(Guidance(subject.family, subject.source, plan.guidance_scale)), plan
        )
        found["image"] = compare_images(drawn, image)


def problems(findings: Mapping[str, Any]) -> list[str]:
    """What is not as it should be, one sentence each."""
    found = [f"{name}: {each['error']}" for name, each in findings.items() if "error" in each]
    for name, each in findings.items():
        psnr = each.get("image", {}).get("psnr_db", ALIKE_DB)
        if psnr < ALIKE_DB and not each.get("mended"):
            found.append(f"{name}: its image is another one (PSNR {psnr:.1f} dB)")
        call = (each.get("parity") or {}).get("call") or {}
        if call.get("error", 0.0) > 2 * call.get("rounding", 0.0) + CALL_ERROR:
            found.append(f"{name}: the saved LoRA does not do what it did in training (error {call['error']:.3f})")
    return found


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, check, print and write; the exit status is 0 if all is as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a folder or hub name of a diffusers pipeline")
    parser.add_argument("--images", type=Path, required=True, help="folder with some pictures")
    parser.add_argument("--prompt", default="a photo of sks dog")
    parser.add_argument("--steps", type=int, default=20, help="of the training")
    parser.add_argument("--inference_steps", type=int, default=8, help="denoising steps of images")
    parser.add_argument("--cpu_offload", action="store_true", help="for pipelines that do not fit the GPU as a whole")
    parser.add_argument("--output", type=Path, default=Path("real_model.json"), help="the result")
    options, more = parser.parse_known_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Path(tempfile.mkdtemp(prefix="dreamlora-real-model-"))
    flags = ["--pretrained_model_name_or_path", options.model, "--instance_data_dir", str(options.images)]
    flags += ["--instance_prompt", options.prompt, "--max_train_steps", str(options.steps)]
    flags += ["--num_inference_steps", str(options.inference_steps), "--sample_steps", str(options.steps)]
    flags += ["--latents_cache_dir", str(work / "cache"), "--output_dir", str(work / "run"), "--train_batch_size", "1"]
    flags += ["--mixed_precision", "bf16" if device.type == "cuda" else "no", "--validation_prompt", options.prompt]
    flags += ["--eval_steps", "0", "--checkpointing_steps", "0", "--gradient_checkpointing"]
    flags += ["--no_parity_check"] if options.cpu_offload else []
    hidden = {str(Path(options.model).resolve()): Path(options.model).name, str(options.images.resolve()): "images"}
    hidden |= {str(options.images): "images", str(work): "work", str(Path.home()): "~"}
    if Path(options.model).exists():
        hidden[options.model] = Path(options.model).name
    check = Check(device, dict(sorted(hidden.items(), key=lambda pair: -len(pair[0]))))
    result = {"command": _machine.command("real_model.py"), **_machine.describe(torch.get_num_threads())}
    try:
        config, optimizer = parse_run([*flags, *more])
        with check.stage("recognising the model") as found:
            subject = subject_of(options, config, device, config.model.mixed_precision or "no")
            found |= about(subject)
        if "error" not in found:
            check_conditioning(subject, check)
            check_training(subject, config, optimizer, check)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    wrong = problems(check.findings)
    result |= {"device": device.type, "findings": check.findings, "stages": check.stages, "problems": wrong}
    file = _machine.write(options.output.stem, result, options.output.parent)
    for name, taken in check.stages.items():
        print(f"{taken['seconds']:8.1f} s {taken['peak_gib']:8.2f} GiB  {name}")
    print("\n".join(wrong) or "all is as it should be")
    print(f"{file}: add it to an issue")
    sys.exit(1 if wrong else 0)


def about(subject: Subject) -> dict[str, Any]:
    """Of the model: what it is, and how large."""
    parts = inventory(subject.source, subject.family)
    return {
        "model": subject.source.model_id,
        "family": registry.name_of(subject.family),
        "class": read_model_index(subject.source)["_class_name"],
        "parts": {
            part.name: {"parameters": part.parameters, "precision": part.precision} for part in parts if part.size
        },
        "guidance_scale": subject.plan.guidance_scale,
        "side": subject.plan.width,
    }


if __name__ == "__main__":
    _cli.start(main)
