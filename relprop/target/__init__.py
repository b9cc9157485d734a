"""What is explained: the scalar of the output, one a row, whose relevance is asked for.

A target is a frozen dataclass with a `value`; a user's own kind is one more such class. `resolve` turns what a user
writes (7, "cat", " Paris", a Target, a function, or a list of these, one a row) into `Targets`, which read an output.
"""
from __future__ import annotations

from .answer import Answer
from .combination import Contrast, Function, Probability
from .entry import Class, Regression, Token
from .output import logits
from .prediction import Prediction
from .question import End, Span, Start
from .reading import Reading
from .scalar import Choice, Target
from .similarity import Similarity
from .tag import Tag
from .vocabulary import LANGUAGE_MODELING, Targets, Vocabulary, resolve

__all__ = ["LANGUAGE_MODELING", "Answer", "Choice", "Class", "Contrast", "End", "Function", "Prediction", "Probability",
           "Reading", "Regression", "Similarity", "Span", "Start", "Tag", "Target", "Targets", "Token", "Vocabulary",
           "logits", "resolve"]
