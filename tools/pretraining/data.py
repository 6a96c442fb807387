"""Rendered pictures on disk, so that training never waits for Pillow."""

import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dreamlora.tiny import world

PAIR_SHARE = 0.2  # of the captioned pictures that hold two things
CHUNK = 1000  # pictures per rendering job


def _render_chunk(seed: int, abstract: bool) -> tuple[np.ndarray, list[world.Scene]]:
    """CHUNK pictures (CHUNK, 64, 64, 3) and their scenes (none for abstract ones)."""
    rng = random.Random(seed)
    scenes: list[world.Scene] = []
    pictures = np.empty((CHUNK, world.SIZE, world.SIZE, 3), np.uint8)
    for i in range(CHUNK):
        if abstract:
            pictures[i] = np.asarray(world.abstract(rng))
            continue
        scenes.append(world.sample_pair(rng) if rng.random() < PAIR_SHARE else world.sample_scene(rng))
        pictures[i] = np.asarray(world.render(scenes[-1], rng))
    return pictures, scenes


def render_dataset(folder: Path, captioned: int, abstract: int, seed: int = 0, workers: int = 2) -> None:
    """Write captioned.npy, abstract.npy (uint8 (n, 64, 64, 3)) and scenes.pkl into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes: list[world.Scene] = []
    for name, count, first_seed in (("captioned", captioned, seed), ("abstract", abstract, seed + 1_000_000)):
        path = folder / f"{name}.npy"
        shape = (count // CHUNK * CHUNK, world.SIZE, world.SIZE, 3)
        pictures = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        seeds = range(first_seed, first_seed + shape[0] // CHUNK)
        with ProcessPoolExecutor(workers) as pool:
            for i, (chunk, described) in enumerate(pool.map(_render_chunk, seeds, [name == "abstract"] * len(seeds))):
                pictures[i * CHUNK : (i + 1) * CHUNK] = chunk
                scenes += described
        pictures.flush()
    (folder / "scenes.pkl").write_bytes(pickle.dumps(scenes))


def load_pictures(folder: Path, name: str) -> np.ndarray:
    """The memory-mapped pictures that `render_dataset` wrote: uint8 (n, 64, 64, 3)."""
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def load_scenes(folder: Path) -> list[world.Scene]:
    """The scenes of captioned.npy, in order (a file this package wrote itself, hence the pickle)."""
    return pickle.loads((folder / "scenes.pkl").read_bytes())


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) -> float (n, 3, 64, 64) in [-1, 1], the range of diffusers models."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def held_out_pictures(count: int, seed: int = 7, pairs: bool = False) -> tuple[torch.Tensor, list[world.Scene]]:
    """Pictures (count, 3, 64, 64) of held-out triples, and their scenes."""
    rng = random.Random(seed)
    scenes = [(world.sample_pair if pairs else world.sample_scene)(rng, held_out=True) for _ in range(count)]
    return to_tensor(np.stack([np.asarray(world.render(scene, rng)) for scene in scenes])), scenes
