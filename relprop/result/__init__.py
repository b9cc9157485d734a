"""What a run gives back: frozen values that carry everything a reader needs, without the model."""

from .curve import Curve
from .ledger import Ledger
from .relevance import Relevance, read, write
from .table import Cell, Cost, Table

__all__ = ["Cell", "Cost", "Curve", "Ledger", "Relevance", "Table", "read", "write"]
