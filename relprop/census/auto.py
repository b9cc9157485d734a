"""The architectures of transformers' auto classes."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from . import config
from .architecture import Architecture
from .inputs import inputs
from .need import NEEDS

TASKS = {
    "CAUSAL_LM": "text-generation", "MASKED_LM": "fill-mask", "SEQUENCE_CLASSIFICATION": "text-classification",
    "TOKEN_CLASSIFICATION": "token-classification", "QUESTION_ANSWERING": "question-answering",
    "SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation", "IMAGE_CLASSIFICATION": "image-classification",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "zero-shot-image-classification", "IMAGE_TEXT_TO_TEXT": "image-text-to-text",
    "VIDEO_CLASSIFICATION": "video-classification", "AUDIO_CLASSIFICATION": "audio-classification",
}
"""transformers' tables of classes, and what its pipelines call the task."""


def architectures() -> Iterator[Architecture]:
    """Every class of the tables, once a task."""
    from transformers.models.auto import modeling_auto

    for table, task in TASKS.items():
        for family, names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
            for name in (names,) if isinstance(names, str) else names:
                yield Architecture("transformers", task, family, name, partial(_build, family, name),
                                   partial(inputs, task))


def _build(family: str, name: str) -> nn.Module:
    import transformers

    made = config.shrunk(transformers.CONFIG_MAPPING[family], **NEEDS.get(family, {}))
    return getattr(transformers, name)(made)
