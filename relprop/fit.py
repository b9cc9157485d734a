"""Whether a model can be explained as it was given, and whether what came with it belongs to it: errors at the door."""
from __future__ import annotations

from torch import Tensor, nn
from torch.jit import ScriptModule

from . import family


def module(model: nn.Module) -> nn.Module:
    """The module to explain: the one inside, of a wrapper that runs it as it is.

    Raises: ValueError for a module whose operations are out of sight.
    """
    model = family.unwrapped(model)
    hidden = next((path for path, one in model.named_modules() if isinstance(one, ScriptModule)), None)
    if hidden is not None:
        what = f"{hidden} of {type(model).__name__}" if hidden else f"{type(model).__name__}"
        raise ValueError(f"{what} is compiled by torch.jit, so that its operations are out of sight; give the module "
                         "that it was made from")
    return model


def processor(facts: family.Facts, given: object) -> None:
    """Nothing, if the processor may be the model's.

    Raises: ValueError for one of another kind of input.
    """
    tokenizes, pictures = hasattr(given, "convert_ids_to_tokens"), hasattr(given, "image_mean")
    if facts.modality == "image" and tokenizes:
        raise ValueError(f"{type(given).__name__} reads texts, and {facts.name} takes images; give the image processor "
                         "that belongs to it")
    if facts.modality == "text" and pictures and not hasattr(given, "tokenizer"):
        raise ValueError(f"{type(given).__name__} reads images, and {facts.name} takes texts; give the tokenizer that "
                         "belongs to it")


def vocabulary(ids: Tensor, size: int | None, tokenizer: object, name: str) -> None:
    """Nothing, if the model has an embedding for what the tokenizer made of a text.

    Raises: ValueError that names the first token for which it has none.
    """
    if size is None or int(ids.max()) < size:
        return
    token = int(ids[ids >= size][0])
    raise ValueError(f"the tokenizer gives {tokenizer.convert_ids_to_tokens(token)!r} the id {token}, and {name} has "
                     f"embeddings of 0 to {size - 1}; use the tokenizer that belongs to it")


def weights(model: nn.Module, name: str) -> None:
    """Nothing, if all weights have values. What accelerate keeps on the CPU or on a disk until it is used has.

    Raises: ValueError that names the first one on the meta device.
    """
    offloaded = tuple(path for path, one in model.named_modules() if hasattr(one, "_hf_hook"))
    for path, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta and not any(not at or path.startswith(f"{at}.") for at in offloaded):
            raise ValueError(f"{path} of {name} is on the meta device, where tensors have no values; load its weights, "
                             "with from_pretrained or by model.to_empty(device=...) and load_state_dict")


def devices(model: nn.Module) -> str:
    """Where the model's weights are, in words, if they are in several places; else nothing."""
    found: dict[str, str] = {}
    for path, value in [*model.named_parameters(), *model.named_buffers()]:
        found.setdefault(str(value.device), path)
    return ", ".join(f"{path} on {device}" for device, path in found.items()) if len(found) > 1 else ""
