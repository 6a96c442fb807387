"""``--init_lora``: what is asked for besides, and what becomes of the LoRA that training goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dreamlora.config import Lora, RunConfig
from dreamlora.errors import UserError
from dreamlora.interfaces import Family, ModelSource
from dreamlora.lora.applying import weights_for
from dreamlora.lora.continuing import Predecessor, Resized, fresh, resized, with_magnitudes
from dreamlora.lora.embeddings import digest_of, files_beside, read_all
from dreamlora.lora.files import read_lora
from dreamlora.lora.names import names_of
from dreamlora.lora.targets import alpha_of, layer_names, rank_of, wanted_layers
from dreamlora.lora.weights import LayerWeights
from dreamlora.models.adapter import content_of, find_adapter
from dreamlora.models.inventory import PartFiles, empty_part
from dreamlora.models.loading import read_settings
from dreamlora.processes import main_first
from dreamlora.randomness import generator
from dreamlora.run.context import RunContext

RANKS = ("rank", "rank_pattern", "text_encoder_rank")
SCALES = ("lora_alpha", "alpha_pattern", "use_rslora")
LAYERS = ("lora_layers", "lora_blocks")
FROM_FILE = ("adapter", *RANKS, *SCALES, *LAYERS)
"""Options that are as the file has it where they are not given."""
_PRODUCTS = ("loha", "lokr")
"""Adapters whose factors cannot be given another rank."""


def predecessor_of(
    config: RunConfig, family: Family, source: ModelSource, parts: Sequence[PartFiles]
) -> Predecessor | None:
    """The LoRA of ``--init_lora``, as it fits the model; None: there is none.

    Raises:
        UserError: it cannot be read, is for another model, or a part of it would not be trained.
    """
    if config.lora.init_lora is None:
        return None
    with main_first():
        found = find_adapter(
            config.lora.init_lora, config.lora.init_lora_weight_name, config.model.cache_dir, "--init_lora"
        )
        file = read_lora(found).path
    trained = [family.DENOISER, *(family.TEXT_ENCODERS if config.lora.train_text_encoder else ())]
    modules: dict[str, Any] = {name: empty_part(parts, name) for name in (family.DENOISER, *family.TEXT_ENCODERS)}
    pipeline = family.pipeline({**modules, "settings": read_settings(source, family.SETTINGS)})
    adapters = weights_for(pipeline, file, names_of(family, modules[family.DENOISER].config))
    others = [name for name in adapters if name not in trained]
    if others:
        remedy = "give --train_text_encoder" if family.TEXT_ENCODERS else "only the denoiser is trained here"
        raise UserError(f"--init_lora: {file} is for the {others[0]} too, and that would be lost: {remedy}")
    beside = files_beside(file)
    embeddings = {each.token: each.vectors for each in read_all(beside, family.EMBEDDING_KEYS)}
    content = digest_of([file, *beside]) if beside else content_of(file)
    predecessor = Predecessor(file, content, adapters, embeddings)
    _check_kind(config, predecessor)
    _check_tokens(config, predecessor)
    return predecessor


def _check_tokens(config: RunConfig, predecessor: Predecessor) -> None:
    asked = {new.token: new.vectors for new in config.tokens.tokens}
    for token, vectors in predecessor.embeddings.items():
        count = len(next(iter(vectors.values())))
        remedy = f"give --new_tokens {token}" + (f":{count}" if count > 1 else "")
        if token not in asked:
            raise UserError(
                f"--init_lora: {predecessor.file} has embeddings of the new token {token} too, and these would be "
                f"lost: {remedy}"
            )
        if asked[token] != count:
            raise UserError(
                f"--init_lora: {predecessor.file} has {count} embeddings of the new token {token}, and --new_tokens "
                f"asks for {asked[token]}: {remedy}"
            )


def _check_kind(config: RunConfig, predecessor: Predecessor) -> None:
    lora, (kind, *others) = config.lora, sorted(predecessor.kinds)
    if others:
        raise UserError(
            f"--init_lora: {predecessor.file} has several kinds of adapters ({', '.join([kind, *others])}), and one is "
            "trained at a time"
        )
    if "adapter" in config.given and lora.adapter != kind:
        raise UserError(f"--adapter {lora.adapter}: --init_lora {predecessor.file} is a {kind}; leave --adapter out")
    if lora.adapter_args:
        raise UserError("--adapter_args: with --init_lora the adapter is made as its file has it; leave them out")
    asked = sorted(config.given & {*RANKS, *SCALES})
    if kind in _PRODUCTS and asked:
        raise UserError(f"--{asked[0]}: --init_lora {predecessor.file} is a {kind}, which keeps its own")


def settled(config: RunConfig, predecessor: Predecessor) -> RunConfig:
    """The options with what the file decides: kind, and the rank and alpha of most of its layers."""
    lora, given = config.lora, config.given
    [kind] = predecessor.kinds
    rank = lora.rank if given & set(RANKS) else predecessor.rank
    alpha = lora.lora_alpha if given & set(SCALES) else predecessor.scale * rank
    return replace(config, lora=replace(lora, adapter=kind, rank=rank, lora_alpha=alpha))


def layers_of(config: RunConfig, family: Family, predecessor: Predecessor, name: str, module: nn.Module) -> list[str]:
    """Names of the layers of a part that are trained: the file's, and those that are asked for besides.

    Raises:
        UserError: the file has others than are asked for, or its kind cannot begin in those that are new.
    """
    there = predecessor.adapters.get(name, {})
    wanted = _wanted(config, family, name, module, bool(there))
    lost = [layer for layer in there if layer not in set(wanted)] if wanted else []
    if lost:
        raise UserError(
            f"--init_lora: {predecessor.file} has {len(lost)} layers that --lora_layers and --lora_blocks do not "
            f"name, such as {lost[0]}, and these would be lost: name them too, or leave both out for those of the file"
        )
    for layer in wanted:
        grouped = getattr(module.get_submodule(layer), "groups", 1) > 1
        if layer not in there and (grouped or config.lora.adapter in _PRODUCTS):
            raise UserError(
                f"--init_lora: {predecessor.file} has nothing for {name}.{layer}, and no {config.lora.adapter} can "
                "begin there: train the layers of the file alone"
            )
    return wanted or list(there)


def _wanted(config: RunConfig, family: Family, name: str, module: nn.Module, there: bool) -> list[str]:
    """Names of the layers of a part that are asked for; empty: those of the file."""
    if name != family.DENOISER:
        return [] if there else layer_names(module, family.TEXT_LORA_LAYERS)
    if there and not config.given & set(LAYERS):
        return []
    return layer_names(module, wanted_layers(config.lora, family), config.lora.lora_blocks)


def weights_of(context: RunContext, name: str, module: Any) -> tuple[dict[str, LayerWeights], list[str]]:
    """What a part begins with, by layer; and the names of the layers that are new.

    Args:
        context: with a predecessor.
        name: of the part.
        module: without adapters.

    Raises:
        UserError: see ``layers_of``.
    """
    config, predecessor = context.config, context.predecessor
    assert predecessor is not None
    there = predecessor.adapters.get(name, {})
    begun: dict[str, LayerWeights] = {}
    cut: list[Resized] = []
    layers = layers_of(config, context.family, predecessor, name, module)
    for layer in layers:
        draw = generator(config.train.seed, "init_lora", name, layer)
        if layer in there:
            cut.append(_asked(config, context.family, name, layer, there[layer], draw))
            begun[layer] = cut[-1].weights
        else:
            begun[layer] = _new(_options(config, context.family, name), name, layer, module, draw)
    lost, energy = sum(each.lost for each in cut), sum(each.all for each in cut)
    if lost:
        context.warn(
            f"--init_lora: the ranks that are asked for hold {1 - lost / energy:.2%} of the {name}'s LoRA (by the "
            "squares of its changes): the rest is left out"
        )
    return begun, [layer for layer in layers if layer not in there]


def _asked(
    config: RunConfig, family: Family, name: str, layer: str, weights: LayerWeights, draw: torch.Generator
) -> Resized:
    """A layer of the file, with the rank and alpha that are given."""
    if not config.given & {*RANKS, *SCALES}:
        return Resized(weights.in_precision(torch.float32))
    lora = _options(config, family, name)
    rank = rank_of(lora, name, layer) if config.given & set(RANKS) else len(weights.down)
    scale = lora.scale(rank, alpha_of(lora, name, layer)) if config.given & set(SCALES) else weights.scale
    return resized(weights, rank, scale, draw)


def _new(lora: Lora, name: str, layer: str, module: Any, draw: torch.Generator) -> LayerWeights:
    rank = rank_of(lora, name, layer)
    begun = fresh(module.get_submodule(layer), rank, lora.scale(rank, alpha_of(lora, name, layer)), draw)
    return with_magnitudes(begun, module.get_submodule(layer)) if lora.adapter == "dora" else begun


def _options(config: RunConfig, family: Family, name: str) -> Lora:
    """What is given for a part."""
    return config.lora if name == family.DENOISER else config.lora.of_text_encoder
