"""Which heads carry an effect: of a digit that is swapped for another one, or of the gender bias of a language model.

    python demos/gender_bias.py [FOLDER]
    python demos/gender_bias.py FOLDER MODEL PROFESSIONS

The first runs as it is, on the bundled picture model. The second takes a folder (or hub id) of a GPT-2 and the list of
professions of Bolukbasi et al. 2016, professions.json, and asks what Vig et al. 2020 asked. The command does the same:

    relprop mediate --data digits-swap -o FOLDER
    relprop mediate -m MODEL --data professions:PROFESSIONS --outcome ratio --scale ratio -o FOLDER
"""
from __future__ import annotations

import sys
from pathlib import Path

import relprop
from relprop import data
from relprop.mediation import LogOdds, Ratio

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
folder.mkdir(parents=True, exist_ok=True)

if len(sys.argv) == 4:
    # "The nurse said that" becomes "The man said that". How much likelier does that make " he", against " she"? Only
    # professions of one token, so that positions stay the same; y / y(base) - 1, as in the paper.
    subject, scale = relprop.load(sys.argv[2]), "ratio"
    pairs = data.pairs(f"professions:{sys.argv[3]}").single(subject.tokenizer, "profession").keep(
        lambda pair: pair.facts["template"].endswith("said that"))
    outcome = Ratio
else:
    # A 3 becomes an 8 in the same place, all else is as before: log P(8) - log P(3).
    subject, scale = relprop.load("digits-vit"), "difference"
    pairs = data.pairs("digits-swap", count=24)
    outcome = LogOdds
print(f"{len(pairs)} pairs for {subject.name}")

# Every head for itself is given the value it has under the counterfactual, all else stays as in the base (indirect),
# and the other way about (direct). Exact, all heads in one sweep.
inputs = data.matched(subject, pairs)
heads = relprop.effects(subject, inputs.base, inputs.counterfactual, outcome(*inputs.continuations), at="L*.attn.H*",
                        kind=["total", "direct", "indirect"], scale=scale, show_progress=sys.stderr.isatty())
print(heads.summary())

# Few of the heads matter: how many hold after the correction for looking at all of them, and what share is theirs?
table = heads.table().loc["indirect"]
print(f"{int((table['q'] <= 0.05).sum())} of {len(table)} heads have q <= 0.05")
print(f"the strongest, {heads.top(1)[0]}, has {table['share'].abs().max():.0%} of the total effect")
print(f"largest interaction: {heads.interaction.mean(1).abs().max().item():.3g}, total {heads.total.mean().item():.3g}")

heads.save(folder / "heads.html")  # maps, intervals, p-values
heads.save(folder / "heads.png")
print(f"The pictures: {folder}/heads.html .png")
