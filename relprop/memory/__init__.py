"""Memory that an explanation takes: what it will be, what is free, and what an error of the allocator means."""

from .budget import free, held_by, out_of_memory
from .prediction import Estimate, advice, predicted, worth

__all__ = ["Estimate", "advice", "free", "held_by", "out_of_memory", "predicted", "worth"]
