"""What other programs call the layers of a family, one file each; no torch.

Each has ``names(config)``: ``lora.names.ModelNames`` of a denoiser with this ``config.json``; of the published models
where that is empty.
"""
