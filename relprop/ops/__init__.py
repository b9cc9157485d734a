"""The table of operations: one file a kind, its rules as plain functions, and what runs them.

`lookup` finds the row of a torch function, `register` adds one.
"""

from .call import Call
from .journal import Journal
from .split import Split
from .table import KINDS, Op, lookup, register

__all__ = ["KINDS", "Call", "Journal", "Op", "Split", "lookup", "register"]
