"""Texts as models of transformers read them: two of unlike length, of random words and the marks that they need."""
from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .config import LENGTH, PAD

TEXTS = ("text-generation", "fill-mask", "text-classification", "token-classification", "question-answering",
         "text2text-generation")
"""Tasks whose models read text, some of them pictures too."""
UNPADDED = ("nystromformer",)
"""Families whose own mask of padding does not fit their scores, which are those of landmarks."""
ROWS, ANSWER = 2, 5
FIRST, LAST = 5, 60
"""Ids of words: those of special tokens are below, or at the end of the vocabulary."""


def text(task: str, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids, their mask and what else a model reads of texts, by the names of its arguments. The second text is a
    token shorter than the first.
    """
    accepted, config = inspect.signature(model.forward).parameters, model.config.get_text_config()
    ids = torch.randint(FIRST, LAST, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    found = {"input_ids": ids}
    if "attention_mask" in accepted and config.model_type not in UNPADDED:
        found["attention_mask"] = mask
        mask[1, -1] = 0
        ids[1, -1] = _known(config, "pad_token_id", PAD)
    _marked(task, config, ids, mask.sum(1) - 1)
    if "decoder_input_ids" in accepted and task not in ("text-classification", "question-answering"):
        found["decoder_input_ids"] = torch.randint(FIRST, LAST, (ROWS, ANSWER), generator=generator)
    return found | {name: make(config, generator) for name, make in _BESIDES.items() if name in accepted}


def _known(config: Any, name: str, other: int | None = None) -> int | None:
    """A special token's id, of several the first; `other` where the config says none."""
    found = getattr(config, name, None)
    found = found[0] if isinstance(found, (list, tuple)) else found
    return found if isinstance(found, int) and found >= 0 else other


def _marked(task: str, config: Any, ids: Tensor, ends: Tensor) -> None:
    """Puts the end of a text where there is one to tell, and what stands between a question and its passage."""
    rows = torch.arange(ROWS)
    end, between = _known(config, "eos_token_id"), _known(config, "sep_token_id")
    if task == "question-answering" and between is not None:
        ids[:, 4:6] = between
        end = between
    if end is not None:
        ids[rows, ends] = end


def _boxes(config: Any, generator: torch.Generator) -> Tensor:
    """Left, top, right and bottom of each word on its page, (B, T, 4)."""
    corner = torch.randint(0, 400, (ROWS, LENGTH, 2), generator=generator)
    return torch.cat([corner, corner + torch.randint(1, 100, (ROWS, LENGTH, 2), generator=generator)], -1)


_BESIDES = {
    "bbox": _boxes,
    "visual_feats": lambda config, generator: torch.randn(ROWS, ANSWER, config.visual_feat_dim, generator=generator),
    "visual_pos": lambda config, generator: torch.rand(ROWS, ANSWER, config.visual_pos_dim, generator=generator),
}
"""What models read beside words: where they stand on a page, and regions of a picture."""
