"""Interventions: what is put in the place of a value inside a model while it runs, and where.

    >>> import torch, transformers
    >>> config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=9)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> plain = model(ids).logits
    >>> with intervened(model, {"L0.attn.H1": Zero(), "L1.mlp@-1": Resample({"input_ids": torch.tensor([[1, 2, 4]])})}):
    ...     changed = model(ids).logits
    >>> bool((plain == changed).all()), bool((plain == model(ids).logits).all())
    (False, True)

A *site* is an address, or one coordinate of the vector there: "L5.attn.H3", "L5.mlp[17]@-1". References: Vig et al.
2020 (Causal mediation analysis for interpreting neural NLP); Meng et al. 2022 (Locating and editing factual
associations in GPT) for noise.
"""

from .change import Group, canonical, changed, reference, split, units_of
from .session import intervened
from .site import Places, Site, Spot, parts, resolved, spots
from .value import Given, Hold, Intervention, Mean, Noise, Pattern, Resample, Zero

__all__ = ["Given", "Group", "Hold", "Intervention", "Mean", "Noise", "Pattern", "Places", "Resample", "Site", "Spot",
           "Zero", "canonical", "changed", "intervened", "parts", "reference", "resolved", "split", "spots", "units_of"]
