"""Print what torch-fidelity's Inception gives for the weights and images of tests/evaluation/test_inception.py.

    PYTHONPATH=. python tests/golden/make_inception.py

Needs torch-fidelity 0.3 (and what it imports); dreamlora does not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tests.evaluation.test_inception import PLACES, made_up_weights, pictures

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(made_up_weights(), file)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    network.eval()
    for picture in pictures():
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
        features = network(pixels)[0][0]
        print([round(float(features[place]), 6) for place in PLACES], round(float(features.mean()), 6))
