"""Results as people see them: figures, pages and files. Needs a result and nothing else, no model."""

from .account import account
from .beside import beside, series
from .figure import figure, image, text
from .forest import forest, report
from .grid import grid
from .mediation import mediation
from .page import fragment, page
from .pattern import patterns
from .save import SUFFIXES, save
from .sparsity import selection, sparsity
from .studied import studied
from .wiring import wired

__all__ = ["SUFFIXES", "account", "beside", "figure", "forest", "fragment", "grid", "image", "mediation", "page",
           "patterns", "report", "save", "selection", "series", "sparsity", "studied", "text", "wired"]
