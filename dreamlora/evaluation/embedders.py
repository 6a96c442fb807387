"""Which encoder serves which metric, loaded when first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dreamlora.config import EMBEDDED_MODEL, Encoders
from dreamlora.data.cache import TensorCache
from dreamlora.errors import UserError
from dreamlora.evaluation.embed import ALONE, Embedder, Processes
from dreamlora.evaluation.encoders import load_encoder
from dreamlora.evaluation.inception import load_inception
from dreamlora.interfaces import Encoder, EncoderRole
from dreamlora.models.parts import give_back_memory

CLIP_MODEL = "openai/clip-vit-base-patch32"
DINO_MODEL = "facebook/dino-vits16"


@dataclass(frozen=True)
class EncoderPlace:
    """Where encoders compute, and where things are kept.

    Attributes:
        device: of the encoders.
        cache: of the vectors.
        downloads: folder of the hub's files; None: the hub's own.
        processes: that share the work.
        progress: show bars.
    """

    device: torch.device
    cache: TensorCache
    downloads: Path | None = None
    processes: Processes = ALONE
    progress: bool = True


class Embedders:
    """The embedder for every role; roles with the same model share one.

    Args:
        choice: the options.
        embedded: whether an embedded model is measured: their CLIP then serves for whatever the options leave open.
        place: see there.
    """

    def __init__(self, choice: Encoders, embedded: bool, place: EncoderPlace) -> None:
        self._names: dict[EncoderRole, str | Path] = {
            "clip": choice.clip_model or (EMBEDDED_MODEL if embedded else CLIP_MODEL),
            "dino": choice.dino_model or (EMBEDDED_MODEL if embedded else DINO_MODEL),
        }
        self._names["features"] = choice.inception_weights or self._names["dino"]
        self._place = place
        self._loaded: dict[str | Path, Embedder] = {}

    def __call__(self, role: EncoderRole) -> Embedder:
        """The embedder for ``role``.

        Raises:
            UserError: its encoder cannot be loaded, or knows no texts and is to embed them.
        """
        name = self._names[role]
        if name not in self._loaded:
            place = self._place
            encoder = place.processes.together(lambda: self._load(name))
            self._loaded[name] = Embedder(encoder, place.cache, place.processes, place.progress)
        self._loaded[name].encoder.to(self._place.device)
        if role == "clip":
            self._loaded[name].encoder.texts([])  # now, with its message, rather than in the middle of the metrics
        return self._loaded[name]

    def put_away(self) -> None:
        """Keep the models in the computer's memory until they are asked for again."""
        for embedder in self._loaded.values():
            embedder.encoder.to(torch.device("cpu"))
        give_back_memory()

    def free(self) -> None:
        """Forget the models: their memory is free, and they are loaded anew when asked for."""
        self._loaded.clear()

    def _load(self, name: str | Path) -> Encoder:
        if isinstance(name, Path):
            return load_inception(name, self._place.device)
        try:
            return load_encoder(name, self._place.device, self._place.downloads)
        except UserError as error:
            flag = "--clip_model" if name == self._names["clip"] else "--dino_model"
            raise UserError(f"{flag}: {error}") from error
