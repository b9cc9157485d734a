"""Attention followed through any architecture: self-attention, co-attention, and encoders with decoders.

Positions of one input are a *stream* (the tokens of a text, the patches of a picture, the queries of a decoder). Each
stream q keeps a row of matrices R^{q s}: what its positions hold of those of stream s. They start as R^{qq} = I and
R^{qs} = 0, and every attention of the forward pass adds to those of its queries' stream. Which matrices it reads is
taken from the data flow, not from the name of the model: two cross-attentions that read each other's stream as it was
before either, as in co-attention, both read the old ones.

Reference: H. Chefer, S. Gur, L. Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and
Encoder-Decoder Transformers", ICCV 2021, and the code that came with it. Departures from the code: every row of a
batch is explained, and by itself; where a row of R is still the identity, and its normalisation 0/0, the code drops all
that the attention adds (DETR) or gives NaN (LXMERT): here it is dropped as well, but not for a position that takes no
part, such as padding, and on request not at all; R^{qs} of three and more streams, which the paper does not have,
follow rule 11; a text's map is not divided by its sum, as the code does for CLIP.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from .. import rows, sight
from ..asked import Asked
from ..errors import IndependentOutput
from ..latents import by_gradient
from ..pattern import Attended, Pattern, attend
from ..result import Relevance
from ..run import TOKEN_NAMES
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, TensorUnits, TextUnits
from .chefer import RULES
from .readout import mapped, placed

UNDEFINED = ("drop", "keep")
Stream = Hashable
Rows = dict[Stream, Tensor]
"""R^{qs} of one stream q by s, (B, Tq, Ts)."""


@dataclass(frozen=True, eq=False)
class Link:
    """One attention, as the rules see it: `weights` (B, T, S), not negative, from stream `keys` to stream `queries`.

    `after`: numbers of the attentions whose results its queries and its keys are, -1 for none; None: of the last ones.
    """

    weights: Tensor
    queries: Stream
    keys: Stream
    after: tuple[int, int] | None = None


@dataclass(frozen=True)
class Joint:
    """Positions of another stream in a joint one: `length` of them from `start` on, as attention `after` left them."""

    stream: Stream
    length: int
    start: int
    after: int = -1


@dataclass(frozen=True)
class Flow:
    """The matrices of each stream when all attention is done, and which streams nothing but the target reads."""

    found: dict[Stream, Rows]
    last: frozenset[Stream] = field(default_factory=frozenset)


def fused(slope: Tensor, weights: Tensor) -> Tensor:
    """mean_h (dy/dA * A)+ of one attention (Chefer et al. 2021b, eq. 5), (B, T, S), float32 at least.

    Args: slope: dy/dA. weights: A, or its relevance. (B, H, T, S) both.
    """
    return (slope * weights).clamp(min=0).mean(1).to(torch.promote_types(weights.dtype, torch.float32))


def normalised(own: Tensor) -> Tensor:
    """R^{qq} with what attention added to the identity as shares of one (eqs. 8 and 9); a row without any stays.

    R_ij <- (R - I)_ij / sum_k (R - I)_ik + I_ij, with 0 for 0/0.

    >>> normalised(torch.tensor([[[2.0, 3.0], [0.0, 1.0]]]))
    tensor([[[1.2500, 0.7500],
             [0.0000, 1.0000]]])
    """
    eye = _identity(own)
    added = own - eye
    total = added.sum(-1, keepdim=True)
    return torch.where(total == 0, 0, added / total.where(total != 0, 1)) + eye


def aggregate(links: Sequence[Link], *, normalize_self: bool = True, apply_self_in_rule_10: bool = True,
              undefined: str = "drop", joints: Mapping[Stream, Sequence[Joint]] | None = None) -> Flow:
    """R of all streams after all attentions (Chefer et al. 2021b, eqs. 5 to 11).

    With A the weights of an attention of stream q to stream s:
        s = q:  R^{qo} += A R^{qo} for every o (rules 6 and 7);
        else    R^{qs} += N(R^{qq})^T A N(R^{ss}) (rule 10), R^{qo} += A R^{so} for every other o (rule 11),
    N as of `normalised`. A joint stream holds what its parts held, and only that.

    Args: links: in the order in which they ran. normalize_self: N; else the matrices as they are.
        apply_self_in_rule_10: else R^{qs} += A. undefined: what rule 10 does where N is 0/0 for a position that A has
        an entry for: "drop" what A would add, as the code does, or "keep" the identity. joints: of which streams'
        positions a joint one is made.
    """
    across = partial(_across, normalize_self=normalize_self, apply_self=apply_self_in_rule_10, keep=undefined == "keep")
    states: list[Rows] = []
    newest: dict[Stream, int] = {}
    taken: set[tuple[Stream, int]] = set()
    joints = joints or {}
    sizes = {stream: size for link in links for stream, size in zip((link.queries, link.keys), link.weights.shape[1:])}

    def state(stream: Stream, after: int) -> Rows:
        if after >= 0:
            return states[after]
        if stream not in joints:
            like = links[0].weights
            return {stream: _identity(like.new_empty(sizes[stream], sizes[stream])).expand(len(like), -1, -1)}
        taken.update((part.stream, part.after) for part in joints[stream])
        return _joined([(part, state(part.stream, part.after)) for part in joints[stream]], sizes[stream])

    for stream, parts in joints.items():
        sizes |= {part.stream: part.length for part in parts if stream in sizes}
    for place, link in enumerate(links):
        latest = tuple(newest.get(stream, -1) for stream in (link.queries, link.keys))
        of_queries, of_keys = link.after or latest
        before = state(link.queries, of_queries)
        if link.queries == link.keys:
            states.append({other: R + link.weights @ R for other, R in before.items()})
        else:
            taken.add((link.keys, of_keys))
            states.append(across(link, before, state(link.keys, of_keys)))
        newest[link.queries] = place
    return Flow({stream: states[place] for stream, place in newest.items()},
                frozenset(stream for stream, place in newest.items() if (stream, place) not in taken))


def _across(link: Link, queries: Rows, keys: Rows, *, normalize_self: bool, apply_self: bool, keep: bool) -> Rows:
    """The matrices of the queries' stream after a cross-attention."""
    found = dict(queries)
    for other, R in keys.items():
        if other != link.keys:
            added = link.weights @ R
        elif not apply_self:
            added = link.weights
        else:
            # a joint stream has no matrix of its own
            added = _rule_10(link.weights, queries.get(link.queries), R, normalize_self=normalize_self, keep=keep)
        found[other] = found[other] + added if other in found else added
    return found


def _rule_10(weights: Tensor, own: Tensor | None, keys: Tensor, *, normalize_self: bool, keep: bool) -> Tensor:
    """N(R^{qq})^T A N(R^{ss}), (B, T, S)."""
    if not normalize_self:
        return weights @ keys if own is None else own.mT @ weights @ keys
    added = weights @ normalised(keys)
    lost = _untouched(keys) & weights.any(1)  # (B, S)
    if own is not None:
        added = normalised(own).mT @ added
        lost = torch.cat([lost, _untouched(own) & weights.any(2)], 1)
    return added if keep else added.masked_fill(lost.any(1)[:, None, None], 0)


def _untouched(own: Tensor) -> Tensor:
    """Positions to which attention has added nothing yet, (B, T)."""
    return (own - _identity(own)).sum(-1) == 0


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _joined(parts: list[tuple[Joint, Rows]], length: int) -> Rows:
    """The matrices of a joint stream: those of its parts, each in its own positions."""
    found: Rows = {}
    for part, held in parts:
        for stream, R in held.items():
            whole = found.setdefault(stream, R.new_zeros(len(R), length, R.shape[-1]))
            whole[:, part.start:part.start + part.length] += R
    return found


def generic_attention(subject: Subject, batch: Batch, targets: Targets, *, start_layer: int = 0,
                      normalize_self: bool = True, apply_self_in_rule_10: bool = True, undefined: str = "drop",
                      relevance: bool = False, rules: str = "chefer", at: tuple[str, ...] = ()) -> Relevance:
    """Where attention mattered for this target, through whatever kinds of attention the model has; see `aggregate`.

    Read in the rows of the positions that the target is read from: the class token, the position that predicts, the end
    of CLIP's text, the query of a detector. Class-specific through the gradient; blind to what values and MLPs do.
    Cost: one forward and one backward that ends at the first attention; with `relevance` two backwards.

    Of several inputs, `map` is that of the text, if there is one, or of the picture, and `inputs` has all by name:
        explain(clip, {"pixel_values": p, "input_ids": i, "attention_mask": m}, method="generic-attention",
                target=lambda out: out.logits_per_image.diagonal()).inputs["pixel_values"]  # picture b for text b
        explain(t5, {"input_ids": i, "decoder_input_ids": d}, method="generic-attention").inputs["decoder_input_ids"]
        explain(detr, {"pixel_values": p}, Token(17, position=query), method="generic-attention").map

    Args: start_layer: first layer to count of each kind of attention; -1: the last alone, as the code does for CLIP.
        normalize_self, apply_self_in_rule_10, undefined: of `aggregate`, for models with cross-attention.
        relevance: LRP relevance in place of attention, `use_lrp` in the code, by `rules`: "chefer", "chefer-detr" as
        the code has it for DETR, or "chefer-lrp".
        at: addresses whose activation x gradient is kept; a forward and a backward more.
    Returns: map (B, T) for text, zero at the position that is read, which holds itself, or (B, Y, X), each patch's
        share divided evenly over its pixels. `inputs`: likewise for every input that attention reaches. Never negative;
        no unit.
    Raises: ValueError where there is no attention, or it cannot be followed; IndependentOutput where the target is read
        from no position.
    """
    if rules not in RULES:
        raise ValueError(f"no rules {rules!r}; there are {', '.join(RULES)}")
    if undefined not in UNDEFINED:
        raise ValueError(f"undefined is {' or '.join(map(repr, UNDEFINED))}, got {undefined!r}")
    asked = Asked(targets, batch)
    found = attend(subject.model, batch.args, batch.kwargs, asked, composite=RULES[rules]() if relevance else None)
    links = _links(found, start_layer=start_layer, relevance=relevance, rows=batch.rows)
    options = {"normalize_self": normalize_self, "apply_self_in_rule_10": apply_self_in_rule_10, "undefined": undefined}
    flow = aggregate(links, joints=_joints(found), **options)
    maps = {name: _placed(shares, batch, name) for name, shares in _shares(flow, found, batch).items()}
    main = str(rows.leaf(batch)[0])
    if main not in maps:
        raise ValueError(f"attention cannot be followed to {main!r}: what it connects are positions of "
                         f"{', '.join(maps) or 'no input'}; give the model {main!r} in a form whose positions it keeps")
    options |= {"start_layer": start_layer, "relevance": relevance} | ({"rules": rules} if relevance else {})
    result = mapped(subject, batch, maps[main], value=found.value, names=asked.names, method="generic-attention",
                    forwards=found.forwards, backwards=1 + relevance, unit="share of attention", **options)
    pictures, _ = sight.maps({name: _by_channel(maps[name], batch.kwargs[name]) for name in maps
                              if name in batch.kwargs and maps[name].dim() == 3}, batch)
    return replace(result, inputs={name: t.float().cpu() for name, t in maps.items()}, pictures=pictures,
                   latents=by_gradient(subject, batch, asked.targets, at))


def _by_channel(shares: Tensor, pixels: Tensor) -> Tensor:
    """A map of pixels (B, Y, X) shared evenly over their channels, (B, C, Y, X)."""
    return (shares[:, None] / pixels.shape[1]).expand(pixels.shape)


METHODS = {"generic-attention": generic_attention}


def _links(found: Attended, *, start_layer: int, relevance: bool, rows: int) -> list[Link]:
    """The attentions as links; those before `start_layer` of their kind add nothing."""
    kinds = [_streams(pattern) for pattern in found.patterns]
    many, seen, links = Counter(kinds), Counter(), []
    if not -max(many.values()) <= start_layer < max(many.values()):
        raise ValueError(f"start_layer {start_layer} is not one of the {max(many.values())} layers")
    _check(found.patterns, rows)
    for pattern, kind in zip(found.patterns, kinds, strict=True):
        weights = fused(pattern.slope, pattern.relevance if relevance else pattern.weights)
        first = start_layer if start_layer >= 0 else many[kind] + start_layer
        counts = seen[kind] >= first
        seen[kind] += 1
        links.append(Link(weights if counts else torch.zeros_like(weights), *kind,
                          (pattern.queries_after, pattern.keys_after)))
    return links


def _streams(pattern: Pattern) -> tuple[tuple[str | None, int], tuple[str | None, int]]:
    """The two streams of an attention: the input whose positions they are, and their number."""
    T, S = pattern.weights.shape[-2:]
    return (pattern.queries, T), (pattern.keys, S)


def _check(patterns: list[Pattern], rows: int) -> None:
    """Raises ValueError unless each row has its own patterns, and an input has one number of positions throughout."""
    for pattern in patterns:
        if pattern.weights.dim() != 4 or pattern.weights.shape[0] != rows:
            raise ValueError(f"attention in {pattern.path!r} has patterns of shape {tuple(pattern.weights.shape)} for "
                             f"{rows} rows; expected (B, H, T, S): no windows, no merging of tokens")
    sizes: dict[str, int] = {}
    for name, size in (stream for pattern in patterns for stream in _streams(pattern)):
        if name is not None and sizes.setdefault(name, size) != size:
            raise ValueError(f"attention cannot be followed where the positions of {name!r} change in number, from "
                             f"{sizes[name]} to {size}: no merging of tokens, no pooling of queries")


def _joints(found: Attended) -> dict[Stream, list[Joint]]:
    sizes = {name: size for pattern in found.patterns for name, size in _streams(pattern)}
    return {(name, sizes[name]): [Joint((part.name, part.length), part.length, part.start, part.after)
                                  for part in parts]
            for name, parts in found.joined.items() if name in sizes}


def _shares(flow: Flow, found: Attended, batch: Batch) -> dict[str, Tensor]:
    """What the positions that the target is read from hold of each input's, (B, T) by its name."""
    reads = {stream: found.reads[stream] for stream in flow.found if stream in flow.last and stream in found.reads}
    if not reads:
        raise ValueError("no module of the model gives (B, T, D) after its last attention, so which positions are read "
                         "is unknown")
    total = sum(read.sum(-1) for read in reads.values())
    if not (total > 0).all():
        raise IndependentOutput(f"the target of row {int((total > 0).int().argmin())} is read from no position of the "
                                "last layer")
    shares: dict[str, Tensor] = {}
    for stream, read in reads.items():
        if not read.any():
            continue
        weights = read / read.sum(-1, keepdim=True).where(read.any(-1, keepdim=True), 1)  # (B, T)
        for (name, size), R in flow.found[stream].items():
            if name is None:
                continue
            share = torch.einsum("bt,bts->bs", weights.to(R), R)
            if _is_text(name, batch):
                share = share.masked_fill(_own(weights, stream, (name, size), found) > 0.5, 0)
            shares[name] = shares.get(name, 0) + share
    return {name: share.masked_fill(_padding(name, share, batch), 0) for name, share in shares.items()}


def _own(weights: Tensor, stream: Stream, other: Stream, found: Attended) -> Tensor:
    """How much each position of a stream is read itself, (B, T), which its R holds as the identity."""
    for part in found.joined.get(stream[0], ()):
        if (part.name, part.length) == other:
            return weights[:, part.start:part.start + part.length]
    return weights if stream == other else weights.new_zeros(len(weights), other[1])


def _is_text(name: str, batch: Batch) -> bool:
    return name in TOKEN_NAMES or isinstance(batch.units, TextUnits) and name == str(rows.leaf(batch)[0])


def _padding(name: str, share: Tensor, batch: Batch) -> Tensor:
    """True at the padding of a text, (B, T)."""
    mask = batch.kwargs.get(name.replace("input_ids", "attention_mask"))
    if isinstance(batch.units, TextUnits) and name == str(rows.leaf(batch)[0]):
        mask = ~torch.tensor(batch.units.padding)
    if mask is None or mask.shape != share.shape or not _is_text(name, batch):
        return torch.zeros_like(share, dtype=torch.bool)
    return ~mask.bool().to(share.device)


def _placed(shares: Tensor, batch: Batch, name: str) -> Tensor:
    """Shares (B, T) of an input as its map: as they are, or over the pixels of a picture, (B, Y, X)."""
    place, value = rows.leaf(batch)
    if name == str(place):
        return placed(shares, batch)
    value = batch.kwargs.get(name, value)
    if value.dim() != 4:
        return shares
    return placed(shares, Batch((), {name: value}, batch.rows, TensorUnits(tuple(value.shape))))
