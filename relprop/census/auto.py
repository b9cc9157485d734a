"""The architectures of transformers' auto classes."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from . import config
from .architecture import Architecture
from .inputs import inputs
from .need import NEEDS
from .sight import SIGHT

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
                yield Architecture("transformers", task, family, name, partial(_build, task, family, name),
                                   partial(inputs, task))


def _build(task: str, family: str, name: str) -> nn.Module:
    """A tiny instance. Of a config of several parts a class that is made of one of them is given that part, as
    transformers' auto classes do; what is to generate text and may be an encoder as well is told to be a decoder.
    """
    import transformers

    made, built = config.shrunk(transformers.CONFIG_MAPPING[family], NEEDS | SIGHT), getattr(transformers, name)
    parts = [part for part, kind in made.sub_configs.items() if kind is built.config_class]
    if parts and not isinstance(made, built.config_class):
        made = getattr(made, parts[0])
    if task == "text-generation" and hasattr(made, "is_decoder") and not made.is_encoder_decoder:
        made.is_decoder = True
    return built(made)
