"""Stage `t5`: the T5 of `tiny-flow` learns what the embedded CLIP's text encoder says of each word.

Which colour belongs to which of two things is a matter of word order. A T5 that learnt from the loss of the transformer
alone did not come to know it (weights/README.md); the states that CLIP has of the words hold it already.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from dreamlora.tiny import pipeline_path
from pretraining import data, flow_tokenizer
from pretraining.denoiser import Captions
from pretraining.optim import PretrainingRecipe, PretrainingRun

WIDTH, LAYERS, CLIP_WIDTH = 128, 2, 96
BATCH = 128
MUON_LR, ADAMW_LR = 3e-3, 1.5e-3
NOT_FOR_MUON = ("shared", "relative", "norm", "to_clip")


def build_t5(vocabulary: int) -> T5EncoderModel:
    """An untrained text encoder for the tokenizer's number of tokens."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


class Reader(nn.Module):
    """T5, and a linear map from its states to CLIP's, which only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.t5, self.to_clip = build_t5(len(flow_tokenizer.build())), nn.Linear(WIDTH, CLIP_WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """T5's states (n, 32, WIDTH) of token ids (n, 32), and CLIP's as guessed from them, (n, 32, CLIP_WIDTH)."""
        states = self.t5(tokens)[0]
        return states, self.to_clip(states)


class Texts:
    """Reads captions: as token ids of T5, and as what the embedded model's text encoder, which stays as it is, says."""

    def __init__(self, device: torch.device) -> None:
        embedded = pipeline_path()
        self._clip = CLIPTextModel.from_pretrained(embedded, subfolder="text_encoder").to(device).eval()
        self._clip_words = CLIPTokenizer.from_pretrained(embedded, subfolder="tokenizer")
        self._words, self._device = flow_tokenizer.build(), device

    @torch.no_grad()
    def read(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """T5's token ids (n, 32), CLIP's summaries (n, CLIP_WIDTH) and its states (n, 31, CLIP_WIDTH): at each place,
        the state of that token of T5, as a word is one token in both and CLIP alone has a mark of the beginning."""
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self._words(texts, **padded).input_ids.to(self._device)
        said = self._clip(self._clip_words(texts, **padded).input_ids.to(self._device))
        return tokens, said.pooler_output, said.last_hidden_state[:, 1:]


def distance(guessed: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
    """Mean square difference of CLIP's states as guessed from T5's, over words and ends.

    Args:
        guessed: (n, 32, CLIP_WIDTH).
        states: (n, 31, CLIP_WIDTH).
        tokens: T5's, (n, 32); 0 is padding, of which CLIP says nothing that is wanted.
    """
    meant = tokens[:, :-1] != 0
    return F.mse_loss(guessed[:, :-1][meant].float(), states[meant])


def train(folder: Path, minutes: float, device: torch.device) -> None:
    """Train for `minutes`; checkpoint (and resume) as t5.pt in `folder`."""
    torch.manual_seed(0)
    recipe = PretrainingRecipe("t5", minutes, MUON_LR, ADAMW_LR, not_for_muon=NOT_FOR_MUON)
    run, texts = PretrainingRun(Reader(), recipe, folder, device), Texts(device)
    scenes = data.load_scenes(folder)
    captions = Captions(scenes, flow_tokenizer.build(), run.step)
    while run.unfinished:
        tokens, _, states = texts.read(captions.words_of(torch.randint(len(scenes), (BATCH,)).tolist()))
        _, guessed = run.model(tokens)
        run.update(distance(guessed, states, tokens))
