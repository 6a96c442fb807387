"""Stages `flow` and `guidance`: the transformer of `tiny-flow` and its T5, on latents of the embedded autoencoder.

`flow` trains rectified flow with dropped captions, while T5 goes on with what stage `t5` taught it. `guidance` then
teaches the transformer to do in one pass what classifier-free guidance does in two, with the scale as an input, as
FLUX.1-dev was made.
"""

import copy
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from dreamlora.families import _packed
from dreamlora.tiny import pipeline_path
from pretraining import data, flow_tokenizer, t5
from pretraining.denoiser import Captions
from pretraining.optim import PretrainingRecipe, PretrainingRun, read_average

HEADS, HEAD_WIDTH, DOUBLE, SINGLE = 5, 32, 2, 6
BATCH = 32
MUON_LR, ADAMW_LR = 3e-3, 1.5e-3
GUIDANCE_MUON_LR, GUIDANCE_ADAMW_LR = 1e-3, 5e-4
GUIDANCE = (1.0, 5.0)  # the scales that `guidance` teaches
PAIRS_AFTER = 0.1  # of the time: first single things alone, then
PAIRS = 0.6  # of the pictures with two: which colour belongs to which thing is learnt last
HOLD = 0.7  # share of the time before the learning rate falls
TIME_SPREAD = 1.2  # of the logits of the times
# Muon is meant for hidden matrices only; a modulation's are many small ones side by side; T5's attention it saturates.
NOT_FOR_MUON = ("embed", "norm", "transformer.proj_out", "t5.", "to_clip")
IMITATION = 0.2  # weight of the distance from CLIP's states of the words


def build_transformer() -> FluxTransformer2DModel:
    """An untrained transformer that predicts zero, each of its blocks the identity (as DiT starts)."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=t5.WIDTH,
        pooled_projection_dim=t5.CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


class FlowDenoiser(t5.Reader):
    """T5 and transformer as one module, so that they share an optimizer, an average and a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()

    def forward(
        self, noisy: Tensor, times: Tensor, tokens: Tensor, pooled: Tensor, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The predicted velocity, packed, (n, 64, 16), and CLIP's states of the words as guessed from T5's.

        Args:
            noisy: packed latents (n, 64, 16).
            times: (n,), 1 is noise.
            tokens: of the captions, (n, MAX_LENGTH).
            pooled: CLIP's summaries of them, (n, t5.CLIP_WIDTH).
            guidance: scales (n,).
        """
        dtype = self.transformer.dtype
        prompts, guessed = super().forward(tokens)
        velocity = self.transformer(
            noisy.to(dtype),
            encoder_hidden_states=prompts,
            pooled_projections=pooled.to(dtype),
            timestep=times.to(dtype),
            guidance=guidance.to(dtype),
            img_ids=_packed.image_ids(8, 8, noisy.device, dtype),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=noisy.device, dtype=dtype),
            return_dict=False,
        )[0]
        return velocity.float(), guessed


@torch.no_grad()
def encode_dataset(folder: Path, device: torch.device, batch: int = 64) -> None:
    """Stage `flow_latents`: write the embedded autoencoder's latents of captioned.npy as flow_latents.pt, packed."""
    vae = AutoencoderKL.from_pretrained(pipeline_path(), subfolder="vae", torch_dtype=torch.float32).to(device)
    pictures = data.load_pictures(folder, "captioned")
    latents = torch.empty(len(pictures), 64, 16, dtype=torch.float16)
    for start in range(0, len(pictures), batch):
        pixels = data.to_tensor(pictures[start : start + batch]).to(device)
        latents[start : start + batch] = _packed.pack(vae.encode(pixels).latent_dist.mode()).half().cpu()
    torch.save(latents, folder / "flow_latents.pt")


class Examples:
    """Batches without end: packed latents, and what `FlowDenoiser` takes for their captions."""

    def __init__(self, folder: Path, device: torch.device, seed: int) -> None:
        self.latents, self.scenes = torch.load(folder / "flow_latents.pt", weights_only=True), data.load_scenes(folder)
        paired = torch.tensor([scene.relation is not None for scene in self.scenes])
        self.pairs, self.singles = paired.nonzero()[:, 0], (~paired).nonzero()[:, 0]
        self.captions, self.texts = Captions(self.scenes, flow_tokenizer.build(), seed), t5.Texts(device)
        self.device = device

    def batch(self, pairs: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (n, 64, 16), and what `t5.Texts` reads from their captions.

        Args:
            pairs: share of the pictures that hold two things.
        """
        of_two = round(pairs * BATCH)
        drawn = ((self.pairs, of_two), (self.singles, BATCH - of_two))
        chosen = torch.cat([among[torch.randint(len(among), (count,))] for among, count in drawn])
        chosen = chosen[torch.randperm(BATCH)]  # the strata of the times go by place
        read = self.texts.read(self.captions.words_of(chosen.tolist()))
        return self.latents[chosen].to(self.device).float(), *read


def draw_times(count: int, device: torch.device) -> Tensor:
    """Logit-normal times (n,), one per stratum: a less noisy loss. In bfloat16's steps, as the model reads them."""
    strata = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    logits = TIME_SPREAD * torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4))
    return logits.sigmoid().bfloat16().float()


def noised(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, times and the velocity noise - latents."""
    times, noise = draw_times(len(latents), latents.device), torch.randn_like(latents)
    t = times.view(-1, 1, 1)
    return (1 - t) * latents + t * noise, times, noise - latents


def train(folder: Path, minutes: float, device: torch.device) -> None:
    """Stage `flow`: train for `minutes`; checkpoint (and resume) as flow.pt in `folder`."""
    torch.manual_seed(0)
    recipe = PretrainingRecipe("flow", minutes, MUON_LR, ADAMW_LR, decay=0.999, hold=HOLD, not_for_muon=NOT_FOR_MUON)
    model = FlowDenoiser()
    if (folder / "t5.pt").exists():
        model.load_state_dict(read_average(folder, "t5"), strict=False)  # all but the transformer's
    run = PretrainingRun(model, recipe, folder, device, working=working_copy)
    examples, ones = Examples(folder, device, run.step), torch.ones(BATCH, device=device)
    while run.unfinished:
        latents, tokens, pooled, states = examples.batch(PAIRS if run.budget.progress > PAIRS_AFTER else 0.0)
        noisy, times, velocity = noised(latents)
        predicted, guessed = run.working(noisy, times, tokens, pooled, ones)
        imitation = t5.distance(guessed, states, tokens)
        loss = F.mse_loss(predicted, velocity) + IMITATION * imitation
        run.update(loss, partial("of which words {:.4f}".format, IMITATION * imitation.item()))


def distil(folder: Path, minutes: float, device: torch.device) -> None:
    """Stage `guidance`: train for `minutes` from flow.pt; checkpoint (and resume) as guidance.pt in `folder`."""
    model = FlowDenoiser()
    model.load_state_dict(read_average(folder, "flow"))
    teacher = working_copy(model.to(device)).requires_grad_(False)
    muon, adamw = GUIDANCE_MUON_LR, GUIDANCE_ADAMW_LR
    recipe = PretrainingRecipe("guidance", minutes, muon, adamw, decay=0.999, hold=0.2, not_for_muon=NOT_FOR_MUON)
    run = PretrainingRun(model, recipe, folder, device, working=working_copy)
    examples, ones = Examples(folder, device, run.step), torch.ones(BATCH, device=device)
    empty = [part.expand(BATCH, -1) for part in examples.texts.read([""])[:2]]
    low, high = GUIDANCE
    while run.unfinished:
        latents, tokens, pooled, _ = examples.batch(PAIRS)
        noisy, times, _ = noised(latents)
        scales = (low + (high - low) * torch.rand(BATCH, device=device)).bfloat16().float()
        with torch.no_grad():
            without, _ = teacher(noisy, times, *empty, ones)
            target = without + scales.view(-1, 1, 1) * (teacher(noisy, times, tokens, pooled, ones)[0] - without)
        run.update(F.mse_loss(run.working(noisy, times, tokens, pooled, scales)[0], target))


def working_copy(model: FlowDenoiser) -> FlowDenoiser:
    """A bfloat16 copy with compiled blocks: twice as fast on a CPU that multiplies bfloat16 (AMX)."""
    copied = copy.deepcopy(model).bfloat16()
    copied.transformer.set_attention_backend("_native_math")  # the CPU's flash attention is slow in bfloat16
    copied.transformer.compile_repeated_blocks()
    return copied
