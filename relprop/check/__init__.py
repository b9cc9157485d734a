"""Checks of a map by cause: what it says matters is taken out of the real model's input, beside random controls."""
from .ablation import ablation

__all__ = ["ablation"]
