"""Units taken out of a model's input: which there are, and what stands in their place."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import neutral, rows, units
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, ImageUnits, TextUnits

DELETE = "delete"


@dataclass(frozen=True)
class Removal:
    """How units are taken out of the rows of one batch.

    Args: groups: number of each entry's unit, -1 for none, (B, ...) as a map. counts: units of each row, (B,).
        baseline: name of what stands in their place. without: (rows (R,), gone (R, U) bool) -> those rows without
        those units.
    """

    groups: Tensor
    counts: Tensor
    baseline: str
    without: Callable[[Tensor, Tensor], Batch]


def removal(subject: Subject, batch: Batch, *, baseline: str | int | None = None, by: str | None = None) -> Removal:
    """How units are taken out of this batch. Special tokens, padding and prefix tokens are no units.

    Args: baseline: for text a token of `neutral.token` (the mask token where there is one) or "delete", which hides
        tokens by the attention mask; for pictures one of `neutral.picture`; for plain tensors "mean" (over positions,
        the default with features) or "zero". Where pictures stand beside a text, one of either, and the other's
        default. by: "token" (the default) or "word", for text.
    Raises: ValueError for an unknown baseline, and for a row without anything to take out.
    """
    groups = units.groups(batch, by=by)
    counts = groups.flatten(1).amax(1) + 1
    if (counts < 1).any():
        raise ValueError(f"row {int((counts < 1).nonzero()[0])} holds nothing that could be removed")
    _, source = rows.leaf(batch)
    if batch.pictures is not None and batch.pictures.origins:
        name, without = _pictured(subject, batch, groups.to(source.device), baseline)
    elif isinstance(batch.units, TextUnits) or not source.is_floating_point():
        name, without = _text(subject, batch, groups.to(source.device), baseline)
    else:
        name, without = _filled(batch, groups.to(source.device), baseline)
    return Removal(groups, counts, name, without)


def chance(batch: Batch, groups: Tensor, row: int, seed: int) -> torch.Generator:
    """Chance of one row that depends on the seed and the row's own input, without padding, and on nothing else."""
    content, own = rows.leaf(batch)[1][row].cpu(), groups[row]
    if isinstance(batch.units, TextUnits):
        own = own[:len(content)]  # patches of pictures stand behind
    return rows.generator(seed, content[own >= 0] if content.shape == own.shape else content)


def whole(subject: Subject, batch: Batch, targets: Targets, batch_size: int) -> tuple[Targets, Tensor]:
    """The targets as the whole input fixes them, and their values, (B,), float64 on the CPU.

    To be called without gradients, the model settled.
    """
    fixed, values = [], []
    for chunk in torch.arange(batch.rows).split(batch_size):
        part = batch.take(chunk.tolist())
        output = subject.forward(part)
        own = targets.take(chunk.tolist()).fixed(output, part)
        fixed += own.targets
        values.append(own.value(output, part).double().cpu())
    return replace(targets, targets=tuple(fixed)), torch.cat(values)


def _text(subject: Subject, batch: Batch, groups: Tensor, baseline: str | int | None) -> tuple[str, Callable]:
    if baseline == DELETE:
        return "deleted (attention mask)", _hidden(batch, groups)
    token, name = neutral.token(subject.tokenizer, baseline)
    ids = rows.leaf(batch)[1]

    def without(which: Tensor, gone: Tensor) -> Batch:
        return rows.put(batch.take(which), ids[which].masked_fill(entries(gone, groups[which]), token))

    return name, without


def _hidden(batch: Batch, groups: Tensor) -> Callable:
    if "attention_mask" not in batch.kwargs:
        raise ValueError("baseline 'delete' hides tokens by the attention mask, and the model was given none; "
                         "choose a token")

    def without(which: Tensor, gone: Tensor) -> Batch:
        taken = batch.take(which)
        mask, hidden = taken.kwargs["attention_mask"], entries(gone, groups[which])
        if taken.layout is not None:
            hidden = taken.layout.spread(hidden, torch.zeros_like(mask, dtype=torch.bool))
        return replace(taken, kwargs={**taken.kwargs, "attention_mask": mask.masked_fill(hidden, 0)})

    return without


def _pictured(subject: Subject, batch: Batch, groups: Tensor, baseline: str | int | None) -> tuple[str, Callable]:
    """Of pictures that the model does not see as they are, and of the text that they stand beside."""
    pictures, name = batch.pictures, str(baseline)
    of_picture = baseline in neutral.PICTURES
    # what taking rows out of does not need is the most of a batch
    light = replace(batch, pictures=replace(pictures, origins={}))
    if isinstance(batch.units, TextUnits):
        width = rows.leaf(batch)[1].shape[1]
        name, written = _text(subject, light, groups[:, :width], None if of_picture else baseline)
        first = groups[:, :width].amax(1) + 1
    else:
        written, first, of_picture = lambda which, gone: light.take(which), groups.new_zeros(batch.rows), True
    fills, painted = _fills(batch, baseline if of_picture else None)
    units_of = {key: pictures.cells(key) for key in fills}

    def without(which: Tensor, gone: Tensor) -> Batch:
        taken = written(which, gone)
        runs = which.cpu() if batch.layout is None else batch.layout.flat(which.cpu())
        items, changed, many = pictures.items(runs.tolist()), dict(taken.kwargs), len(runs) // len(which)
        before = first.to(gone.device)[which.to(gone.device)]
        for key, fill in fills.items():
            if key not in changed:  # none of these rows has a picture
                continue
            of = taken.pictures.packing.get(key, torch.arange(len(runs))).to(gone.device) // many
            index = items.get(key, runs)
            own = units_of[key][index].to(gone.device).flatten(1)
            number = torch.where(own >= 0, own + before[of][:, None], -1)
            out = entries(gone[of], number).view(changed[key].shape)
            changed[key] = torch.where(out, fill[index.to(fill.device)], changed[key])
        return replace(taken, kwargs=changed)

    return (f"{name}, {painted}" if isinstance(batch.units, TextUnits) else painted), without


def _fills(batch: Batch, choice: str | None) -> tuple[dict[str, Tensor], str]:
    """The model's tensors of pictures that say nothing, and what they show."""
    values = {name: batch.kwargs[name] for name in batch.pictures.origins}
    if choice == "zero":
        return {name: torch.zeros_like(value) for name, value in values.items()}, "zero (mean colour of training)"
    if (batch.pictures.whole or batch.pictures).process is None:  # pixels that were prepared already
        known = {name: neutral.picture(value, choice) for name, value in values.items()}
        return {name: fill.expand_as(values[name]) for name, (fill, _) in known.items()}, next(iter(known.values()))[1]
    name = ""

    def change(image: Tensor) -> Tensor:
        nonlocal name
        pixels = image.permute(2, 0, 1)[None].float()
        fill, name = neutral.picture(pixels, choice)
        return fill.expand_as(pixels)[0].permute(1, 2, 0).round().to(torch.uint8).contiguous()

    made = batch.pictures.filled(change)
    return {key: value.to(values[key]) for key, value in made.items()}, name


def _filled(batch: Batch, groups: Tensor, baseline: str | int | None) -> tuple[str, Callable]:
    _, source = rows.leaf(batch)
    if source.ndim == 4 or isinstance(batch.units, ImageUnits):
        filler, name = neutral.picture(source, baseline)
        groups = groups[:, None]  # (B, 1, Y, X)
    else:
        filler, name = _level(source, baseline)
        groups = groups.view(*groups.shape, *[1] * (source.ndim - groups.ndim))  # (B, T, 1)

    def without(which: Tensor, gone: Tensor) -> Batch:
        changed = torch.where(entries(gone, groups[which]), filler[which], source[which])
        return rows.put(batch.take(which), changed)

    return name, without


def _level(source: Tensor, baseline: str | int | None) -> tuple[Tensor, str]:
    """What stands in place of positions (B, T, D), or of features (B, F) that have no mean in common."""
    baseline = baseline or ("mean" if source.ndim == 3 else "zero")
    if baseline == "mean":
        return source.mean(1, keepdim=True), "mean over positions"
    if baseline == "zero":
        return torch.zeros_like(source[:, :1]), "zero"
    raise ValueError(f"no baseline {baseline!r} for plain tensors; there are mean, zero")


def entries(gone: Tensor, groups: Tensor) -> Tensor:
    """Which entries of a map are gone, when these units are: (R, U) and (R, ...) to (R, ...)."""
    never = gone.new_zeros(len(gone), 1)
    flat = torch.cat([never, gone], 1).gather(1, groups.flatten(1) + 1)  # number -1 is never gone
    return flat.view(groups.shape)
