"""The few parts of torchvision that diffusers' DreamBooth script uses, for machines where it cannot be installed."""
