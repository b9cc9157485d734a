"""Token ids that a model copies, pads, turns, cuts or hashes before it looks them up are its input all the same."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relprop.ops.journal import CONSTANT
from relprop.relevance import propagate
from relprop.trace import Way

F64 = torch.float64
PAD, PRIME = 0, 31


class Reader(nn.Module):
    """Looks up what `made` makes of the ids, brings it into rows by `back`, and adds up products of neighbours."""

    def __init__(self, made, back) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.made, self.back = nn.Embedding(50, 4), made, back

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.back(self.table(self.made(input_ids)))
        return (x[:, 1:] * x[:, :-1] * torch.arange(1, x.shape[1]).to(x)[:, None]).flatten(1)


def shifted(ids: Tensor) -> Tensor:
    """To the right, as a decoder reads them."""
    made = ids.new_zeros(ids.shape)
    made[:, 1:] = ids[:, :-1].clone()
    made[:, 0] = 2
    return made


def same(x: Tensor) -> Tensor:
    return x


COPIES = {  # how ids are changed, and how what they are looked up as comes back into rows of all tokens
    "another type": (lambda ids: ids.to(torch.int32), same),
    "time first": (lambda ids: ids.transpose(0, 1).contiguous(), lambda x: x.transpose(0, 1)),
    "padded": (lambda ids: F.pad(ids, (2, 3), value=PAD), lambda x: x[:, 2:-3]),
    "turned round": (lambda ids: ids.flip(1), lambda x: x.flip(1)),
    "behind a token": (lambda ids: torch.cat([ids.new_full((len(ids), 1), 7), ids], 1), lambda x: x[:, 1:]),
    "windows": (lambda ids: ids.reshape(-1, 3).clone(), lambda x: x.reshape(2, 6, 4)),
    "in pieces": (lambda ids: torch.cat(ids.split(2, 1)[::-1], 1), lambda x: torch.cat(x.split(2, 1)[::-1], 1)),
    "a view": (lambda ids: ids.t(), lambda x: x.transpose(0, 1)),
    "written": (lambda ids: (ids + 0).masked_fill_(ids == 60, PAD), same)}


def ids() -> Tensor:
    return torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))


def found(model: nn.Module, *, way: Way | None = None):
    return propagate(model.double(), (), {"input_ids": ids()}, lambda y: y.sum(1), "attnlrp", way=way)


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_the_input(name):
    plain, copied = found(Reader(same, same)), found(Reader(*COPIES[name]))
    assert plain.relevance["input_ids"].shape == (2, 6, 4) and plain.relevance["input_ids"].abs().min() > 0
    torch.testing.assert_close(copied.relevance["input_ids"], plain.relevance["input_ids"])
    torch.testing.assert_close(copied.ledger.input, plain.ledger.value)


def test_a_token_is_that_which_was_moved():
    """The relevance of shifted ids is at the tokens that were read, and what the model puts in is a constant."""
    read = found(Reader(shifted, same))
    table = Reader(shifted, same).double().table
    x = table(shifted(ids())).detach().requires_grad_()
    value = (x[:, 1:] * x[:, :-1] * torch.arange(1, 6).to(x)[:, None]).flatten(1).sum(1)
    per_entry = x.detach() * torch.autograd.grad(value.sum(), x)[0] / 2  # half to either factor
    torch.testing.assert_close(read.relevance["input_ids"][:, :-1], per_entry[:, 1:])
    assert not read.relevance["input_ids"][:, -1].any()
    torch.testing.assert_close(read.ledger.absorbed[CONSTANT], per_entry[:, 0].sum(1))
    assert read.ledger.error.max() < 1e-9


class Hashed(nn.Module):
    """Several tables, looked up by hashes of each token and the one before it; no vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(16, 4) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        before = F.pad(input_ids, (1, 0))[:, :-1]
        hashes = [((input_ids + 1) * PRIME + before * place) % 16 for place in range(3)]
        x = torch.cat([table(one) for table, one in zip(self.tables, hashes, strict=True)], -1)
        return (x[:, 1:] * x[:, :-1]).flatten(1)


def test_hashes_are_the_input():
    read = found(Hashed())
    assert {*read.relevance} == {"input_ids", "input_ids#1", "input_ids#2"}
    assert all(r.shape == (2, 6, 4) and r.abs().min() > 0 for r in read.relevance.values())
    torch.testing.assert_close(read.ledger.input, read.value.to(F64))


@pytest.mark.parametrize("model", [lambda: Reader(*COPIES["time first"]), lambda: Reader(*COPIES["padded"]), Hashed])
def test_the_way_starts_where_other_ids_would(model):
    """On the way from other ids: what is added up is the step from what these are looked up as."""
    read = found(model(), way=Way({"input_ids": lambda given: torch.where(given != PAD, 5, given)}, 1.0))
    plain = found(model())
    taken = sum(r.flatten(1).sum(1) for r in read.relevance.values())
    assert not torch.allclose(taken, plain.ledger.input)
    torch.testing.assert_close(taken + read.ledger.absorbed["reference"] + read.ledger.absorbed.get(CONSTANT, 0),
                               read.value.to(F64))


def test_tables_of_numbers_are_looked_up_too():
    class Indexed(nn.Module):
        def __init__(self, how) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.how = nn.Parameter(torch.randn(50, 4)), how

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.how(self.table, input_ids.to(torch.int64) + 0)
            return (x[:, 1:] * x[:, :-1]).flatten(1)

    maps = [found(Indexed(how)).relevance["input_ids"] for how in (
        lambda table, ids: F.embedding(ids, table), lambda table, ids: table[ids],
        lambda table, ids: table.index_select(0, ids.view(-1)).view(*ids.shape, -1))]
    assert maps[0].abs().min() > 0
    for one in maps[1:]:
        torch.testing.assert_close(one, maps[0])


def test_copies_that_are_written_over_are_none():
    class Languages(Reader):
        """Adds what it knows of a language, whose ids it makes of a copy, as XLM does."""

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids) + self.table(input_ids.clone().fill_(7))
            return (x[:, 1:] * x[:, :-1]).flatten(1)

    read = found(Languages(same, same))
    assert {*read.relevance} == {"input_ids"} and read.ledger.absorbed and read.ledger.error.max() < 1e-9


def test_masks_and_positions_made_of_ids_are_none():
    class Positions(nn.Module):
        """Counts positions from the first token that is not padding, as RoBERTa does."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.places = nn.Embedding(50, 4), nn.Embedding(9, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            kept = input_ids.ne(PAD).int()
            x = self.table(input_ids) + self.places((torch.cumsum(kept, 1) * kept).long())
            return (x[:, 1:] * x[:, :-1]).flatten(1)

    read = found(Positions())
    assert {*read.relevance} == {"input_ids"} and read.ledger.absorbed
    assert read.ledger.error.max() < 1e-9
