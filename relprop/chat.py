"""Conversations as a language model reads them: in its tokenizer's chat template, whose own signs are no words."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .tokens import TextUnits, encode

Conversation = Sequence[Mapping[str, str]]


def read(inputs: object) -> list[Conversation] | None:
    """The conversations that were given, None if these are none.

    Raises: ValueError for a message without a role or a text.
    """
    if not isinstance(inputs, (list, tuple)) or not inputs:
        return None
    chats = [inputs] if isinstance(inputs[0], Mapping) else list(inputs)
    if not all(isinstance(chat, (list, tuple)) and chat and isinstance(chat[0], Mapping) for chat in chats):
        return None
    for row, chat in enumerate(chats):
        for message in chat:
            said = message.get("content") if isinstance(message, Mapping) else None
            if not isinstance(said, str) or "role" not in message:
                raise ValueError(f"row {row}: a message has a role and a content, a text, not {message!r}")
    return chats


def encoded(chats: Sequence[Conversation], tokenizer: object, *, pad_id: int) -> tuple[dict[str, Tensor], TextUnits]:
    """Conversations up to where the model is to answer, as tensors (B, T), and their units: what the template puts
    around the messages is special.

    Raises: ValueError for a tokenizer without a chat template, or a conversation that its template refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{type(tokenizer).__name__} has no chat template; give the prompt as one text")
    texts = []
    for row, chat in enumerate(chats):
        try:
            texts.append(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True))
        except Exception as cause:  # templates raise what they like
            raise ValueError(f"the chat template refuses the conversation of row {row}: {cause}") from cause
    tensors, units = encode(tokenizer, texts, pad_id=pad_id, template=True)
    said = [[message["content"] for message in chat] for chat in chats]
    return tensors, apart(units, [contents(text, each) for text, each in zip(texts, said)])


def contents(text: str, messages: Sequence[str]) -> list[tuple[int, int]]:
    """Where in the text the messages are, in their order."""
    found, begin = [], 0
    for message in messages:
        said = message.strip()
        start = text.find(said, begin)
        if said and start >= 0:
            found.append((start, start + len(said)))
            begin = start + len(said)
    return found


def apart(units: TextUnits, places: list[list[tuple[int, int]]]) -> TextUnits:
    """The units with what is of no message as special tokens, which belong to no word."""
    special, words, word_ids = [], [], []
    for row, spans in enumerate(places):
        inside = torch.tensor([any(start < end and s < end and start < e for s, e in spans)
                               for start, end in units.offsets[row]])
        kept = [index if own else None for index, own in zip(units.word_ids[row], inside.tolist())]
        used = sorted({index for index in kept if index is not None})
        words.append([units.words[row][index] for index in used])
        word_ids.append([None if index is None else used.index(index) for index in kept])
        special.append([old or not own for old, own in zip(units.special[row], inside.tolist())])
    return replace(units, special=special, words=words, word_ids=word_ids)
