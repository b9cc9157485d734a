"""Texts with pictures, as people write them, and what a processor of both makes of them.

A processor puts many tokens in the place of each picture. Which tokens are the text's own is read off by laying what it
made beside the tokens of the text alone.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from . import chat
from .pixels import picture
from .tokens import TextUnits, assemble, from_ids

Maker = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]
TEXT, IMAGES, MESSAGES = ("text", "question", "prompt"), ("image", "images"), "messages"
KEYS = (*TEXT, *IMAGES, MESSAGES)
TAKES = ('{"text": "...", "image": picture}, a pair (picture, "text"), a conversation (a list of messages with "role" '
         'and "content"), a list of these, or what the processor makes of them')


@dataclass(frozen=True)
class Prompt:
    """One row: a text, with the processor's sign for each picture in it, its pictures, uint8 (Y, X, 3), and, of a
    conversation, what is said in it, without what the template puts around.
    """

    text: str
    images: list[Tensor]
    said: list[str] | None = None


def is_prompt(inputs: object) -> bool:
    """Whether a mapping is of text and pictures, and not of tensors that are prepared already."""
    return isinstance(inputs, Mapping) and bool(inputs) and set(inputs) <= set(KEYS)


def read(inputs: object, processor: object, name: str) -> list[Prompt]:
    """A prompt for each row.

    A text without the sign for its pictures is put into the processor's chat template, the pictures first, or, without
    one, behind their signs.

    Args: inputs: as `TAKES` says; several texts and pictures by name are as many rows.
    Raises: TypeError for what is none of that, ValueError for an empty text or batch.
    """
    found = [_prompt(one, processor, name) for one in _rows(inputs)]
    if not found:
        raise ValueError("the batch is empty; give at least one text with its picture")
    return found


def process(prompts: Sequence[Prompt], processor: object) -> dict[str, object]:
    """The model's tensors of these prompts, by the processor, padded where it has to be.

    Raises: ValueError with the processor's own reason where it cannot make them.
    """
    texts, nested = [prompt.text for prompt in prompts], [prompt.images for prompt in prompts]
    given = {"text": texts, "return_tensors": "pt"}
    if any(nested):
        # one picture a row is what every processor takes; those that take several take them row by row
        single = all(len(images) == 1 for images in nested) and not takes_several(processor)
        shown = [[pil(image) for image in images] for images in nested]
        given["images"] = [images[0] for images in shown] if single else shown
    if _begins(processor, texts):
        given["add_special_tokens"] = False  # the chat template has them
    problems = []
    for padded in _paddings(processor.tokenizer):
        try:
            return dict(processor(**given, **padded))
        except (ValueError, TypeError, IndexError, RuntimeError) as cause:
            problems.append(cause)
    cause = problems[-1] if len(prompts) > 1 else problems[0]
    raise ValueError(f"{type(processor).__name__} cannot read the batch: {str(cause).strip().splitlines()[0]}"
                     ) from cause


def _paddings(tokenizer: object) -> list[dict]:
    """How texts may be padded: as the processor does it by itself, else to the longest. Where the model is given no
    mask, so that it reads padding, to the length that it was trained with.
    """
    masked = "attention_mask" in getattr(tokenizer, "model_input_names", ("attention_mask",))
    limited = getattr(tokenizer, "model_max_length", 1 << 30) < 1 << 20  # tokenizers say 10^30 for none
    return [{}, {"padding": True}] if masked or not limited else [{"padding": "max_length", "truncation": True}]


def units(prompts: Sequence[Prompt], ids: Tensor, mask: Tensor, processor: object) -> TextUnits:
    """The words of the prompts, by the tokens that the processor made of them; those in the place of pictures are
    special.

    Args: ids: (B, T). mask: 1 for tokens, 0 for padding, (B, T).
    """
    tokenizer = processor.tokenizer
    special = specials(ids, processor)
    if not getattr(tokenizer, "is_fast", False):
        return from_ids(ids, mask, tokenizer, special=special)
    offsets = []
    for prompt, row in zip(prompts, ids.tolist()):
        alone = tokenizer(prompt.text, return_offsets_mapping=True, add_special_tokens=False)
        offsets.append(_aligned(row, alone["input_ids"], alone["offset_mapping"]))
    added = torch.tensor([[offset == (0, 0) for offset in row] for row in offsets])
    texts = [prompt.text for prompt in prompts]
    found = assemble(ids, mask, tokenizer, special.bool().cpu() | added, (texts, offsets))
    return chat.apart(found, [[(0, len(one.text))] if one.said is None else chat.contents(one.text, one.said)
                              for one in prompts])


def specials(ids: Tensor, processor: object) -> Tensor:
    """1 for tokens that are no words: those that tokenizers put around a text, and those of pictures, (B, T)."""
    tokenizer = processor.tokenizer
    words = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("mask", "unk")}
    known = {*getattr(tokenizer, "all_special_ids", ()), *sign_ids(processor)} - words
    found = torch.isin(ids, torch.tensor(sorted(i for i in known if isinstance(i, int)), dtype=ids.dtype))
    return found.long()


def sign_ids(processor: object) -> list[int]:
    """Ids of the tokens that stand in the place of pictures."""
    named = [getattr(owner, name, None) for owner in (processor, processor.tokenizer)
             for name in ("image_token_id", "image_token_ids")]
    flat = [one for value in named for one in (value if isinstance(value, (list, tuple)) else [value])]
    return sorted({one for one in flat if isinstance(one, int)})


def takes_several(processor: object) -> bool:
    """Whether a processor takes several pictures a row: those that put signs for pictures into the text do."""
    return getattr(processor, "image_token", None) is not None


def _rows(inputs: object) -> list[object]:
    """The rows of what was given."""
    if is_prompt(inputs):
        several = {name: value for name, value in inputs.items() if name in TEXT and isinstance(value, (list, tuple))}
        if not several:
            return [inputs]
        count = len(next(iter(several.values())))
        wrong = next((f"{name} has {len(value)}" for name, value in inputs.items()
                      if not isinstance(value, (list, tuple)) or len(value) != count), None)
        if wrong:
            raise ValueError(f"{count} texts are {count} rows, but {wrong if 'has' in wrong else inputs}; give as many "
                             "pictures as texts, or a list of {'text': ..., 'image': ...}")
        return [{name: value[row] for name, value in inputs.items()} for row in range(count)]
    if isinstance(inputs, list) and not _conversation(inputs):
        return inputs
    return [inputs]


def _prompt(one: object, processor: object, name: str) -> Prompt:
    if isinstance(one, str):
        one = {"text": one}
    if _conversation(one):
        one = {MESSAGES: one}
    if isinstance(one, tuple) and len(one) == 2 and sum(isinstance(part, str) for part in one) == 1:
        text, image = one if isinstance(one[0], str) else one[::-1]
        one = {"text": text, "image": image}
    if not is_prompt(one):
        kind = f"a mapping with {', '.join(map(str, one))}" if isinstance(one, Mapping) else type(one).__name__
        raise TypeError(f"{name} takes text and pictures, and a row was {kind}; give {TAKES}")
    if MESSAGES in one:
        return _of_messages(one[MESSAGES], processor)
    text = next((one[key] for key in TEXT if key in one), None)
    given = next((one[key] for key in IMAGES if key in one), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text beside a picture is {text!r}; give at least one word as 'text'")
    many = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return _signed(text, [loaded(value) for value in many], processor)


def _conversation(one: object) -> bool:
    return isinstance(one, (list, tuple)) and bool(one) and all(
        isinstance(message, Mapping) and "role" in message for message in one)


def _of_messages(messages: Sequence[Mapping], processor: object) -> Prompt:
    """A conversation through the chat template, its pictures taken out of it."""
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{type(processor).__name__} has no chat template, which turns a conversation into a text; "
                         "give {'text': ..., 'image': ...}")
    images, said = [], []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
        for part in parts:
            if part.get("type") == "image":
                value = next((part.pop(key) for key in ("image", "url", "path") if key in part), None)
                images.append(loaded(value))
        said.append({"role": message["role"], "content": parts})
    texts = [part["text"] for message in said for part in message["content"] if part.get("type") == "text"]
    return Prompt(_templated(said, processor), images, texts)


def _templated(messages: Sequence[Mapping], processor: object) -> str:
    ends = messages[-1]["role"] != "assistant"
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ends)
    except Exception as cause:  # templates raise what they like
        raise ValueError(f"the chat template refuses the conversation: {cause}") from cause


def _signed(text: str, images: list[Tensor], processor: object) -> Prompt:
    """The text with a sign for each picture."""
    sign = getattr(processor, "image_token", None)
    if sign is None or not images or sign in text:
        return Prompt(text, images)
    if getattr(processor, "chat_template", None) is not None:
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        return Prompt(_templated([{"role": "user", "content": parts}], processor), images, [text])
    return Prompt(sign * len(images) + text, images)


def loaded(value: object) -> Tensor:
    """A picture as uint8 (Y, X, 3), of whatever `pixels.picture` reads. Raises: TypeError for a tensor."""
    import numpy as np

    if isinstance(value, Tensor):
        raise TypeError(f"a picture beside a text is a path, a PIL image or a numpy array, not a tensor "
                        f"{tuple(value.shape)}; or give what the processor makes, by name")
    return torch.from_numpy(np.array(picture(value).convert("RGB")))


def pil(image: Tensor) -> object:
    """A picture, uint8 (Y, X, 3), as PIL has it."""
    from PIL import Image

    return Image.fromarray(image.numpy())


def _begins(processor: object, texts: Sequence[str]) -> bool:
    """Whether the texts begin with the token that the tokenizer would put in front, as chat templates write it."""
    start = getattr(processor.tokenizer, "bos_token", None)
    return bool(start) and all(text.startswith(start) for text in texts)


def _aligned(ids: Sequence[int], alone: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """For each token, where it stands in the text; (0, 0) for those that were put in."""
    found = [(0, 0)] * len(ids)
    for at, start, length in SequenceMatcher(None, ids, alone, autojunk=False).get_matching_blocks():
        for step in range(length):
            found[at + step] = tuple(offsets[start + step])
    return found


def maker(prompts: Sequence[Prompt], processor: object) -> Maker:
    """From other pictures in the place of these to the processor's floating tensors of them."""
    counts = [len(prompt.images) for prompt in prompts]

    def made(images: Sequence[Tensor]) -> dict[str, Tensor]:
        rest = iter(images)
        other = [Prompt(prompt.text, [next(rest) for _ in range(count)]) for prompt, count in zip(prompts, counts)]
        return {name: value for name, value in process(other, processor).items()
                if isinstance(value, Tensor) and value.is_floating_point()}

    return made


__all__ = ["KEYS", "Maker", "Prompt", "is_prompt", "loaded", "maker", "pil", "process", "read", "sign_ids", "specials",
           "units"]
