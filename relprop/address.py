"""Where in a model: the residual stream, an attention or MLP, a head or neuron, at a position. One text for all uses.

| text | place |
| --- | --- |
| `embed` | the embedded input: words, or the patches of a picture |
| `L5.in`, `L5.mid`, `L5` | the residual stream before layer 5, between its attention and its MLP, and after it |
| `L5.attn`, `L5.mlp` | what its attention's output projection gives, and its MLP |
| `L5.attn.H3`, `L5.mlp.N17` | one head, as it enters the output projection, and one neuron of the MLP |
| `L5.attn.H3.pattern`, `L5.attn.pattern` | the attention pattern of a head, and of all heads |
| `L5.attn.H3.q`, `.k`, `.v` | what a head's queries, keys and values are made from: the stream before the norm |
| `L5.cross`, `L5.cross.H3`, `L5.cross.H3.pattern` | the same of a decoder's attention to the encoder |
| `logits` | what the logits are made from: the residual stream before the final norm |

`*` stands for every layer, head or neuron. `@` adds positions of the row's own tokens, padding left out: `@7`, `@-1`
from the end, `@3,5-7` several (of relevance then the sum), `@cls` the class token, `@p12` patch 12, counted from 0
behind the class and register tokens, `@profession` a span that the caller names. Of a pattern the positions are those
of the queries. Layers are counted as they run, an encoder's before its decoder's.

`.q`, `.k`, `.v` and `logits` are where edges of a circuit end, as is `L5.mlp`, of which it is then the input before the
norm. Heads are those of the queries, also where several share a key: `L5.attn.H3.k` is head 3's own use of it.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

ALL = None
"""In the place of a number: every one (`*`)."""

Spans = Mapping[str, "int | Sequence[int] | Sequence[Sequence[int]]"]
"""Positions by name: one, several, or for each row of the batch its own several."""

_FORM = re.compile(r"(?:(?P<alone>embed|logits)|L(?P<layer>\d+|\*)(?:\.(?P<part>in|mid|attn|cross|mlp)"
                   r"(?:\.(?P<unit>[HN])(?P<index>\d+|\*))?(?:\.(?P<inner>pattern|q|k|v))?)?)(?:@(?P<position>.+))?")
_UNITS = {"attn": "H", "cross": "H", "mlp": "N"}
INPUTS = ("q", "k", "v")
"""What a head reads: of `inner`, those that are ends of edges."""
_ONE, _SOME = re.compile(r"-?\d+"), re.compile(r"(?P<patch>p?)(?P<first>-?\d+)(?:-(?P<last>\d+))?")
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Address:
    """A place in a model, or a pattern of places.

    `part` is "embed", "in", "mid", "layer" (the stream after it), "attn", "cross", "mlp" or "logits"; `unit` "H" (head)
    or "N" (neuron), or None for the whole part; `layer` and `index` are numbers or `ALL`; `position` is a number, from
    the end where negative, or the text of several, of a patch or of a name; `inner` is "pattern", "q", "k", "v", None.
    """

    part: str
    layer: int | None = None
    unit: str | None = None
    index: int | None = None
    position: int | str | None = None
    inner: str | None = None

    @staticmethod
    def parse(text: str) -> Address:
        """The address that `text` means.

        >>> Address.parse("L5.attn.H3@-1")
        Address(part='attn', layer=5, unit='H', index=3, position=-1, inner=None)
        >>> str(Address.parse("L*.attn.H*.pattern@3,5-7"))
        'L*.attn.H*.pattern@3,5-7'

        Raises: ValueError for a text that is no address.
        """
        found = _FORM.fullmatch(text) if isinstance(text, str) else None
        misplaced = found is not None and (
            (found["unit"] and found["unit"] != _UNITS.get(found["part"]))
            or (found["inner"] and _UNITS.get(found["part"]) != "H")
            or (found["inner"] in INPUTS and not found["unit"]))
        if found is None or misplaced:
            raise ValueError(f"{text!r} is no address; write L5, L5.in, L5.mid, L5.attn, L5.attn.H3, L5.cross, L5.mlp, "
                             "L5.mlp.N17, L5.attn.H3.pattern, L5.attn.H3.q, embed or logits, with @7, @-1, @3,5-7, "
                             "@cls, @p12 or a name for positions, and * for every layer, head or neuron")
        position = _position(found["position"], text)
        if found["alone"]:
            return Address(found["alone"], position=position)
        part, layer, index = found["part"] or "layer", _number(found["layer"]), _number(found["index"])
        return Address(part, layer, found["unit"], index, position, found["inner"])

    def __str__(self) -> str:
        if self.part in ("embed", "logits"):
            text = self.part
        else:
            part = "" if self.part == "layer" else f".{self.part}"
            unit = "" if self.unit is None else f".{self.unit}{'*' if self.index is ALL else self.index}"
            inner = "" if self.inner is None else f".{self.inner}"
            text = f"L{'*' if self.layer is ALL else self.layer}{part}{unit}{inner}"
        return text if self.position is None else f"{text}@{self.position}"

    @property
    def whole(self) -> Address:
        """The same place at all positions."""
        return replace(self, position=None)

    def matches(self, place: Address) -> bool:
        """Whether this, maybe a pattern, means `place`.

        >>> Address.parse("L*.attn.H2").matches(Address.parse("L7.attn.H2"))
        True
        """
        same = all(getattr(self, name) == getattr(place, name) for name in ("part", "unit", "position", "inner"))
        return same and all(getattr(self, name) in (ALL, getattr(place, name)) for name in ("layer", "index"))


def located(position: int | str, count: int, *, row: int = 0, prefix: int | None = None, classed: bool = True,
            spans: Spans | None = None) -> list[int]:
    """Which of a row's positions, numbered without its padding, an address's `position` means.

    Args: count: of the row's positions. row: for spans that each row has its own of. prefix: class and register tokens
        before the patches of a picture; None: no picture. classed: whether the first position is a class token.
        spans: positions by name.
    Raises: ValueError for a position that the row does not have, or a name that was not given.

    >>> located("0,2-3,-1", 9), located("p1", 5, prefix=1), located("job", 9, spans={"job": range(2, 4)})
    ([0, 2, 3, 8], [2], [2, 3])
    """
    text = str(position)
    if spans and text in spans:
        found = _span(text, spans[text], row)
    elif text == "cls":
        if not classed or prefix == 0:
            raise ValueError("@cls: there is no class token; give a number, such as @0")
        found = [0]
    elif _NAME.fullmatch(text) and _SOME.fullmatch(text) is None:
        raise ValueError(f"@{text}: no span of this name was given; there is {', '.join(spans or ()) or 'none'}")
    else:
        found = [one for part in text.split(",") for one in _numbered(part, prefix)]
    wrong = [one for one in found if not -count <= one < count]
    if wrong or not found:
        some = f"0 to {count - 1}, or -1 to -{count} from the end"
        some = f"p0 to p{count - 1 - prefix}" if prefix is not None and text.startswith("p") else some
        raise ValueError(f"@{text}: row {row} has {count} positions, so {wrong[0] if wrong else 'nothing'} is not one "
                         f"of them; give {some}")
    return [one % count for one in found]


def _numbered(part: str, prefix: int | None) -> list[int]:
    found = _SOME.fullmatch(part)
    if found["patch"] and prefix is None:
        raise ValueError(f"@{part}: only a picture has patches; give a number")
    shift = prefix if found["patch"] else 0
    first = int(found["first"])
    last = first if found["last"] is None else int(found["last"])
    return [one + shift for one in range(first, last + 1)]


def of_rows(spans: Spans | None, rows: Sequence[int]) -> Spans | None:
    """The spans of these rows, where rows have their own.

    >>> of_rows({"verb": [[1, 2], [1]], "all": [0, 1]}, [1])
    {'verb': [[1]], 'all': [0, 1]}
    """
    if spans is None:
        return None
    return {name: span if isinstance(span, int) or _common(span) else [span[row] for row in rows if row < len(span)]
            for name, span in spans.items()}


def _common(span: Sequence[int] | Sequence[Sequence[int]]) -> bool:
    """Whether a span is that of every row."""
    return all(isinstance(one, int) for one in span)


def _span(name: str, span: int | Sequence[int] | Sequence[Sequence[int]], row: int) -> list[int]:
    if isinstance(span, int):
        return [span]
    of_row = [*span]
    if of_row and not isinstance(of_row[0], int):
        if row >= len(of_row):
            raise ValueError(f"@{name}: a span of {len(of_row)} rows has none for row {row}")
        return [*of_row[row]]
    return of_row


def _position(text: str | None, whole: str) -> int | str | None:
    if text is None:
        return None
    if _ONE.fullmatch(text):
        return int(text)
    if _NAME.fullmatch(text):
        return text
    for part in text.split(","):
        found = _SOME.fullmatch(part)
        backwards = found and found["last"] is not None and int(found["last"]) < int(found["first"])
        if found is None or backwards or (found["last"] is not None and found["first"].startswith("-")):
            raise ValueError(f"{part!r} of {whole!r} is no position; write 7, -1, 5-7, several with commas, cls, p12, "
                             "or the name of a span")
    return text


def _number(text: str | None) -> int | None:
    return ALL if text in (None, "*") else int(text)
