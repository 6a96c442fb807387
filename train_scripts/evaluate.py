"""Measure trained LoRAs or folders of images: CLIP score, FID and friends. The same as `dreamlora evaluate`.

accelerate launch train_scripts/evaluate.py outputs/checkerling-adamw --metrics clip_score dino kid
"""

import sys

from dreamlora.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
