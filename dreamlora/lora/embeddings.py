"""Files of embeddings of new tokens: a file for each token, named after it, as most programs look for it.

``emb_params`` for one text encoder of Stable Diffusion, ``clip_l`` and ``clip_g`` for those of SDXL, ``clip_l`` for
FLUX.1, each ``[n, d]``: what kohya's sd-scripts write. ``Family.EMBEDDING_KEYS`` has the names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from dreamlora.archives import open_tensors
from dreamlora.config.new_tokens import MOST_VECTORS, check_token, check_tokens, file_stem
from dreamlora.errors import UserError
from dreamlora.files import replacing
from dreamlora.lora.formats.peft import TENSORS
from dreamlora.runfolder import EMBEDDINGS, LORA_FILE

TOKEN = "token"
"""In the header of a file: the token that its vectors are of, where a file cannot be named so ("<style>")."""
_SUFFIX = ".safetensors"


class TokenFile(NamedTuple):
    """What a file of embeddings holds.

    Attributes:
        token: that stands for them in prompts.
        vectors: ``[n, d]`` float32 by the component name of the text encoder.
    """

    path: Path
    token: str
    vectors: dict[str, Tensor]


def file_of(folder: Path, token: str) -> Path:
    """Where the embeddings of a token lie that belong to the LoRA in a folder."""
    return folder / EMBEDDINGS / f"{file_stem(token)}{_SUFFIX}"


def files_beside(lora: Path) -> list[Path]:
    """The embeddings that belong to a LoRA file. A run's folder in PEFT's format lies beside its LoRA, and shares its
    embeddings.
    """
    place = lora.parent
    if lora.name == TENSORS and (place.parent / LORA_FILE).is_file():
        place = place.parent
    return sorted((place / EMBEDDINGS).glob(f"*{_SUFFIX}"))


def write(folder: Path, vectors: Mapping[str, Mapping[str, Tensor]], keys: Mapping[str, str]) -> list[Path]:
    """Write the embeddings that belong to the LoRA in a folder.

    Args:
        vectors: ``[n, d]`` by token and text encoder.
        keys: the family's ``EMBEDDING_KEYS``.
    """
    written = []
    for token, each in vectors.items():
        with replacing(file_of(folder, token)) as temporary:
            save_file({keys[name]: rows.contiguous() for name, rows in each.items()}, temporary, {TOKEN: token})
        written.append(file_of(folder, token))
    return written


def read(file: Path, keys: Mapping[str, str]) -> TokenFile:
    """Read a file of embeddings, for a model of the family with these keys.

    Of a model with one text encoder the only tensor counts, whatever its name, as diffusers and others write it.

    Raises:
        UserError: there is none; it is damaged, no such file, or for another kind of model.
    """
    if file.suffix != _SUFFIX:
        raise UserError(
            f"{file}: embeddings are read as .safetensors only, as pickles can run any code while they load"
        )
    if not keys:
        raise UserError(f"{file}: this kind of model takes no embeddings of new tokens, so it cannot be used with it")
    try:
        with open_tensors(file) as opened:
            names = list(opened.keys())
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            found = _named(names, keys)
            if found is None or not all(_fits(shapes[name]) for name in found.values()):
                raise UserError(
                    f"{file} is no file of embeddings for this kind of model, which has {' and '.join(keys.values())} "
                    f"of [n, d] with n up to {MOST_VECTORS} (it has {_told(shapes)})"
                )
            tensors = {encoder: opened.get_tensor(name) for encoder, name in found.items()}
            token = (opened.metadata() or {}).get(TOKEN, file.stem)
    except FileNotFoundError:
        raise UserError(f"no such file of embeddings: {file}") from None
    check_token(token, str(file))
    if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UserError(f"{file} holds embeddings that are not finite numbers: it is damaged, or its training diverged")
    rows = {name: tensor.float().reshape(-1, tensor.shape[-1]) for name, tensor in tensors.items()}
    if len({len(each) for each in rows.values()}) > 1:
        raise UserError(f"{file} has other numbers of vectors for one text encoder than for another ({_told(shapes)})")
    return TokenFile(file, token, rows)


def read_all(files: Iterable[Path], keys: Mapping[str, str]) -> list[TokenFile]:
    """Read several that are to be used together.

    Raises:
        UserError: see ``read``; or their tokens cannot be told apart.
    """
    read_files = [read(file, keys) for file in files]
    check_tokens([each.token for each in read_files], "embeddings of new tokens")
    return read_files


def digest_of(files: Sequence[Path]) -> str:
    """Twelve hex digits for what files hold."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:12]


def _named(names: Sequence[str], keys: Mapping[str, str]) -> dict[str, str] | None:
    """The tensor of each text encoder; None: they are not there, or there is something else."""
    if len(keys) == 1 and len(names) == 1:
        return dict(zip(keys, names, strict=True))
    return dict(keys) if set(names) == set(keys.values()) else None


def _fits(shape: tuple[int, ...]) -> bool:
    """``[n, d]``, or ``[d]`` for one vector."""
    return len(shape) in (1, 2) and shape[-1] > 0 and (len(shape) == 1 or 1 <= shape[0] <= MOST_VECTORS)


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    some = [f"{name} {list(shape)}" for name, shape in list(shapes.items())[:3]]
    return ", ".join(some) + (", ..." if len(shapes) > 3 else "") if some else "nothing"
