"""Stable Diffusion: the reference toolkit."""

__version__ = "0.1.0"
