"""The memory that a training is estimated to take, by stage, without a weight and without a GPU:

    python benchmarks/_estimate.py dreambooth --pretrained_model_name_or_path MODEL --instance_data_dir IMAGES ...

prints bytes as JSON, to be held beside what ``torch.cuda.max_memory_allocated`` says after the same command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from dreamlora.cli.parse import parse_run
from dreamlora.config import PROGRAMS


def estimated_peaks(words: Sequence[str]) -> dict[str, int]:
    """Bytes by stage, where memory suffices for everything at its fastest.

    Args:
        words: of the command line, from the program's name on.
    """
    from dreamlora.run import opening, vram

    config, _ = parse_run(words[1:], PROGRAMS[words[0]])
    return {stage.name: stage.most for stage in vram.rehearsal_of(opening.begin(config)).stages()}


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # another process may be measured there
    print(json.dumps(estimated_peaks(sys.argv[1:])))
