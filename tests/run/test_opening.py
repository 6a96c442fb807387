"""What a run finds out before it has its folder and its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dreamlora.cli.parse import parse_run
from dreamlora.errors import UserError
from dreamlora.run import opening
from tests import tinymodels


def changed(folder: Path, file: str, **values: Any) -> Path:
    """The model with other values in a configuration."""
    config = folder / file
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | values), encoding="utf-8")
    return folder


GUIDED = [
    ("flux", "transformer/config.json", {"guidance_embeds": True}, {"guidance_scale"}),
    ("flux", "transformer/config.json", {"guidance_embeds": False}, set()),
    ("flux2-dev", "transformer/config.json", {"guidance_embeds": True}, {"guidance_scale"}),
    ("flux2", "model_index.json", {"is_distilled": False}, {"negative_prompt"}),
    ("flux2", "model_index.json", {"is_distilled": True}, set()),
]


@pytest.mark.parametrize(("name", "file", "values", "counts"), GUIDED)
def test_guidance_that_one_of_a_family_s_models_has_not_is_told(name, file, values, counts, tmp_path: Path) -> None:
    """FLUX.1-schnell has no guidance embedding, of FLUX.2 only the base [klein] takes negative prompts."""
    tiny = tinymodels.of(name)
    folder = changed(tiny.save(tmp_path), file, **values)
    flags = f"--pretrained_model_name_or_path {folder} --instance_data_dir {tmp_path} --max_train_steps 2"
    flags += f" --guidance_scale 3 --negative_prompt x --resolution {tiny.side}"
    context = opening.begin(parse_run(flags.split())[0])
    assert {"guidance_scale", "negative_prompt"} & opening.own_options(context) == counts


def test_a_negative_prompt_at_a_guidance_that_is_off_is_told(tmp_path: Path) -> None:
    folder = tinymodels.of("sd").save(tmp_path)
    flags = f"--pretrained_model_name_or_path {folder} --instance_data_dir {tmp_path} --max_train_steps 2"
    for guidance, counts in (("1", False), ("2", True)):
        config = parse_run([*flags.split(), "--negative_prompt", "x", "--sample_guidance_scale", guidance])[0]
        assert ("negative_prompt" in opening.own_options(opening.begin(config))) is counts


@pytest.mark.parametrize(
    ("model", "more", "refused"),
    [
        ("sdxl", ["--train_text_encoder"], "with --train_text_encoder the text encoders"),
        ("sd", ["--new_tokens", "sks"], "with --new_tokens the text encoders"),
        ("sd", [], None),
        ("flux", ["--train_text_encoder"], None),  # T5 does not train
        ("lumina2", [], None),
    ],
)
def test_text_encoders_that_train_work_where_the_denoiser_does(
    model: str, more: list[str], refused: str | None, tiny_folder: Any, tmp_path: Path
) -> None:
    flags = f"--pretrained_model_name_or_path {tiny_folder(model)} --instance_data_dir {tmp_path} --max_train_steps 2"
    flags += f" --resolution {tinymodels.of(model).side} --text_encoder_device cpu"
    config = parse_run([*flags.split(), *more, "--instance_prompt", "a photo of sks dog"])[0]
    if refused is None:
        assert opening.begin(config).parts.text_device.type == "cpu"
    else:
        with pytest.raises(UserError, match="--text_encoder_device cpu: " + refused):
            opening.begin(config)
