"""Burnish: fine-tune diffusion models on your own pictures, and get an adapter that loads where you use it."""

__version__ = "0.1.0"
