"""Train a LoRA on captioned images; a replacement for diffusers' train_text_to_image_lora.py with the same flags.

accelerate launch train_scripts/text_to_image_lora.py --train_data_dir captioned/
"""

import sys

from dreamlora.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["text-to-image", *sys.argv[1:]]))
