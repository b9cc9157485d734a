"""Calls of an unmodified model: run under rules (`intercepted`), or only watched (`observed`, `attention_patterns`)."""

from .activation import activation_offset
from .attending import STREAM, Attending, Attention, Part
from .checkpoint import checkpointed
from .interception import ROUNDING, Interception, Tap, Way, intercepted
from .mixing import Mixing, mixings
from .observation import Seen, attention_patterns, observed
from .survey import Survey, surveyed

__all__ = ["ROUNDING", "STREAM", "Attending", "Attention", "Interception", "Mixing", "Part", "Seen", "Survey",
           "Tap", "Way", "activation_offset", "attention_patterns", "checkpointed", "intercepted", "mixings",
           "observed", "surveyed"]
