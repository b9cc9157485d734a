"""What a run gives back: frozen values that carry everything a reader needs, without the model."""

from .curve import Curve
from .ledger import Ledger
from .relevance import Relevance, read, write

__all__ = ["Curve", "Ledger", "Relevance", "read", "write"]
