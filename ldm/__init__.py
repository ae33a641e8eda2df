"""Latent diffusion: process, denoisers, samplers, guidance, text encoders and codecs. Tensors in, tensors out."""

__version__ = "0.1.0"
