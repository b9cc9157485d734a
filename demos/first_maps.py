"""Two digits of one picture, and a review: relevance beside attention rollout, the books, and the check by ablation.

    python demos/first_maps.py [FOLDER]

The command `relprop demo` does the same.
"""
from __future__ import annotations

import sys
from pathlib import Path

import relprop
from relprop.zoo.digits import canvases

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
folder.mkdir(parents=True, exist_ok=True)

# A picture with two handwritten digits that the model was not trained on. Which they are is known, since we draw them.
drawn = canvases(1, seed=0, digits=(2, 2))
picture = (drawn.images[0, 0] * 255).round().byte().numpy()  # (Y, X), as of a file; a tensor counts as normalised
labels = [str(label) for label in drawn.labels[0].nonzero().flatten().tolist()]

# One row for each digit: the same picture explained twice, in one pass.
digits = relprop.load("digits-vit")
maps = relprop.explain(digits, [picture, picture], target=labels)

# The books: what the pixels have, and what biases, position embeddings, the softmax and others took. It all adds up.
print(maps.ledger)
print("largest error of the books:", maps.ledger.error.max().item())

# The check: patches are taken out of the picture by relevance. Does the digit go sooner than in random order?
print(maps.check().summary())
maps.save(folder / "digit-maps.html")

# Rollout follows attention alone, so it cannot tell one digit from the other.
grid = relprop.compare(digits, [picture, picture], target=labels, methods=["attnlrp", "rollout"])
print(grid.table())
grid.save(folder / "digits.png")

# The same calls explain text; the units are words, and what stands in for them is the model's mask token.
reviews = relprop.load("reviews-bert")
text = "A gripping, beautifully acted story, ruined by a dull and endless final hour."
grid = relprop.compare(reviews, [text], methods=["attnlrp", "rollout"])
print(grid.table())
grid.save(folder / "review.png")
