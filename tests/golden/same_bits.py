"""Whether two checkouts compute the same: 30 steps on an SD and a FLUX model, in one process and in two, bit for bit.

    git worktree add ../before <commit>
    python tests/golden/same_bits.py ../before .

Run it on one machine, in one environment: another processor, torch or number of threads rounds otherwise. What is
compared: every tensor of the saved LoRA, every logged value but times, every item of the evaluations, every image.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.tinymodels import save_flux

NOT_COMPARED = ("train/steps_per_s", "system/")
"""Beginnings of the names of values that are another every time, or that not every version logs."""
_SETTINGS = re.compile(r"-[0-9a-f]{12}(?=\.png)")
"""What tells samples of other settings apart in their names; older versions had no such thing."""
COMMON = (
    "--max_train_steps 30 --sample_steps 15 --eval_steps 15 --seed 3 --final_eval_items 32 --checkpointing_steps 15"
)


def main() -> int:
    """Run everything in every checkout; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, help="the first one is what the others are compared with")
    parser.add_argument("--only", help="only the cases with this in their names, such as flux or two")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        cases = {name: flags for name, flags in _cases(Path(place)).items() if not options.only or options.only in name}
        digests = [
            {
                name: _digests(checkout.resolve(), name, flags, Path(place) / str(number))
                for name, flags in cases.items()
            }
            for number, checkout in enumerate(options.checkouts)
        ]
    different = 0
    for checkout, found in zip(options.checkouts[1:], digests[1:], strict=True):
        for name in cases:
            wrong = [
                key for key in sorted(digests[0][name].keys() | found[name].keys())
                if digests[0][name].get(key) != found[name].get(key)
            ]  # fmt: skip
            different += bool(wrong)
            told = f"{len(wrong)} differ: {', '.join(wrong[:12])}" if wrong else "the same"
            print(f"{checkout}: {name}: {len(found[name])} compared, {told}")
    return int(different > 0)


def _cases(place: Path) -> dict[str, list[str]]:
    """Flags by name; names that end in "two" are run by two processes."""
    photos = place / "photos"
    photos.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (8, 20, 24, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(photos / f"{number}.png")
    flux = save_flux(place / "flux")
    prior = ["--with_prior_preservation", "--class_prompt", "a dog", "--num_class_images", "4"]
    on_flux = [
        *f"--pretrained_model_name_or_path {flux} --instance_data_dir {photos} --resolution 16 --rank 2".split(),
        *("--instance_prompt", "a photo of sks dog", "--num_inference_steps", "2", "--learning_rate", "1e-2", *prior),
    ]
    cases = {
        "sd": [],
        "flux": on_flux,
        "sd, lora_muon, captions": ["--optimizer", "lora_muon", "--caption_dropout", "0.2"],
    }
    return {
        f"{name}, {processes}": [*COMMON.split(), *flags]
        for name, flags in cases.items()
        for processes in ("one", "two")
        if not (processes == "two" and "muon" in name)
    }


def _digests(checkout: Path, name: str, flags: list[str], place: Path) -> dict[str, str]:
    """A digest of everything that a run left behind."""
    folder = place / hashlib.sha256(f"{checkout} {name}".encode()).hexdigest()[:8]
    words = [str(checkout / "train_scripts" / "dreambooth_lora.py"), *flags, "--output_dir", str(folder / "run")]
    words += ["--latents_cache_dir", str(folder / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if name.endswith("two"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        launch = (
            f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}"
        )
        words = [*launch.split(), "--mixed_precision", "no", "--dynamo_backend", "no", *words]
        environment["ACCELERATE_USE_CPU"] = "true"
    folder.mkdir(parents=True)
    done = subprocess.run([sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {name} failed:\n{done.stderr[-3000:]}")
    return dict(_parts(folder / "run"))


def _parts(run: Path) -> list[tuple[str, str]]:
    found = [
        (f"{file.relative_to(run)}:{key}", hashlib.sha256(array.tobytes()).hexdigest())
        for file in sorted(run.rglob("pytorch_lora_weights.safetensors"))
        for key, array in load_file(file).items()
    ]
    found += [
        (_SETTINGS.sub("", str(f.relative_to(run))), hashlib.sha256(f.read_bytes()).hexdigest())
        for f in sorted(run.rglob("samples/*/*.png"))
    ]
    for file in sorted(run.glob("*.npz")):
        with np.load(file) as arrays:
            found += [(f"{file.name}:{key}", hashlib.sha256(arrays[key].tobytes()).hexdigest()) for key in arrays]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found += [
        (f"{row['name']}@{row['step']}", repr(row["value"])) for row in rows if not row["name"].startswith(NOT_COMPARED)
    ]
    return found


if __name__ == "__main__":
    sys.exit(main())
