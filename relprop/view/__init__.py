"""Results as people see them: figures, pages and files. Needs a result and nothing else, no model."""

from .figure import figure, image, text
from .forest import forest, report
from .grid import grid
from .page import fragment, page
from .save import SUFFIXES, save

__all__ = ["SUFFIXES", "figure", "forest", "fragment", "grid", "image", "page", "report", "save", "text"]
