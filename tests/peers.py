"""Models and numbers that the original codes of circuit discovery left in the reference folder."""
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor, nn

CASES = ("circuits_gpt2_a", "circuits_llama_a", "circuits_neox_a")


@dataclass(frozen=True, eq=False)
class Case:
    """A model in float64, pairs of token ids (B, T), labels (B, 2), and what was computed, by name without "out."."""

    model: nn.Module
    clean: Tensor
    corrupted: Tensor
    labels: Tensor
    out: dict[str, Tensor]
    about: dict

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Their sources and destinations by our addresses."""
        return [place(one) for one in self.about["index"]["sources"]], [
            place(one) for one in self.about["index"]["destinations"]]


def place(text: str) -> str:
    """The address of "a0.h1<q>", "m2", "input" or "logits".

    >>> place("a0.h1<q>"), place("a0.h1"), place("m2"), place("input")
    ('L0.attn.H1.q', 'L0.attn.H1', 'L2.mlp', 'embed')
    """
    if text in ("input", "embed", "logits"):
        return "logits" if text == "logits" else "embed"
    if text[0] == "m":
        return f"L{text[1:]}.mlp"
    node, _, inner = text.rstrip(">").partition("<")
    layer, head = node[1:].split(".h")
    return f"L{layer}.attn.H{head}{'.' if inner else ''}{inner}"


@cache
def case(folder: Path, name: str) -> Case:
    """The reference of this name."""
    import transformers
    from safetensors.torch import load_file

    about, tensors = json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")
    cls = getattr(transformers, about["model_class"])
    model = cls(cls.config_class(**about["hf_config"]))
    model.load_state_dict({key.removeprefix("model."): value for key, value in tensors.items()
                           if key.startswith("model.")}, strict=False)
    out = {key.removeprefix("out."): value for key, value in tensors.items() if key.startswith("out.")}
    return Case(model.double().eval(), *(tensors[f"input.{key}"] for key in ("clean", "corrupt", "labels")), out, about)
