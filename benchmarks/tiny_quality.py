"""How good is an embedded model? Held-out captions, reconstruction, retrieval; writes JSON and contact sheets.

    python benchmarks/tiny_quality.py
    python benchmarks/tiny_quality.py --model tiny-flow
    python benchmarks/tiny_quality.py --captions 64 --output somewhere/      # a quick look

Kind and colour are read by a small classifier that this script trains on rendered pictures (not by the embedded CLIP);
background and, as a second opinion, colour are read from pixels. Every judge is also applied to real renders of the
same captions and to their autoencoder reconstructions, which bound what the samples can reach. Samples are drawn by the
stock pipeline, as the model's preset says.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _cli
import _machine
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from dreamlora import tiny
from dreamlora.cli import presets
from dreamlora.config import RunConfig
from dreamlora.tiny import clip_path, pipeline_path, scenery, subjects, world

TARGETS = {
    "colour": 0.97,
    "colour_by_pixels": 0.97,
    "background": 0.99,
    "class": 0.90,
    "pair_colours": 0.80,
    "psnr_held_out": 28.0,
    "psnr_subjects": 24.0,
    "clip_retrieval_at_1": 0.90,
}
JUDGED = {
    "colour is the caption's, by a classifier trained on renders": "colour",
    "colour, by comparing pixels with renders": "colour_by_pixels",
    "background, by pixels": "background",
    "kind, by the classifier": "class",
}
GROUP = 64  # captions that the CLIP chooses from
KIND_NAMES, BACKGROUND_NAMES = tuple(world.KINDS), tuple(world.BACKGROUNDS)
COLOUR_NAMES = tuple(world.COLOURS)
CLASSIFIER_PICTURES, CLASSIFIER_BATCH = 40_000, 64
EXAMPLES = 16  # renders of each background to compare with
GROUND_REACH = 20.0  # RGB distance up to which a pixel counts as one of the background's colours
GROUND_SHARE = 2e-4  # of a background's pixels that a colour must fill to be one of them
FRAME = 4  # width of the frame that the background is read from, pixels


def to_array(images: Sequence[Image.Image]) -> np.ndarray:
    """(n, 64, 64, 3) float32, 0 to 255."""
    return np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """(n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1


# ---- judges ---------------------------------------------------------------------------------------------------------


def build_classifier() -> nn.Sequential:
    """A small convolutional network: (n, 3, 64, 64) -> scores of the kinds, then of the colours."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, len(KIND_NAMES) + len(COLOUR_NAMES))
    )


def train_classifier(pictures: int, seed: int = 0) -> nn.Sequential:
    """Train on freshly rendered single things, noise and blur added so that it judges shape and not sharpness."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    steps = pictures // CLASSIFIER_BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        scenes = [world.sample_scene(rng) for _ in range(CLASSIFIER_BATCH)]
        pixels = to_tensor(to_array([world.render(scene, rng) for scene in scenes]))
        pixels = pixels + rng.uniform(0, 0.15) * torch.randn_like(pixels)
        if rng.random() < 0.3:
            pixels = F.avg_pool2d(pixels, 3, 1, 1)
        things = [scene.things[0] for scene in scenes]
        kinds = torch.tensor([KIND_NAMES.index(thing.kind) for thing in things])
        colours = torch.tensor([COLOUR_NAMES.index(thing.colour) for thing in things])
        scores = model(pixels).split((len(KIND_NAMES), len(COLOUR_NAMES)), 1)
        (F.cross_entropy(scores[0], kinds) + F.cross_entropy(scores[1], colours)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


@torch.no_grad()
def classified(model: nn.Module, pictures: np.ndarray) -> tuple[list[str], list[str]]:
    """The kind and the colour that the classifier sees in each picture."""
    kinds, colours = model(to_tensor(pictures)).split((len(KIND_NAMES), len(COLOUR_NAMES)), 1)
    return [KIND_NAMES[i] for i in kinds.argmax(1).tolist()], [COLOUR_NAMES[i] for i in colours.argmax(1).tolist()]


class PixelJudge:
    """Reads backgrounds and colours from pixels, by comparison with renders."""

    def __init__(self, seed: int = 1) -> None:
        self._rng = random.Random(seed)
        self._nearest = _nearest_colours()
        bare = {name: to_array([self._paint(name) for _ in range(EXAMPLES)]) for name in BACKGROUND_NAMES}
        self._ground = {name: _colours_like(pictures) for name, pictures in bare.items()}
        self._frames = np.stack([_frame(bare[name]).mean(0) for name in BACKGROUND_NAMES])

    def _paint(self, background: str) -> Image.Image:
        return scenery.paint(background, self._rng).reduce(scenery.SCALE)

    def background(self, picture: np.ndarray) -> str:
        """The background whose typical frame is nearest."""
        return BACKGROUND_NAMES[int(np.abs(_frame(picture[None]) - self._frames).mean((1, 2)).argmin())]

    def colour(self, picture: np.ndarray, scene: world.Scene, which: int = 0, renders: int = 4) -> str:
        """The colour whose renders are made of palette colours in the most similar shares (sum of differences).

        Only the colour of thing number `which` is in question, only its part of the picture is looked at, and there
        only pixels unlike the background's; colours that would not stand out are no candidates.
        """
        region = _region(scene, which)
        seen = self._shares(picture[region], scene.background)
        unlike: dict[str, float] = {}
        for name in COLOUR_NAMES:
            things = list(scene.things)
            things[which] = replace(things[which], colour=name)
            if not world.visible(things[which], scene.background):
                continue
            candidate = replace(scene, things=tuple(things))
            pictures = to_array([world.render(candidate, self._rng) for _ in range(renders)])
            shares = np.mean([self._shares(render[region], scene.background) for render in pictures], 0)
            unlike[name] = float(np.abs(shares - seen).sum())
        return min(unlike, key=lambda name: unlike[name])

    def _shares(self, pixels: np.ndarray, background: str) -> np.ndarray:
        """Shares of the pixels unlike the background that are nearest to each palette colour: (colours,)."""
        cells = _cells(pixels)
        thing = ~self._ground[background][cells]
        counts = np.bincount(self._nearest[cells][thing], minlength=len(COLOUR_NAMES))
        return counts / max(counts.sum(), 1)


def _cells(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells of pixels (..., 3) in a table of 5-bit RGB colours."""
    red, green, blue = (pixels.reshape(-1, 3).clip(0, 255).astype(int) >> 3).T
    return red, green, blue


def _cell_colours() -> np.ndarray:
    """The middle of every 5-bit RGB colour: (32, 32, 32, 3)."""
    levels = np.arange(4, 256, 8, dtype=np.float32)
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1)


def _nearest_colours() -> np.ndarray:
    """Number of the nearest palette colour of each 5-bit RGB colour: (32, 32, 32)."""
    palette = np.array([world.COLOURS[name] for name in COLOUR_NAMES], np.float32)
    return np.linalg.norm(_cell_colours()[..., None, :] - palette, axis=-1).argmin(-1)


def _colours_like(pictures: np.ndarray) -> np.ndarray:
    """Which 5-bit RGB colours are within GROUND_REACH of one that fills GROUND_SHARE of the pictures: (32, 32, 32)."""
    counts = np.zeros((32, 32, 32))
    np.add.at(counts, _cells(pictures), 1)
    grid = _cell_colours()
    common = grid[counts > GROUND_SHARE * counts.sum()]
    return np.any([np.linalg.norm(grid - colour, axis=-1) < GROUND_REACH for colour in common], 0)


def _frame(pictures: np.ndarray) -> np.ndarray:
    """Mean colours of 16 stretches of the pictures' frames: (n, 16, 3)."""
    top, bottom = pictures[:, :FRAME].mean(1), pictures[:, -FRAME:].mean(1)
    left, right = pictures[:, :, :FRAME].mean(2), pictures[:, :, -FRAME:].mean(2)
    edges = [edge.reshape(len(pictures), 4, 16, 3).mean(2) for edge in (top, bottom, left, right)]
    return np.concatenate(edges, 1)


def _region(scene: world.Scene, which: int) -> tuple[slice, slice]:
    """Rows and columns in which the thing can stand."""
    if scene.relation is None:
        return slice(6, 58), slice(6, 58)
    along, across = (slice(2, 32), slice(32, 62))[which], slice(12, 52)
    return (across, along) if scene.relation == "next to" else (along, across)


# ---- measurements ---------------------------------------------------------------------------------------------------


def judge_singles(judge: PixelJudge, classifier: nn.Module, pictures: np.ndarray, scenes: list[world.Scene]) -> dict:
    """Share of pictures whose colour, background and kind are the caption's."""
    kinds, colours = classified(classifier, pictures)
    classes = [kind == scene.things[0].kind for kind, scene in zip(kinds, scenes, strict=True)]
    right: dict[str, list[bool]] = {
        "colour": [colour == scene.things[0].colour for colour, scene in zip(colours, scenes, strict=True)],
        "colour_by_pixels": [
            judge.colour(picture, scene) == scene.things[0].colour
            for picture, scene in zip(pictures, scenes, strict=True)
        ],
        "background": [
            judge.background(picture) == scene.background for picture, scene in zip(pictures, scenes, strict=True)
        ],
        "class": classes,
    }
    by_kind = {
        name: round(float(np.mean(own)), 3)
        for name in KIND_NAMES
        if (own := [ok for ok, scene in zip(classes, scenes, strict=True) if scene.things[0].kind == name])
    }
    return {name: round(float(np.mean(marks)), 4) for name, marks in right.items()} | {"class_by_kind": by_kind}


def judge_pairs(judge: PixelJudge, pictures: np.ndarray, scenes: list[world.Scene]) -> float:
    """Share of pictures in which both things have their caption's colours, each on its side."""
    right = []
    for picture, scene in zip(pictures, scenes, strict=True):
        seen = [judge.colour(picture, scene, which) for which in (0, 1)]
        right.append(seen == [thing.colour for thing in scene.things])
    return round(float(np.mean(right)), 4)


def call_of(model: str) -> dict[str, Any]:
    """What the model's pipeline is called with, by the preset that runs have."""
    preset = presets.embedded({"pretrained_model_name_or_path": model}, RunConfig.PRESET)
    call = {"num_inference_steps": preset["num_inference_steps"], "guidance_scale": preset["sample_guidance_scale"]}
    length = preset.get("max_sequence_length")
    return call | dict.fromkeys(("height", "width"), world.SIZE) | ({"max_sequence_length": length} if length else {})


def sample(pipeline: Any, call: dict[str, Any], captions: list[str], seed: int, batch: int = 32) -> np.ndarray:
    """One picture per caption: (n, 64, 64, 3)."""
    images: list[Image.Image] = []
    for start in range(0, len(captions), batch):
        generators = [
            torch.Generator().manual_seed(seed + start + i) for i in range(len(captions[start : start + batch]))
        ]
        images += pipeline(captions[start : start + batch], generator=generators, **call).images
    return to_array(images)


@torch.no_grad()
def reconstruct(pipeline: Any, pictures: np.ndarray, batch: int = 32) -> np.ndarray:
    """The autoencoder's version of the pictures, 0 to 255."""
    outputs = []
    for start in range(0, len(pictures), batch):
        pixels = to_tensor(pictures[start : start + batch])
        outputs.append(pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1))
    return ((torch.cat(outputs).permute(0, 2, 3, 1) + 1) * 127.5).numpy()


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio, dB."""
    errors = np.square(first - second).mean((1, 2, 3))
    return round(float((10 * np.log10(255**2 / errors)).mean()), 2)


@torch.no_grad()
def clip_retrieval(pictures: np.ndarray, captions: list[str], group: int = GROUP) -> float:
    """How often a picture's own caption is the most similar of `group` captions (equal captions count as own)."""
    model, words = CLIPModel.from_pretrained(clip_path()).eval(), CLIPTokenizer.from_pretrained(clip_path())
    hits = []
    for start in range(0, len(captions) - group + 1, group):
        texts = captions[start : start + group]
        tokens = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        scores = model(input_ids=tokens, pixel_values=to_tensor(pictures[start : start + group])).logits_per_image
        hits += [texts[best] == text for best, text in zip(scores.argmax(1).tolist(), texts, strict=True)]
    return round(float(np.mean(hits)), 4)


# ---- output ---------------------------------------------------------------------------------------------------------


def contact_sheet(path: Path, pictures: np.ndarray, captions: list[str], columns: int = 8, zoom: int = 2) -> None:
    """Samples with their captions below, as PNG."""
    tile, text_height = world.SIZE * zoom, 34
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * (tile + 4), rows * (tile + text_height)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * (tile + 4), i // columns * (tile + text_height)
        image = Image.fromarray(picture.round().astype(np.uint8))
        sheet.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        for row, line in enumerate(_wrap(caption.removeprefix("a photo of "), 22)[:3]):
            draw.text((x + 2, y + tile + 1 + 11 * row), line, fill=(0, 0, 0))
    sheet.save(path)


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def measure(model: str, count: int, pairs: int, classifier_pictures: int, folder: Path) -> dict:
    """All figures; the contact sheets go to `folder`."""
    pipeline, call = DiffusionPipeline.from_pretrained(pipeline_path(model)), call_of(model)
    pipeline.set_progress_bar_config(disable=True)
    judge, classifier = PixelJudge(), train_classifier(classifier_pictures)
    rng = random.Random(2026)
    singles = [world.sample_scene(rng, held_out=True) for _ in range(count)]
    doubles = [world.sample_pair(rng, held_out=True) for _ in range(pairs)]
    captions, pair_captions = ([world.describe(scene) for scene in scenes] for scenes in (singles, doubles))
    real, real_pairs = (to_array([world.render(scene, rng) for scene in scenes]) for scenes in (singles, doubles))
    figures = [subjects.render(name, i, "holdout")[0] for name in subjects.SUBJECTS for i in range(32)]
    decoded = reconstruct(pipeline, real)
    start = time.perf_counter()
    made = sample(pipeline, call, captions, seed=0)
    seconds = time.perf_counter() - start
    made_pairs = sample(pipeline, call, pair_captions, seed=10_000)
    contact_sheet(folder / f"{file_name(model)}_samples.png", made[:64], captions[:64])
    contact_sheet(folder / f"{file_name(model)}_pairs.png", made_pairs[:32], pair_captions[:32])
    scores = judge_singles(judge, classifier, made, singles)
    figures_array = to_array(figures)
    results = {name: scores[name] for name in ("colour", "colour_by_pixels", "background", "class")}
    results |= {
        "pair_colours": judge_pairs(judge, made_pairs, doubles),
        "psnr_held_out": psnr(real, decoded),
        "psnr_subjects": psnr(figures_array, reconstruct(pipeline, figures_array)),
        "clip_retrieval_at_1": clip_retrieval(real, captions),
    }
    bounds = {
        "real": judge_singles(judge, classifier, real, singles),
        "reconstructed": judge_singles(judge, classifier, decoded, singles),
        "real_pair_colours": judge_pairs(judge, real_pairs, doubles),
    }
    extra = {"class_by_kind": scores["class_by_kind"], "seconds_per_sample": round(seconds / count, 3)}
    return {"results": results, **extra, "bounds": bounds}


def file_name(model: str) -> str:
    """Where the figures of a model stand, and how those of its pictures begin."""
    return f"{model.replace('-', '_')}_quality"


def table(found: Mapping[str, dict]) -> str:
    """As in docs/embedded-model.md.

    Args:
        found: what was measured of every model, by its name; bounds are the same for all, and the first's are told.
    """
    results = [of["results"] for of in found.values()]
    first, bounds = results[0], next(iter(found.values()))["bounds"]
    real, decoded = bounds["real"], bounds["reconstructed"]
    nothing = [""] * len(results)
    rows = [["Judged", *(f"`{model}`" for model in found), "Real renders", "Their reconstructions"]]
    rows.append(["---"] * len(rows[0]))
    for title, key in JUDGED.items():
        rows.append([title, *(_percent(of[key]) for of in (*results, real, decoded))])
    pairs = [_percent(of["pair_colours"]) for of in results]
    rows.append(["both colours of two things on the right sides, by pixels", *pairs])
    rows[-1] += [_percent(bounds["real_pair_colours"]), ""]
    restored = f"{first['psnr_held_out']:.1f} dB, {first['psnr_subjects']:.1f} dB"
    rows.append(["reconstruction: held-out pictures, subjects", *nothing, "", restored])
    retrieved = _percent(first["clip_retrieval_at_1"])
    rows.append([f"the CLIP finds the caption of a picture among {GROUP}", *nothing, retrieved, ""])
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def main() -> None:
    """Parse the flags, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tiny.MODELS, default="tiny")
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--classifier_pictures", type=int, default=CLASSIFIER_PICTURES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=_machine.RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    measured = measure(options.model, options.captions, options.pairs, options.classifier_pictures, options.output)
    passed = {name: measured["results"][name] >= target for name, target in TARGETS.items()}
    settings = {"captions": options.captions, "pairs": options.pairs, **call_of(options.model)}
    report = {"command": _machine.command("tiny_quality.py"), "settings": settings, **measured}
    report |= {"targets": TARGETS, "passed": passed, "machine": _machine.describe(options.threads)}
    _machine.write(file_name(options.model), report, options.output)
    print(json.dumps({"results": measured["results"], "passed": passed}, indent=2))
    files = {model: options.output / f"{file_name(model)}.json" for model in tiny.MODELS}
    print(
        table({model: json.loads(file.read_text(encoding="utf-8")) for model, file in files.items() if file.exists()})
    )


if __name__ == "__main__":
    _cli.start(main)
