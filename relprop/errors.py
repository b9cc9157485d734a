"""The few errors of relprop that are not a ValueError or a TypeError."""


class RelpropError(Exception):
    """Anything relprop raises on purpose that is not simply a bad argument."""


class UnruledOp(RelpropError, RuntimeError):
    """A torch call computes on the explained input and the table has no rule for it."""


class LedgerError(RelpropError, ArithmeticError):
    """The books of a run do not balance: relevance leaked or appeared somewhere unnamed."""


class IndependentOutput(RelpropError, ValueError):
    """The explained value does not depend on the input, so that there is nothing to explain."""


class Undefined(RelpropError, ValueError):
    """A measure has no value for this map or this truth, such as a map that is the same everywhere."""
