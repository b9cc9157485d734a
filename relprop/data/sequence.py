"""Sequences of tokens by a rule, so that which tokens matter is known exactly; as many as are asked for.

For the small models of algorithms that interpretability is practised on (C. McDougall, ARENA 2.0, "Monthly Algorithmic
Problems" and "Balanced brackets", 2023). A token matters if changing it alone, to something well chosen, changes the
right answer to the one the rule gives to the repaired sequence.
"""
from __future__ import annotations

import torch

from ..target import Token
from .example import Data, Example

NUMBERS, START, END = 31, 31, 32  # of the palindromes: numbers 0 to 30, then the two ends
SEPARATOR, LARGEST = 51, 50  # of the sorted lists: numbers 0 to 50
BRACKETS = {"start": 0, "pad": 1, "end": 2, "(": 3, ")": 4}


def palindromes(count: int = 500, *, seed: int = 0, length: int = 20, mismatches: tuple[int, int] = (1, 3)) -> Data:
    """Lists that are almost palindromes; asked for is class 0, "no palindrome". [START, x_1 ... x_n, END].

    Marked are the pairs (i, n + 1 - i) that differ: only they make the answer, each of both.

    Args: length: n, even. mismatches: the least and the largest number of such pairs.
    Raises: ValueError for an odd length, or more pairs than there are.
    """
    low, high = mismatches
    if length % 2 or not 1 <= low <= high <= length // 2:
        raise ValueError(f"an even length and 1 to {length // 2} pairs that differ, got {length} and {mismatches}")
    rng = torch.Generator().manual_seed(seed)
    examples = [_palindrome(length, int(torch.randint(low, high + 1, (), generator=rng)), rng) for _ in range(count)]
    return Data("palindromes", "tokens", examples, {"count": count, "seed": seed, "length": length,
                                                    "mismatches": list(mismatches)})


def brackets(count: int = 500, *, seed: int = 0, length: tuple[int, int] = (8, 30)) -> Data:
    """Strings of brackets, balanced but for one that was turned; asked for is class 0, "not balanced".
    [start, brackets, end].

    Marked are the brackets of which turning any one alone makes the string balanced.

    Args: length: the least and the largest number of brackets; even ones are drawn.
    Raises: ValueError for a length that no balanced string has.
    """
    low, high = length
    if not 2 <= low <= high:
        raise ValueError(f"length is (least, most) with 2 <= least <= most, got {length}")
    rng = torch.Generator().manual_seed(seed)
    examples = [_bracket(2 * int(torch.randint((low + 1) // 2, high // 2 + 1, (), generator=rng)), rng)
                for _ in range(count)]
    return Data("brackets", "tokens", examples, {"count": count, "seed": seed, "length": list(length)})


def sorted_lists(count: int = 500, *, seed: int = 0, length: int = 10) -> Data:
    """Lists with a part of their elements in order behind; asked for is the next one. [a_1 ... a_n, SEPARATOR, b_1 ...
    b_i], b = sorted(a), the elements distinct, i from 0 to n - 1 by the seed.

    Marked are the element of the list that comes next, and the last token, after which it comes.

    Raises: ValueError for a length of more elements than there are numbers.
    """
    if not 2 <= length <= LARGEST + 1:
        raise ValueError(f"a length from 2 to {LARGEST + 1}, got {length}")
    rng = torch.Generator().manual_seed(seed)
    examples = [_sorted_list(length, rng) for _ in range(count)]
    return Data("sorted-lists", "tokens", examples, {"count": count, "seed": seed, "length": length})


def balanced(string: list[int]) -> bool:
    """Whether steps of +1 (open) and -1 (close) end at 0 and never go below.

    >>> balanced([1, 1, -1, -1]), balanced([1, -1, -1, 1])
    (True, False)
    """
    heights = torch.tensor(string).cumsum(0)
    return bool(heights[-1] == 0 and heights.min() >= 0)


def _palindrome(length: int, wrong: int, rng: torch.Generator) -> Example:
    half = torch.randint(NUMBERS, (length // 2,), generator=rng)
    other = half.flip(0)
    at = torch.randperm(length // 2, generator=rng)[:wrong]  # places in the second half
    other[at] = (other[at] + torch.randint(1, NUMBERS, (wrong,), generator=rng)) % NUMBERS
    ids = torch.cat([torch.tensor([START]), half, other, torch.tensor([END])])
    marked = ids != ids.flip(0)
    marked[0] = marked[-1] = False
    return Example(input=ids.tolist(), target=0, marked=marked)


def _bracket(length: int, rng: torch.Generator) -> Example:
    string = _balanced_string(length, rng)
    turned = int(torch.randint(length, (), generator=rng))
    string[turned] *= -1
    repairs = [balanced([-step if place == at else step for place, step in enumerate(string)])
               for at in range(length)]
    ids = [BRACKETS["start"], *(BRACKETS["(" if step > 0 else ")"] for step in string), BRACKETS["end"]]
    return Example(input=ids, target=0, marked=torch.tensor([False, *repairs, False]))


def _balanced_string(length: int, rng: torch.Generator) -> list[int]:
    """A balanced string, all equally likely: of the turns of a shuffled string with one bracket more that closes, just
    one never reaches the ground before its end (the cycle lemma)."""
    steps = torch.tensor([1] * (length // 2) + [-1] * (length // 2 + 1))
    steps = steps[torch.randperm(length + 1, generator=rng)]
    lowest = int(steps.cumsum(0).argmin())  # the first time at the lowest point; the string starts after it
    return steps.roll(-lowest - 1)[:-1].tolist()


def _sorted_list(length: int, rng: torch.Generator) -> Example:
    numbers = torch.randperm(LARGEST + 1, generator=rng)[:length]
    given = int(torch.randint(length, (), generator=rng))
    order = numbers.sort().values
    ids = [*numbers.tolist(), SEPARATOR, *order[:given].tolist()]
    marked = torch.tensor(ids) == int(order[given])
    marked[-1] = True
    return Example(input=ids, target=Token(int(order[given])), marked=marked)
