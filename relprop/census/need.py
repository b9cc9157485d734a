"""What families of transformers need in a tiny config beside the rules of `config`, by model type."""
from __future__ import annotations

from typing import Any

NEEDS: dict[str, dict[str, Any]] = {}
