"""The units a map is made of (words and tokens, patches and pixels, entries of a tensor) and the batch they come from.

Plain data: results carry it without the model, and views draw from it alone.
"""
from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from .pictures import Pictures

# A word is a run of characters that are neither space nor punctuation, with the apostrophe of "isn't" and the point of
# 3.14. Signs stand alone, repeated ones together ("..."), and so does each character of scripts written without spaces.
_SIGN = (
    r"!-/:-@\[-^`{-~\u00a1\u00a7\u00ab\u00b6\u00b7\u00bb\u00bf"
    r"\u2010-\u205e\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20"
)
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(
    rf"[{_UNSPACED}]|(?:[^\s{_SIGN}{_UNSPACED}]|(?<=\w)['\u2019](?=\w)|(?<=\d)[.,](?=\d))+|([{_SIGN}])\1*"
)
_SPACE_MARKS = ("\u0120", "\u2581")  # a token that starts with one starts after a space: byte-level BPE, SentencePiece


@dataclass(frozen=True)
class TextUnits:
    """Tokens of a batch of texts and the words they make up; one entry a row, T tokens each, padding included.

    `tokens` are spelled as the tokenizer spells them. `word_ids[row][t]` is the word of token t, an index into
    `words[row]`, and None for special tokens and padding; so two equal words stay two. `offsets` are (start, end) in
    `texts[row]`, (0, 0) where a token is not of the text. Words do not depend on the tokenizer, except that a token
    across several words joins them, and that newlines which are tokens are words. Padding counts as special.

    `seconds` says of pairs where in `texts` the second one begins. `answers` marks the tokens of an answer that was put
    behind the text, for models that write; they are of no word, and special.
    """

    tokens: list[list[str]]
    words: list[list[str]]
    word_ids: list[list[int | None]]
    offsets: list[list[tuple[int, int]]]
    texts: list[str]
    special: list[list[bool]]
    padding: list[list[bool]]
    seconds: list[int] | None = None
    answers: list[list[bool]] | None = None

    @property
    def rows(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> TextUnits:
        """The units of these rows, in this order."""
        return TextUnits(**{name: column and [column[row] for row in rows] for name, column in vars(self).items()})

    def to_dict(self) -> dict:
        """JSON-able; `units` is the way back."""
        return {"kind": "text", **asdict(self)}


@dataclass(frozen=True, eq=False)
class ImageUnits:
    """Pixels of a batch of images, and the patches the model cuts them into, if it does.

    `size` is (Y, X), the model's input; `patch` is (Py, Px) pixels, `grid` (Gy, Gx) patches. `images` are what the
    model saw, resized and cropped but not normalised: uint8 (B, Y, X, 3).
    """

    size: tuple[int, int]
    patch: tuple[int, int] | None
    grid: tuple[int, int] | None
    images: Tensor

    @property
    def rows(self) -> int:
        return len(self.images)

    def take(self, rows: Sequence[int]) -> ImageUnits:
        """The units of these rows, in this order."""
        return replace(self, images=self.images[torch.as_tensor(rows)])

    def to_dict(self) -> dict:
        """JSON-able, the images as PNG in base64; `units` is the way back."""
        images = [_png(image) for image in self.images]
        return {"kind": "image", "size": self.size, "patch": self.patch, "grid": self.grid, "images": images}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageUnits):
            return NotImplemented
        same = (self.size, self.patch, self.grid) == (other.size, other.patch, other.grid)
        return same and torch.equal(self.images, other.images)


@dataclass(frozen=True)
class TensorUnits:
    """Entries of a plain tensor of this shape, rows first."""

    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0]

    def take(self, rows: Sequence[int]) -> TensorUnits:
        """The units of these rows, in this order."""
        return TensorUnits((len(rows), *self.shape[1:]))

    def to_dict(self) -> dict:
        """JSON-able; `units` is the way back."""
        return {"kind": "tensor", "shape": self.shape}


Units = TextUnits | ImageUnits | TensorUnits


def units(data: Mapping) -> Units:
    """The units that `to_dict` wrote, also after a round trip through JSON.

    >>> units(TensorUnits((2, 3)).to_dict())
    TensorUnits(shape=(2, 3))

    Raises: ValueError for a kind that is none of text, image and tensor.
    """
    data = dict(data)
    kind = data.pop("kind", None)
    if kind == "text":
        return TextUnits(**{**data, "offsets": [[(start, end) for start, end in row] for row in data["offsets"]]})
    if kind == "image":
        images = torch.stack([_from_png(image) for image in data["images"]])
        size, patch, grid = (data[name] and tuple(data[name]) for name in ("size", "patch", "grid"))
        return ImageUnits(size, patch, grid, images)
    if kind == "tensor":
        return TensorUnits(tuple(data["shape"]))
    raise ValueError(f"units are of kind text, image or tensor, not {kind!r}; was this written by `to_dict`?")


@dataclass(frozen=True, eq=False)
class Layout:
    """How the units of a row lie in the several sequences that the model runs for it, such as two answers to a prompt.

    `source` is the unit that each token of each sequence is, (B, S, T), -1 for padding; a unit may be in several.
    `units` are those of each sequence by itself, B S rows, the sequences of a row next to each other.
    """

    source: Tensor
    units: TextUnits

    @property
    def count(self) -> int:
        """S, the number of sequences of a row."""
        return self.source.shape[1]

    def take(self, rows: Tensor) -> Layout:
        """The layout of these rows, in this order."""
        return Layout(self.source[rows], self.units.take(self.flat(rows).tolist()))

    def flat(self, rows: Tensor) -> Tensor:
        """Which sequences are those of these rows, (R S,)."""
        return (rows[:, None] * self.count + torch.arange(self.count)).flatten()

    def folded(self, values: Tensor, width: int) -> Tensor:
        """Values of tokens, (B S, T), summed over the sequences for each of `width` units, (B, U)."""
        source = self.source.to(values.device).flatten(1)  # (B, S T)
        inside = source >= 0
        sums = values.new_zeros(len(source), width)
        return sums.scatter_add_(1, source.clamp_min(0), values.reshape(source.shape).where(inside, 0))

    def gathered(self, values: Tensor, width: int) -> Tensor:
        """What stands in the sequences, (B S, T), for each of `width` units, (B, U)."""
        source = self.source.to(values.device).flatten(1)
        found = values.new_zeros(len(source), width + 1)  # padding goes to the last; a unit in several is equal there
        return found.scatter_(1, torch.where(source < 0, width, source), values.reshape(source.shape))[:, :-1]

    def spread(self, values: Tensor, before: Tensor) -> Tensor:
        """Values of units, (B, U), in the place of what stands in the sequences, (B S, T)."""
        source = self.source.to(values.device).flatten(1)
        return values.gather(1, source.clamp_min(0)).where(source >= 0, before.reshape(source.shape)).view_as(before)


@dataclass(frozen=True, eq=False)
class Batch:
    """What goes into `model(*args, **kwargs)`, and what its rows are made of.

    `last` is the index (B,) of each row's last token that is not padding, None if the input is no text. `read` is the
    position (B,) where the model gives its answer when that is another one: the single mask token of a masked language
    model (-1 where a row has none or several), 0 of a decoder that has only started.

    With a `layout` the model runs S sequences for each row: its tensors, `last` and `pictures` have B S entries.
    `pictures` are those beside the texts, or those whose pixels the model sees otherwise than they are.
    """

    args: tuple
    kwargs: dict[str, Tensor]
    rows: int
    units: Units
    last: Tensor | None = None
    read: Tensor | None = None
    layout: Layout | None = None
    pictures: Pictures | None = None

    @property
    def runs(self) -> int:
        """Number of sequences that the model runs."""
        return self.rows * (1 if self.layout is None else self.layout.count)

    @property
    def flat(self) -> Batch:
        """The same with every sequence as a row of its own."""
        if self.layout is None:
            return self
        return replace(self, rows=self.runs, units=self.layout.units, layout=None)

    def take(self, rows: Sequence[int]) -> Batch:
        """The batch of these rows, in this order; a row may come more than once."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        index, layout = rows, None
        if self.layout is not None:
            index, layout = self.layout.flat(rows.cpu()), self.layout.take(rows.cpu())
        args = tuple(self._rows_of(value, index) for value in self.args)
        items = {} if self.pictures is None else self.pictures.items(index.tolist())
        kwargs = {name: value[items[name].to(value.device)] if name in items else self._rows_of(value, index)
                  for name, value in self.kwargs.items() if name not in items or len(items[name])}
        last, read = (self._rows_of(value, index) for value in (self.last, self.read))
        pictures = self.pictures and self.pictures.take(index.tolist())
        return Batch(args, kwargs, len(rows), self.units.take(rows.tolist()), last, read, layout, pictures)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on this device."""
        args = tuple(_moved(value, device) for value in self.args)
        kwargs = {name: _moved(value, device) for name, value in self.kwargs.items()}
        last, read = _moved(self.last, device), _moved(self.read, device)
        return replace(self, args=args, kwargs=kwargs, last=last, read=read)

    def _rows_of(self, value: object, index: Tensor) -> object:
        if isinstance(value, Tensor) and value.dim() and len(value) == self.runs:
            return value[index.to(value.device)]
        return value

    def real(self, length: int) -> Tensor:
        """Whether each position of an output of this length stands for a token, not for padding: bool (B, length)."""
        if "decoder_input_ids" in self.kwargs:
            mask = self.kwargs.get("decoder_attention_mask")
        elif isinstance(self.units, TextUnits):  # not the attention mask: an intervention may have changed that
            mask = ~torch.tensor(self.units.padding)
        else:
            mask = None
        if mask is None or mask.shape[1] != length:
            return torch.ones(self.rows, length, dtype=torch.bool)
        return mask.bool().cpu()


def encode(tokenizer: object, texts: Sequence[str | tuple[str, str]], *, pad_id: int, limit: int | None = None,
           template: bool = False) -> tuple[dict[str, Tensor], TextUnits]:
    """Texts, or pairs of texts, as the tensors a model takes, padded on the tokenizer's side (see `pad`).

    The tokenizer is not changed: one without a pad token stays so. A pair counts as one text, a space between.

    Args: texts: B of them, none empty. pad_id: what fills short rows. limit: cut longer rows to it; None: no limit.
        template: the texts have their special tokens already, as a chat template writes them.
    Returns: tensors (B, T) by name, `attention_mask` among them, and the units.
    Raises: ValueError for a text that has no token.
    """
    options = {"return_special_tokens_mask": True, "return_attention_mask": True, "verbose": False}
    options |= {"return_offsets_mapping": tokenizer.is_fast, "add_special_tokens": not template}
    if limit is not None:
        options |= {"truncation": True, "max_length": limit}
    pairs = isinstance(texts[0], tuple)
    encoded = tokenizer(*(map(list, zip(*texts)) if pairs else [list(texts)]), **options)
    special = encoded.pop("special_tokens_mask")
    offsets = encoded.pop("offset_mapping", None)
    for text, marks in zip(texts, special):
        if all(marks):
            raise ValueError(f"the tokenizer finds no token in {text!r}; give a text with words it can read")
    shifts = [len(first) + 1 for first, _ in texts] if pairs else []
    if offsets is not None and pairs:
        offsets = [_joined(encoded.sequence_ids(row), offsets[row], shift) for row, shift in enumerate(shifts)]
    padded, left = pad({"special": special, **encoded}, tokenizer, pad_id)
    special = padded.pop("special")
    if offsets is None:
        return padded, from_ids(padded["input_ids"], padded["attention_mask"], tokenizer, special=special)
    width = padded["input_ids"].shape[1]
    offsets = [_fill(list(row), (0, 0), width, left) for row in offsets]
    whole = [" ".join(text) if pairs else text for text in texts]
    found = assemble(padded["input_ids"], padded["attention_mask"], tokenizer, special, (whole, offsets))
    return padded, replace(found, seconds=shifts) if pairs else found


def pad(columns: Mapping[str, list[list[int]]], tokenizer: object, pad_id: int) -> tuple[dict[str, Tensor], bool]:
    """Lists of unequal length as tensors (B, T), and whether the padding is on the left."""
    # models read a class token at index 0, so that one in front stays there whatever the tokenizer is set to
    classed = {row[0] for row in columns["input_ids"]} == {getattr(tokenizer, "cls_token_id", None)}
    left = getattr(tokenizer, "padding_side", "right") == "left" and not classed
    fills = {"input_ids": pad_id, "special": 1, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    width = max(map(len, columns["input_ids"]))
    filled = {name: [_fill(list(row), fills.get(name, 0), width, left) for row in columns[name]] for name in columns}
    return {name: torch.tensor(rows) for name, rows in filled.items()}, left


def from_ids(ids: Tensor, mask: Tensor, tokenizer: object | None = None, *, special: Tensor | None = None) -> TextUnits:
    """Units of token ids whose text is not known: it is put together from the tokens, by their spelling.

    A token starts a word if it has a mark for a leading space, or, in vocabularies that mark the inside of words with
    ##, unless it has that. Without a tokenizer each token is a word, spelled by its id.

    Args: ids: token ids, (B, T). mask: 1 for tokens, 0 for padding, (B, T). special: 1 for special tokens, (B, T).
    """
    if special is None:
        special = _special(ids, tokenizer)
    rows = []
    for row_ids, row_special in zip(ids.tolist(), (special.bool() | ~mask.bool()).tolist()):
        pieces = _pieces(row_ids, tokenizer)
        rows.append(_placed(["" if skip else piece for piece, skip in zip(pieces, row_special)]))
    texts, offsets = zip(*rows)
    return assemble(ids, mask, tokenizer, special, (list(texts), list(offsets)))


def assemble(ids: Tensor, mask: Tensor, tokenizer: object | None, special: Tensor,
             placed: tuple[list[str], list[list[tuple[int, int]]]]) -> TextUnits:
    """Units of token ids, (B, T), whose texts and offsets in them, one a token, are known: `placed`."""
    texts, offsets = placed
    tokens = [_spelled(row, tokenizer) for row in ids.tolist()]
    padding = ~mask.bool().cpu()
    special = (special.bool().cpu() | padding).tolist()
    found = [_words(*row) for row in zip(texts, tokens, offsets, special)]
    words, word_ids = (list(column) for column in zip(*found))
    return TextUnits(tokens, words, word_ids, offsets, texts, special, padding.tolist())


def _moved(value: object, device: torch.device | str) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


def _words(text: str, tokens: list[str], offsets: list[tuple[int, int]], outside: list[bool]
           ) -> tuple[list[str], list[int | None]]:
    """Words of a text and, for each token, the index of its word.

    Spaces that are tokens ("\u2581" before "3.14") belong to the word behind them; newlines are words.
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    words: list[tuple[int, int]] = []
    shown: dict[int, str] = {}  # words that are not of a span: a newline, spaces at the end, a token that shows nothing
    word_ids: list[int | None] = []
    last, word = -1, -1  # the last span that is covered, and its word
    ahead: list[int] = []  # tokens of spaces, until their word comes
    for t, (token, offset, skip) in enumerate(zip(tokens, offsets, outside, strict=True)):
        word_ids.append(None)
        start, end = _stripped(text, *offset)
        if skip:
            continue
        ahead.append(t)
        covered = _covered(spans, start, end, max(last, 0))
        if not covered:
            if set(text[slice(*offset)]) == {" "}:
                continue
            shown[len(words)] = text[slice(*offset)] or token
            words.append(offset)
            at = len(words) - 1
        elif covered[0] == last:
            at, words[word] = word, (words[word][0], spans[covered[-1]][1])
        else:
            words.append((spans[covered[0]][0], spans[covered[-1]][1]))
            at = word = len(words) - 1
        last = covered[-1] if covered else last
        for waiting in ahead:
            word_ids[waiting] = at
        ahead = []
    if ahead:
        shown[len(words)] = " "
        word_ids = [len(words) if t in ahead else at for t, at in enumerate(word_ids)]
        words.append((0, 0))
    return [shown.get(i, text[slice(*span)]) for i, span in enumerate(words)], word_ids


def _covered(spans: list[tuple[int, int]], start: int, end: int, first: int) -> list[int]:
    """Indices, from `first` on, of the spans that share a character with start to end."""
    near = takewhile(lambda i: spans[i][0] < end, range(first, len(spans)))
    return [i for i in near if start < min(end, spans[i][1])]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _joined(sequences: list[int | None], offsets: list[tuple[int, int]], shift: int) -> list[tuple[int, int]]:
    """Offsets into a pair of texts as offsets into the two joined by a space."""
    moved = [shift if sequence == 1 else 0 for sequence in sequences]
    return [(start + by, end + by) for (start, end), by in zip(offsets, moved)]


def _fill(row: list, value: object, width: int, left: bool) -> list:
    filling = [value] * (width - len(row))
    return filling + row if left else row + filling


def _special(ids: Tensor, tokenizer: object | None) -> Tensor:
    """Whether each id is one that tokenizers put around a text; a mask or unknown token stands for a word."""
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")
    known = [getattr(tokenizer, name, None) for name in names]
    return torch.isin(ids, torch.tensor([i for i in known if i is not None], dtype=ids.dtype, device=ids.device))


def _spelled(ids: list[int], tokenizer: object | None) -> list[str]:
    if tokenizer is None:
        return [str(i) for i in ids]
    # ids beyond the tokenizer's vocabulary occur where the embedding is padded to a round size
    return [str(i) if token is None else token for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids))]


def _pieces(ids: list[int], tokenizer: object | None) -> list[str]:
    """What each token adds to the text, its leading space included."""
    tokens = _spelled(ids, tokenizer)
    if tokenizer is None:
        return [" " + token for token in tokens]
    vocabulary = tokenizer.get_vocab()
    # asked first, since byte-level vocabularies have "##" as a token too
    spaced = any(token.startswith(_SPACE_MARKS) for token in vocabulary)
    if not spaced and any(token.startswith("##") for token in vocabulary):
        return [token[2:] if token.startswith("##") else " " + token for token in tokens]
    shown = [tokenizer.convert_tokens_to_string([token]) for token in tokens]
    starts = [token.startswith(_SPACE_MARKS) for token in tokens]
    return [" " + text.lstrip(" ") if start else text for text, start in zip(shown, starts)]


def _placed(pieces: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Pieces joined to a text without a leading space, and where each is in it."""
    text, offsets = "", []
    for piece in pieces:
        piece = piece if text else piece.lstrip(" ")
        offsets.append((len(text), len(text) + len(piece)) if piece else (0, 0))
        text += piece
    return text, offsets


def _png(image: Tensor) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _from_png(image: str) -> Tensor:
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(image)))))
