"""Chance: the noise that every method must beat, and the seeds of those that draw."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import rows, sight, units
from ..result import Relevance
from ..still import settled
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, TextUnits


@contextmanager
def seeded(seed: int, content: Tensor) -> Iterator[None]:
    """Global chance, of torch and NumPy, that depends on the seed and a row's own content only; given back as it was.

    Captum draws from the global generators. Args: content: of one row, without padding.
    """
    import numpy

    drawn = rows.generator(seed, content).initial_seed()
    before = numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(drawn)  # torch.manual_seed would seed devices for later, too
            if devices:
                torch.cuda.manual_seed_all(drawn)
            numpy.random.seed(drawn % 2**32)
            yield
    finally:
        numpy.random.set_state(before)


def random(subject: Subject, batch: Batch, targets: Targets, *, seed: int = 0) -> Relevance:
    """Noise: a standard normal number for each unit, the control that every method must beat.

    Depends on the seed and the row's own input only, so a batch equals the loop over its rows. A patch's number is
    divided evenly over its pixels; special tokens and padding get zero. No unit, not conservative. Cost: one forward,
    for the value.
    """
    with settled(subject.model), torch.no_grad():
        output = subject.forward(batch)
        targets = targets.fixed(output, batch)
        value, names = targets.value(output, batch), targets.names(output, batch)
    groups = units.groups(batch)
    values = torch.zeros(batch.rows, int(groups.max()) + 1)
    for row, content in enumerate(rows.leaf(batch)[1]):
        inside = groups[row] >= 0
        count = int(groups[row].max()) + 1
        if isinstance(batch.units, TextUnits):
            inside = inside[:len(content)]  # patches of pictures stand behind
        content = content.cpu()[inside] if content.shape == inside.shape else content  # ids without padding
        values[row, :count] = torch.randn(count, generator=rows.generator(seed, content))
    whole, pictures = sight.parted(units.spread(values, groups), batch)
    return Relevance(map=whole, value=value.cpu(), target=names, method="random",
                     conservation="not conservative", units=batch.units, ledger=None, forwards=1, backwards=0,
                     inputs={}, latents={}, pictures=pictures,
                     provenance={"model": subject.name, "unit": "noise", "seed": seed})
