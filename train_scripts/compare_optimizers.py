"""Find out which optimizer is better, each at its own best learning rate; the same as ``dreamlora compare``.

python train_scripts/compare_optimizers.py --optimizers adamw scaled_adamw

It starts a process per GPU, or per core for an embedded model, itself: accelerate launch is not needed.
"""

import sys

from dreamlora.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
