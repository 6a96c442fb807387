"""Run a script with the stand-in for torchvision: python benchmarks/_with_standin.py SCRIPT [FLAGS].

The libraries look for torchvision once and must not find the stand-in, as they would want more of it than there is. So
they look first, then it is put on the path.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import diffusers.utils.import_utils
import transformers.utils

if __name__ == "__main__":
    transformers.utils.is_torchvision_available()
    diffusers.utils.import_utils.is_torchvision_available()
    sys.path.insert(0, str(Path(__file__).parent / "torchvision_standin"))
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
