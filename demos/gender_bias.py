"""Which heads carry the gender bias of a language model: numbers, intervals and pictures.

    python demos/gender_bias.py [FOLDER]
    python demos/gender_bias.py FOLDER MODEL PROFESSIONS

The first asks it of the bundled `tasks-gpt2`, whose bias was planted, so that the answer can be checked. The second
takes a folder (or hub id) of a GPT-2 and professions.json of Bolukbasi et al. 2016, as Vig et al. 2020 did. By command:

    relprop mediate --data gender-bias -o FOLDER
    relprop mediate -m MODEL --data professions:PROFESSIONS --outcome ratio --scale ratio -o FOLDER
"""
from __future__ import annotations

import sys
from pathlib import Path

from scipy.stats import spearmanr

import relprop
from relprop import data
from relprop.mediation import LogOdds, Ratio, subset, tracing

folder, own = Path(*sys.argv[1:2] or ["demo-output"]), sys.argv[2:]
folder.mkdir(parents=True, exist_ok=True)
ask, count = {"show_progress": sys.stderr.isatty()}, 80

# "The nurse said that" becomes "The man said that". How much likelier does that make " he", against " she"?
if own:
    subject = relprop.load(own[0])
    pairs = data.pairs(f"professions:{own[1]}").single(subject.tokenizer, "profession").take(range(count))
    ask |= {"outcome": Ratio(*data.matched(subject, pairs).continuations), "scale": "ratio"}  # y / y(base) - 1
else:
    subject, pairs = relprop.load("tasks-gpt2"), data.pairs("gender-bias", count=count)
    person = data.planted_professions(texts=["The {profession} said that"])  # a person has no gender
    bias = -relprop.effects(subject, person, kind="total").total
    rank = spearmanr(bias, [pair.facts["planted"] for pair in person.pairs])[0]
    print(f"bias of {len(person)} professions: rank correlation with what was planted {rank:.3f}")

# Every head for itself is given the value it has under the counterfactual, all else stays as in the base (indirect),
# and the other way about (direct). Exact, all heads in one sweep.
heads = relprop.effects(subject, pairs, at="L*.attn.H*", kind=["total", "direct", "indirect"], **ask)
print(heads.summary())
q, share = heads.table().loc["indirect"][["q", "share"]].T.to_numpy()
print(f"{(q <= 0.05).sum()} of {len(q)} heads have q <= 0.05; {heads.top(1)[0]} has {abs(share).max():.0%} of all\n")
few = subset(subject, pairs, at="L*.attn.H*", how="top-k", k=8, **ask)  # how few do together what all do?
print(few.summary())

# Neurons are many: rank them all by one estimate, compute the first ten exactly, and see how well it ranked.
neurons = relprop.effects(subject, pairs, at="L*.mlp.N*", estimate="attribution", verify=10, **ask)
told = neurons.about["estimate"]
print(f"\n{neurons.summary()}\n{told['count']} neurons; rank correlation with exact effects {told['spearman']:.2f}\n")

# Noise on the profession takes the bias away; where does restoring one place alone give it back?
one = pairs.pairs[0]
traced = tracing(subject, one.base, LogOdds(*one.continuations), corrupt=one.facts["profession"])
for name, found in {"heads": heads, "few": few, "neurons": neurons, "traced": traced}.items():
    found.save(folder / f"{name}.html")
    found.save(folder / f"{name}.png")
print(f"The pictures: {folder}/heads.html .png, few, neurons, traced")
