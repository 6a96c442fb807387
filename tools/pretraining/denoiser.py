"""Stage `unet`: the text encoder and the UNet, trained together on latents encoded beforehand."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreamlora.tiny import world
from pretraining import autoencoder, data, tokenizer
from pretraining.optim import PretrainingRecipe, PretrainingRun

WIDTHS = (64, 96, 128)  # at 16x16 (no attention), 8x8 and 4x4 latents
TEXT_WIDTH, TEXT_LAYERS = 96, 3
BATCH = 32
MUON_LR, ADAMW_LR = 3.6e-3, 1.2e-3
CAPTION_DROP = 0.1  # for classifier-free guidance
PAIRS_AFTER = 0.2  # of the time: first single things, then two


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule with zero terminal SNR, which lets dark and light backgrounds come out right."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder for the tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.MAX_LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet: convolutions alone at 16x16, cross-attention below."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # diffusers reads this as the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
    )


@torch.no_grad()
def encode_dataset(folder: Path, device: torch.device, batch: int = 64) -> None:
    """Stage `latents`: write the standardised latents of captioned.npy as latents.pt (float16, (n, 4, 16, 16))."""
    model = autoencoder.load_standardised(folder).to(device)
    pictures = data.load_pictures(folder, "captioned")
    latents = torch.empty(len(pictures), 4, 16, 16, dtype=torch.float16)
    for start in range(0, len(pictures), batch):
        pixels = data.to_tensor(pictures[start : start + batch]).to(device)
        latents[start : start + batch] = autoencoder.encode(model, pixels).half().cpu()
    torch.save(latents, folder / "latents.pt")


@dataclass
class Noising:
    """Draws times and noise; predicts nothing itself."""

    alphas_cumprod: torch.Tensor

    def __call__(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, times (n,), and the v target sqrt(a) noise - sqrt(1 - a) latents."""
        count, steps = len(latents), len(self.alphas_cumprod)
        strata = (torch.arange(count, device=latents.device) + torch.rand(count, device=latents.device)) / count
        times = (strata * steps).long().clamp(max=steps - 1)  # one time per stratum: a less noisy loss
        alpha = self.alphas_cumprod[times].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - self.alphas_cumprod[times]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        return alpha * latents + sigma * noise, times, alpha * noise - sigma * latents


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, so that they share an optimizer, an average and a checkpoint."""

    def __init__(self, words: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder, self.unet = build_text_encoder(words), build_unet()

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The predicted v, (n, 4, 16, 16)."""
        return self.unet(noisy, times, self.text_encoder(tokens)[0], return_dict=False)[0]


class Captions:
    """Freshly worded captions, and their token ids."""

    def __init__(self, scenes: list[world.Scene], words: CLIPTokenizer, seed: int) -> None:
        self.scenes, self.rng, self.words = scenes, random.Random(seed), words

    def __call__(self, indices: list[int]) -> torch.Tensor:
        """(n, MAX_LENGTH) ids."""
        texts = self.words_of(indices)
        return self.words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def words_of(self, indices: list[int]) -> list[str]:
        """The captions; CAPTION_DROP of them are empty."""
        return ["" if self.rng.random() < CAPTION_DROP else world.describe(self.scenes[i], self.rng) for i in indices]


def train(folder: Path, minutes: float, device: torch.device) -> None:
    """Train for `minutes`; checkpoint (and resume) as unet.pt in `folder`."""
    torch.manual_seed(0)
    words = tokenizer.build()
    latents, scenes = torch.load(folder / "latents.pt", weights_only=True), data.load_scenes(folder)
    run = PretrainingRun(
        Denoiser(words), PretrainingRecipe("unet", minutes, MUON_LR, ADAMW_LR, decay=0.999), folder, device
    )
    captions, noising = Captions(scenes, words, run.step), Noising(scheduler().alphas_cumprod.to(device))
    singles = torch.tensor([i for i, scene in enumerate(scenes) if scene.relation is None])
    while run.unfinished:
        early = run.budget.progress < PAIRS_AFTER
        chosen = singles[torch.randint(len(singles), (BATCH,))] if early else torch.randint(len(latents), (BATCH,))
        noisy, times, target = noising(latents[chosen].to(device).float())
        run.update(F.mse_loss(run.model(noisy, times, captions(chosen.tolist()).to(device)), target))
