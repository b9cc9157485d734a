"""What a run gives back: frozen values that carry everything a reader needs, without the model."""

from .circuit import Circuit
from .curve import Curve
from .decomposition import Decomposition
from .effects import Effects, Summary
from .faithfulness import Faithfulness
from .ledger import Ledger
from .picture import Picture
from .relevance import Relevance, read, write
from .table import Cell, Cost, Table

__all__ = ["Cell", "Circuit", "Cost", "Curve", "Decomposition", "Effects", "Faithfulness", "Ledger",
           "Picture", "Relevance", "Summary", "Table", "read", "write"]
