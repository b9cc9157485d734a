"""Checks of a map: by cause, against what people marked, and against what it should not survive.

`ablation` asks the model itself, beside random controls. `perturbation` (with `removal` and `imputation`), `infidelity`
and `sensitivity` ask it too; `localisation`, `rationale` and `sentiment` compare with people's marks; `sanity` changes
the weights or the target; `control` has maps that know nothing; `statistics` turns values into statements;
`convention` has the measures of published tables.
"""
from . import (
    control,
    convention,
    imputation,
    infidelity,
    localisation,
    perturbation,
    rationale,
    removal,
    sanity,
    sensitivity,
    sentiment,
    statistics,
)
from .ablation import ablation

__all__ = ["ablation", "control", "convention", "imputation", "infidelity", "localisation", "perturbation", "rationale",
           "removal", "sanity", "sensitivity", "sentiment", "statistics"]
