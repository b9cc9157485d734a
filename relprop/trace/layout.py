"""How a tensor inside a model is laid out: where its rows and its positions are, whatever the model makes of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size, Tensor


def vectors(x: Tensor, axes: tuple[int, ...], leading: int = 0) -> Tensor:
    """A tensor whose vectors lie along `axes`, (L, ...), with them side by side on its last axis; `leading` axes come
    before those that are counted.
    """
    if axes == (-1,):
        return x
    x = x.movedim([axis + leading if axis >= 0 else axis for axis in axes], [*range(-len(axes), 0)])
    return x.flatten(-len(axes)) if len(axes) > 1 else x


def laid(x: Tensor, axes: tuple[int, ...], like: Size, leading: int = 0) -> Tensor:
    """The way back from `vectors`, of a tensor of shape `like`."""
    if axes == (-1,):
        return x
    if len(axes) > 1:
        x = x.unflatten(-1, [like[axis] for axis in axes])
    return x.movedim([*range(-len(axes), 0)], [axis + leading if axis >= 0 else axis for axis in axes]).contiguous()


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch are in a tensor: `axis`, on which each row has `factor` entries; `dims` in all.

    Of (B, T, C) the axis is 0 and the factor 1, of (T, B, C) the axis is 1. Of (B T, C) the factor is T and its entries
    are positions; of (B W, T, C), such as windows of an image, they are not.
    """

    axis: int
    factor: int
    dims: int

    @property
    def positioned(self) -> bool:
        """Whether positions of the input are told apart by one axis."""
        return self.dims == 2 or self.factor == 1

    def view(self, x: Tensor, copies: int = 1) -> Tensor:
        """x, whose rows are those of a batch `copies` times, copy by copy, as (copies, R, P, C): a view of it.

        R rows of a copy and P positions; C is the last axis.
        """
        if self.dims == 2:
            return x.unflatten(0, (copies, -1, self.factor))
        x = x.movedim(self.axis, 0)
        return (x if self.dims == 3 else x.flatten(1, -2)).unflatten(0, (copies, -1))

    def tile(self, x: Tensor, copies: int) -> Tensor:
        """x for a batch of its rows `copies` times, copy by copy: new memory, also for one copy."""
        x = x.movedim(self.axis, 0)
        return x.repeat(copies, *(1,) * (x.dim() - 1)).movedim(0, self.axis)


def learn(shape: Size, rows: int, more: Size, more_rows: int) -> Layout | None:
    """The layout of a tensor that had `shape` in a batch of `rows` and `more` in one of `more_rows`; None if it does
    not depend on the rows.

    Raises: ValueError if its shape changed in another way than by its rows.
    """
    changed = [axis for axis, (a, b) in enumerate(zip(shape, more)) if a != b]
    if not changed and len(shape) == len(more):
        return None
    axis = changed[0] if changed else 0
    factor, rest = divmod(shape[axis], rows)
    if len(changed) != 1 or len(shape) != len(more) or rest or more[axis] != factor * more_rows:
        raise ValueError(f"a tensor of shape {tuple(shape)} with {rows} rows is {tuple(more)} with {more_rows}, so "
                         "that its rows cannot be told apart")
    return Layout(axis, factor, len(shape))


def guess(shape: Size, rows: int) -> Layout | None:
    """The layout of a tensor inside a model whose batch has this many rows, None if the shape allows two."""
    if len(shape) < 2 or shape[0] % rows and (len(shape) != 3 or shape[1] != rows):
        return None
    if len(shape) == 3 and shape[1] == rows:
        return Layout(1, 1, 3) if shape[0] % rows else None
    return Layout(0, shape[0] // rows, len(shape))
