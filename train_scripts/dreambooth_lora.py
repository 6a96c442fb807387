"""Train a DreamBooth LoRA; a replacement for diffusers' train_dreambooth_lora.py with the same flags.

accelerate launch train_scripts/dreambooth_lora.py --optimizer scaled_adamw
"""

import sys

from dreamlora.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["dreambooth", *sys.argv[1:]]))
