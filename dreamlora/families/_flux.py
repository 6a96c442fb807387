"""What FLUX.1, FLUX.2 and Chroma have in common."""

from __future__ import annotations

from dreamlora.families import _parts
from dreamlora.interfaces import Classes, ModelSource

T5: Classes = ("transformers.T5EncoderModel",)
LORA_LAYERS: tuple[str, ...] = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
LORA_PRESETS: dict[str, tuple[str, ...]] = _parts.lora_presets(
    LORA_LAYERS[:8], [*LORA_LAYERS[8:], "proj_mlp", "single_transformer_blocks.*.proj_out"]
)
prompt_limit = _parts.prompts_up_to(512)  # what the models were trained with; of T5 or of a chat, marks included


def resolution(source: ModelSource) -> int:
    """See ``Family.resolution``: the pipelines' default side is 128 latents, 1024 pixels with FLUX's autoencoders."""
    return 128 * _parts.pixels_per_latent(source)
