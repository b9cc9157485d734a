"""Where in a model: a layer, its attention or MLP, a head or neuron, at a position. One text form for all uses.

`L5` is what layer 5 adds to the residual stream and passes on, `L5.attn` its attention's output, `L5.attn.H3` one head,
`L5.mlp` its MLP's output, `L5.mlp.N17` one neuron, `embed` the embedded input; `@7` or `@-1` adds a position, and `*`
stands for every layer, head or neuron.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

ALL = None
"""In the place of a number: every one (`*`)."""

_FORM = re.compile(r"(?:(?P<embed>embed)|L(?P<layer>\d+|\*)"
                   r"(?:\.(?P<part>attn|mlp)(?:\.(?P<unit>[HN])(?P<index>\d+|\*))?)?)(?:@(?P<position>-?\d+))?")


@dataclass(frozen=True)
class Address:
    """A place in a model, or a pattern of places.

    `part` is "embed", "layer", "attn" or "mlp"; `unit` "H" (head, of attn), "N" (neuron, of mlp) or None for the whole
    part; `layer` and `index` are numbers or `ALL`; `position` counts tokens, from the end where negative.
    """

    part: str
    layer: int | None = None
    unit: str | None = None
    index: int | None = None
    position: int | None = None

    @staticmethod
    def parse(text: str) -> Address:
        """The address that `text` means.

        >>> Address.parse("L5.attn.H3@-1")
        Address(part='attn', layer=5, unit='H', index=3, position=-1)
        >>> str(Address.parse("L*.attn.H*"))
        'L*.attn.H*'

        Raises: ValueError for a text that is no address.
        """
        found = _FORM.fullmatch(text) if isinstance(text, str) else None
        if found is None or (found["unit"] and found["unit"] != {"attn": "H", "mlp": "N"}[found["part"]]):
            raise ValueError(f"{text!r} is no address; write L5, L5.attn, L5.attn.H3, L5.mlp, L5.mlp.N17 or embed, "
                             "with @7 or @-1 for a position and * for every layer, head or neuron")
        position = None if found["position"] is None else int(found["position"])
        if found["embed"]:
            return Address("embed", position=position)
        part, layer, index = found["part"] or "layer", _number(found["layer"]), _number(found["index"])
        return Address(part, layer, found["unit"], index, position)

    def __str__(self) -> str:
        if self.part == "embed":
            text = "embed"
        else:
            part = "" if self.part == "layer" else f".{self.part}"
            unit = "" if self.unit is None else f".{self.unit}{'*' if self.index is ALL else self.index}"
            text = f"L{'*' if self.layer is ALL else self.layer}{part}{unit}"
        return text if self.position is None else f"{text}@{self.position}"


def _number(text: str | None) -> int | None:
    return ALL if text in (None, "*") else int(text)
