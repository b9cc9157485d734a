"""The running account of one backward pass: what each absorber took, row by row.

An entry is booked when a gradient passes: the relevance of a constant is constant x its relevance per unit, and an op
whose rule does not conserve books what came in less what went out.
"""

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from .chunk import entries

BIAS, SOFTMAX, STABILIZER, CONSTANT = "biases", "softmax", "stabilizer", "other constants"
ACTIVATION, NORM, PRODUCT = "activations", "norms", "products"
POSITIONS, QUANTIZED = "position embeddings", "quantized layers"

READERS, _KEPT = "_relprop_readers", "_relprop_kept"
_ROUNDED = 1e-4  # more than this of what is added up is not lost to rounding


class Kept:
    """The value that a tensor has now, for the way back. Its memory is the tensor's until that is written to."""

    def __init__(self, t: Tensor) -> None:
        self.value = t.detach()
        t.untyped_storage().__dict__.setdefault(_KEPT, WeakSet()).add(self)


def preserve(t: Tensor) -> None:
    """To be called before a tensor is written to: what is kept of it is copied first."""
    for kept in t.untyped_storage().__dict__.pop(_KEPT, ()):
        kept.value = kept.value.clone()


def _passed(t: Tensor, take: Callable[[Tensor], None]) -> None:
    """Hands over what passes `t` on the way back; of a tensor that nothing reaches torch may call with nothing."""
    t.register_hook(lambda g: None if g is None else take(g))


class Rows:
    """The number of rows of the batch, and where they are in a tensor.

    `exact` turns False when a tensor could not be split into them; the caller then explains the rows one at a time.
    """

    def __init__(self, count: int) -> None:
        self.count, self.exact = count, True

    def dim(self, t: Tensor, *, sure: bool = False) -> int | None:
        """The dimension that holds the rows, alone or as the slowest of several folded together; None if unclear.

        `sure`: a tensor whose first dimension could hold them, but whose second as well, is taken for unclear.
        """
        others = [dim for dim, size in enumerate(t.shape) if dim and size == self.count]
        first = bool(t.dim()) and t.shape[0] % self.count == 0
        if self.count == 1 or (first and not (sure and others)):
            return 0
        if first or not others:
            self.exact = False
            return None
        return others[0]


class Journal:
    """Absorbed relevance by name, each a float64 tensor of one entry a row of the batch, summed in `precision`.

    `exact_rows` turns False when a tensor could not be split into the rows of the batch; the sums over the batch are
    right even then, and the caller explains the rows one at a time. `places` holds what position embeddings took at
    each position, (B, T) by the number of positions T, as far as these are known.
    """

    def __init__(self, rows: int | Rows, precision: torch.dtype = torch.float32) -> None:
        self.layout = rows if isinstance(rows, Rows) else Rows(rows)
        self.rows, self.precision = self.layout.count, precision
        self.absorbed: dict[str, Tensor] = {}
        self.places: dict[int, Tensor] = {}

    @property
    def exact_rows(self) -> bool:
        return self.layout.exact

    def book(self, name: str, amount: Tensor) -> None:
        """Add `amount`, (B,), to what `name` took."""
        amount = amount.detach().to("cpu", torch.float64)
        before = self.absorbed.get(name)
        self.absorbed[name] = amount if before is None else before + amount

    def constant(self, name: str, constant: Tensor | float, output: Tensor) -> None:
        """Book what a constant that was added takes: constant x relevance per unit of `output`."""
        if not isinstance(constant, Tensor):
            constant = torch.tensor(float(constant), dtype=output.dtype, device=output.device)
        kept = Kept(constant)
        _passed(output, lambda g: self.book(name, self.dot(g, kept.value)))

    def position(self, constant: Tensor, output: Tensor, *, scores: bool) -> None:
        """Note at which positions a constant that was added takes what it takes. `scores`: these are attention scores
        (B, H, T, S), and a position in them is that of a key.
        """
        kept = Kept(constant)
        _passed(output, lambda g: self.place(g, kept.value, along=-1 if scores else None))

    def rotation(self, constant: Tensor, output: Tensor) -> None:
        """Book for the positions as much relevance as rotated queries or keys keep; of what reaches `output` half is to
        come here. The positions are where `constant`, the cosines, varies beside the last dimension.
        """
        kept, shape = Kept(output), constant.shape
        first = 1 if len(shape) == output.dim() and shape[0] == self.rows else 0
        along = next((dim - len(shape) for dim in range(len(shape) - 2, first - 1, -1) if shape[dim] > 1), -2)

        def book(g: Tensor) -> None:
            self.book(POSITIONS, self.dot(g, kept.value))
            self.place(g, kept.value, along=along)

        _passed(output, book)

    def place(self, g: Tensor, x: Tensor, *, along: int | None) -> None:
        """Add the sum of g x at each position to `places`. Positions lie `along` a dimension; None: between the rows
        and the features, which come last.
        """
        g = g.detach().to(torch.promote_types(g.dtype, self.precision))
        product = (g * x.to(g.dtype)).nan_to_num(0.0, 0.0, 0.0)
        if along is not None and product.dim() == 3 and product.shape[0] % self.rows == 0:
            product = product.unflatten(0, (self.rows, -1))  # (B H, T, S)
        rows = self.layout.dim(product)
        if rows is None or (product.shape[rows] != self.rows and (along is not None or product.dim() != 2)):
            return  # windows
        by_row = product.movedim(rows, 0)
        if along is not None:
            by_row = by_row.movedim(along + product.dim(), 1).unsqueeze(-1).flatten(2)  # (B, T, all else)
        found = by_row.reshape(self.rows, -1, by_row.shape[-1]) if along is None else by_row
        found = found.sum(-1, dtype=torch.float64).to("cpu")  # (B, T)
        before = self.places.get(found.shape[1])
        self.places[found.shape[1]] = found if before is None else before + found

    def difference(self, name: str, output: Tensor, inputs: list[Tensor]) -> None:
        """Book what came in at `output` less what went out at `inputs`, which must feed this op alone (aliases)."""
        kept = Kept(output)
        _passed(output, lambda g: self.book(name, self.dot(g, kept.value)))
        for x in inputs:
            _passed(x, self._outgoing(name, Kept(x)))

    def _outgoing(self, name: str, x: Kept) -> Callable[[Tensor], None]:
        return lambda g: self.book(name, -self.dot(g, x.value))

    def within(self, name: str) -> "Journal":
        """A journal whose entries go to this one, out of what `name` took: names for the parts of a difference."""
        return _Within(self, name)

    def shared(self, name: str, x: Tensor, alias: Tensor) -> None:
        """Book what is lost where the gradients of several readers of `x` are added up in x's own precision.

        Each reader is given an `alias` of its own. A reader that was not is no rounding, and nothing is booked.
        """
        held = Kept(x)
        version, parts = getattr(x, READERS, (None, []))
        if version != x._version:  # a tensor written to has new readers
            parts: list[tuple[Tensor, Tensor]] = []
            setattr(x, READERS, (x._version, parts))
            _passed(x, lambda g: self._settle(name, parts, self.dot(g, held.value)))
        _passed(alias, lambda g: parts.append((self.dot(g, held.value), self.dot(g.abs(), held.value.abs()))))

    def _settle(self, name: str, parts: list[tuple[Tensor, Tensor]], total: Tensor) -> None:
        lost, size = sum(part for part, _ in parts) - total, sum(size for _, size in parts)
        if parts and bool((lost.abs() <= _ROUNDED * size).all()):
            self.book(name, lost)

    def dot(self, g: Tensor, x: Tensor, *, magnitude: bool = False) -> Tensor:
        """Sum of g x, or of its `magnitude`, over all but the rows of the batch, (B,). `x` broadcasts to `g`."""
        g = g.detach().to(torch.promote_types(g.dtype, self.precision))
        x = x.to(g.dtype)
        total = self._dot(g, x, magnitude)
        if torch.isfinite(total).all():
            return total
        finite = torch.isfinite(x)  # a masked score passes nothing back: 0, not 0 x inf
        return self._dot(g, x.masked_fill(~finite, 0), magnitude) if not finite.all() else total

    def _dot(self, g: Tensor, x: Tensor, magnitude: bool) -> Tensor:
        if g.numel() == 0:
            return g.new_zeros(self.rows)
        rows = self.layout.dim(g)
        if rows is None:
            product = (g * x).abs_() if magnitude else g * x
            return (product.sum() / self.rows).expand(self.rows)
        lasting = x.dim() and x.numel() == x.shape[-1] == g.shape[-1] and g.dim() > 1  # one number a feature
        if lasting and rows == 0 and not magnitude:
            per_position = torch.mv(g.reshape(-1, g.shape[-1]), x.reshape(-1))  # a bias: one pass over g
            return per_position.reshape(self.rows, -1).sum(1, dtype=torch.float64)
        if rows == 0 and g.dim() > 2 and g.numel() > entries():
            several = max(1, entries() // g.shape[-1])
            pairs = zip(*(t.reshape(-1, g.shape[-1]).split(several) for t in (g, x.expand(g.shape))), strict=True)
            product = torch.cat([((a * b).abs_() if magnitude else a * b).sum(-1) for a, b in pairs])
        else:
            product = ((g * x).abs_() if magnitude else g * x).movedim(rows, 0)
            # features in g's precision, in pairs: more exact than a dot product, and faster
            product = product.sum(-1) if product.dim() > 2 else product
        return product.reshape(self.rows, -1).sum(1, dtype=torch.float64)


class _Within(Journal):
    """Passes entries on to a whole journal, and takes them out of what one name took there."""

    def __init__(self, whole: Journal, name: str) -> None:
        super().__init__(whole.layout, whole.precision)
        self.whole, self.name = whole, name

    def book(self, name: str, amount: Tensor) -> None:
        self.whole.book(name, amount)
        self.whole.book(self.name, -amount)
