"""Encoders: the embedded CLIP, and any CLIP, SigLIP, DINO or DINOv2 from a folder or the hub, through transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from dreamlora import tiny
from dreamlora.config import EMBEDDED_MODEL
from dreamlora.errors import UserError
from dreamlora.evaluation.preprocessing import DINO, Picture, Preprocessing, read_preprocessing
from dreamlora.interfaces import Classes
from dreamlora.models.building import CONFIG, Form, building, load_module
from dreamlora.models.configs import read_config
from dreamlora.models.fetching import Place, commit_of, identity
from dreamlora.models.loading import check_vocabulary
from dreamlora.models.tokenizer import load_tokenizer, tokenizer_class
from dreamlora.reading import shortened

logger = logging.getLogger(__name__)

BATCH = 16


@dataclass(frozen=True)
class EncoderKind:
    """A type of model, by ``model_type`` of its config.json.

    Attributes:
        class_name: in transformers.
        tokenizers: that it can have; some: it embeds texts in the same space.
        options: for its ``from_pretrained``.
        keeps_proportions: what a size given as one number means in its old preprocessor_config.json.
        preprocessing: instead of what is written there.
    """

    class_name: str
    tokenizers: Classes = ()
    options: tuple[tuple[str, Any], ...] = ()
    keeps_proportions: bool = False
    preprocessing: Preprocessing | None = None

    @property
    def texts(self) -> bool:
        """Whether it embeds texts."""
        return bool(self.tokenizers)


_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_SIGLIP_TOKENIZERS = ("SiglipTokenizer", "GemmaTokenizer", "GemmaTokenizerFast", *_CLIP_TOKENIZERS)

KINDS = {
    "clip": EncoderKind("CLIPModel", _CLIP_TOKENIZERS, keeps_proportions=True),
    "siglip": EncoderKind("SiglipModel", _SIGLIP_TOKENIZERS),
    # A pooler that the weights lack would be made of random numbers.
    "vit": EncoderKind("ViTModel", options=(("add_pooling_layer", False),), preprocessing=DINO),
    "dinov2": EncoderKind("Dinov2Model", keeps_proportions=True),
    "dinov2_with_registers": EncoderKind("Dinov2WithRegistersModel", keeps_proportions=True),
}


def load_encoder(name: str, device: torch.device, cache_dir: Path | None = None) -> TransformersEncoder:
    """The encoder called ``name``, frozen, in float32; random states are left as they were.

    Args:
        name: a folder written by ``save_pretrained``, a hub repository, or "tiny" for the embedded CLIP, the only one:
            the other embedded models' names stand for it as well.
        device: where it computes.
        cache_dir: where downloads are kept.

    Raises:
        UserError: it cannot be found or read, has no safetensors, or is of no supported type.
    """
    if name in tiny.MODELS:
        name, path = EMBEDDED_MODEL, str(tiny.clip_path())
    else:
        path = name
    place = Place(path, commit_of(path, CONFIG, None, cache_dir), cache_dir)
    model_type = read_config(place.file(CONFIG)).get("model_type")
    kind = KINDS.get(model_type) if isinstance(model_type, str) else None
    if kind is None:
        raise UserError(
            f"{name} is of type {shortened(model_type)}, which is no supported encoder: choose a {', '.join(KINDS)}"
        )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model = _model(kind, place).to(device)
    preprocessing = kind.preprocessing or _preprocessing(kind, place)
    tokenizer = _tokenizer(kind, place) if kind.texts else None
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.text_model, path)
    model_id = identity(name, path, place.commit)
    pooling = "projection" if kind.texts else "cls"
    return TransformersEncoder(f"{model_id}/{preprocessing.id}/{pooling}", model, preprocessing, tokenizer)


class TransformersEncoder:
    """A model of transformers as :class:`~dreamlora.interfaces.Encoder`.

    Args:
        encoder_id: see there.
        model: frozen, in eval mode.
        preprocessing: of images.
        tokenizer: of texts; None: it knows no texts, and an image's vector is that of the class token.
    """

    def __init__(self, encoder_id: str, model: nn.Module, preprocessing: Preprocessing, tokenizer: Any | None) -> None:
        self.id = encoder_id
        self._model = model
        self._preprocessing = preprocessing
        self._tokenizer = tokenizer
        self._seen: set[str] = set()
        self.dim = self._length()

    def images(self, images: Sequence[Picture]) -> Tensor:
        """Vectors ``[n, dim]`` float32 on the CPU, not normalised.

        Raises:
            TypeError: not PIL images or uint8 arrays ``[H, W, 3]``.
        """
        parts = [self._images(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, self.dim)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Vectors ``[n, dim]`` float32 on the CPU, not normalised.

        A prompt with too many tokens is cut by the tokenizer, which keeps the end token; CLIP reads the whole text
        there. Says once how many were cut.

        Raises:
            UserError: this encoder knows no texts.
        """
        if self._tokenizer is None:
            raise UserError(f"the encoder {self.id} knows no texts: a CLIP or SigLIP model is needed (--clip_model)")
        self._warn_of_cuts(prompts)
        parts = [self._texts(list(prompts[start : start + BATCH])) for start in range(0, len(prompts), BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, self.dim)

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self._model.to(device)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _images(self, images: Sequence[Picture]) -> Tensor:
        pixels = self._preprocessing(images).to(self._device)
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            if self._tokenizer is not None:
                return _vectors(self._model.get_image_features(pixel_values=pixels))  # type: ignore[operator]
            hidden: Tensor = self._model(pixel_values=pixels).last_hidden_state
            return hidden[:, 0].float().cpu()

    def _texts(self, prompts: list[str]) -> Tensor:
        assert self._tokenizer is not None
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self._most_tokens(), return_tensors="pt"
        )
        # No attention mask: CLIP reads nothing behind the end token, and SigLIP was trained to read the padding.
        token_ids = tokens.input_ids.to(self._device)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return _vectors(self._model.get_text_features(input_ids=token_ids))  # type: ignore[operator]

    def _most_tokens(self) -> int:
        most: int = self._model.config.text_config.max_position_embeddings  # type: ignore[union-attr,assignment]
        return most

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        assert self._tokenizer is not None
        most = self._most_tokens()
        new = set(prompts) - self._seen
        self._seen |= new
        cut = sum(len(self._tokenizer(prompt, verbose=False).input_ids) > most for prompt in new)
        if cut:
            logger.warning("%d of %d prompts have more than %d tokens: their ends do not count", cut, len(new), most)

    def _length(self) -> int:
        config: Any = self._model.config
        if self._tokenizer is None:
            return int(config.hidden_size)
        return int(getattr(config, "projection_dim", None) or config.vision_config.hidden_size)


def _vectors(output: Any) -> Tensor:
    """transformers 5 gives an output whose ``pooler_output`` is the projected vector, transformers 4 the vector."""
    vectors: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return vectors.float().cpu()


def _model(kind: EncoderKind, place: Place) -> Any:
    model_class = getattr(transformers, kind.class_name, None)
    if model_class is None:
        raise UserError(
            f"{place.path} needs {kind.class_name}, which the installed transformers does not have: update it"
        )
    disable_progress_bar()
    return load_module(model_class, place, Form(torch.float32, options=dict(kind.options)))


def _tokenizer(kind: EncoderKind, place: Place) -> Any:
    name = tokenizer_class(place) or kind.tokenizers[0]
    if name not in kind.tokenizers:
        raise UserError(
            f"{place}: {shortened(name)} is named as the class of the tokenizer, where {' or '.join(kind.tokenizers)} "
            "is expected: use another encoder, or save this one with such a tokenizer"
        )
    part_class = getattr(transformers, name)
    with building(part_class, place):
        return load_tokenizer(part_class, place)


def _preprocessing(kind: EncoderKind, place: Place) -> Preprocessing:
    try:
        file = place.file("preprocessor_config.json")
    except UserError as error:
        try:
            file = place.file("processor_config.json")  # as transformers 5 saves processors
        except UserError:
            raise error from None
    return read_preprocessing(file, kind.keeps_proportions)
