"""Whole models in one .safetensors file, as most programs but diffusers keep them: recognised by what is in them, and
written once as a diffusers folder, from which all else goes on.
"""
