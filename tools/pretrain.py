"""Pretrain the embedded model from nothing.

    python tools/pretrain.py --folder pretrain --stage render
    python tools/pretrain.py --folder pretrain --stage autoencoder --minutes 20 --threads 2
    ...

The stages of `tiny`, in order: render, autoencoder, latents, refine, unet, clip, export (`--stage all` runs them all).
`tiny-flow` is made of the finished `tiny`: render, flow_latents, t5, flow, guidance, flow_export (`--stage all_flow`).
A training stage ends its learning-rate decay after `--minutes` of wall time, checkpoints into `--folder` and resumes
from there. Every stage uses a GPU if there is one.
"""

import argparse
import logging
from pathlib import Path

import torch
from pretraining import autoencoder, clip, data, denoiser, export, flow, flow_export, t5

from dreamlora.tiny import clip_path, pipeline_path

TRAINERS = {
    "autoencoder": autoencoder.train,
    "refine": autoencoder.refine,
    "unet": denoiser.train,
    "clip": clip.train,
    "t5": t5.train,
    "flow": flow.train,
    "guidance": flow.distil,
}
# on one core of a 2026 server
MINUTES = {"autoencoder": 20.0, "refine": 20.0, "unet": 75.0, "clip": 20.0, "t5": 3.0, "flow": 75.0, "guidance": 20.0}
STAGES = {
    "all": ("render", "autoencoder", "latents", "refine", "unet", "clip", "export"),
    "all_flow": ("render", "flow_latents", "t5", "flow", "guidance", "flow_export"),
}


def run_stage(stage: str, options: argparse.Namespace, device: torch.device) -> None:
    """Run one stage."""
    if stage == "render":
        data.render_dataset(options.folder, options.captioned, options.abstract)
    elif stage == "latents":
        denoiser.encode_dataset(options.folder, device)
    elif stage == "flow_latents":
        flow.encode_dataset(options.folder, device)
    elif stage == "flow_export":
        flow_export.export_pipeline(options.folder, pipeline_path("tiny-flow"))
    elif stage == "export":
        if (options.folder / "unet.pt").exists():
            export.export_pipeline(options.folder, pipeline_path())
        if (options.folder / "clip.pt").exists():
            export.export_clip(options.folder, clip_path())
    else:
        TRAINERS[stage](options.folder, options.minutes or MINUTES[stage], device)


def main() -> None:
    """Parse the flags and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = dict.fromkeys(name for stages in STAGES.values() for name in stages)
    parser.add_argument("--stage", choices=(*names, *STAGES), default="all")
    parser.add_argument("--folder", type=Path, required=True, help="rendered pictures and checkpoints")
    parser.add_argument("--minutes", type=float, help="wall time of a training stage")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--captioned", type=int, default=100_000, help="captioned pictures to render")
    parser.add_argument("--abstract", type=int, default=20_000, help="uncaptioned pictures to render")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for stage in STAGES.get(options.stage, (options.stage,)):
        run_stage(stage, options, device)


if __name__ == "__main__":
    main()
