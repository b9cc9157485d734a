"""Which words and which pixels make a vision-language model say what it says: a LLaVA that reads digits on canvases.

    python demos/vision_language.py [FOLDER]

It is trained first where the folder has none (`demos/train_digits_llava.py`, a few minutes), or give the folder of one.
"""
from __future__ import annotations

import sys
from pathlib import Path

from train_digits_llava import DIGITS, PROMPT, answers, train

import relprop
from relprop.zoo.digits import canvases

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output/digits-llava")
if not (folder / "config.json").is_file():
    model, processor, share = train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
subject = relprop.load(folder)

# One picture, twice as wide as the model sees it, and two questions.
drawn = canvases(1, seed=3, digits=(2, 2))
picture = (drawn.images[0, 0] * 255).round().byte().numpy().repeat(3, 0).repeat(6, 1)  # (162, 324)
left, right = (DIGITS[digit] for digit in answers(drawn)[0].tolist())
rows = [{"text": PROMPT.format(side), "image": picture} for side in ("left", "right")]

# The relevance of each answer, one word, over the question and the picture: one forward, one backward.
r = relprop.explain(subject, rows, target=[left, right])
print("asked for", left, "and", right, "- explained in", r.forwards, "forward and", r.backwards, "backward pass")
print(r.ledger)
for row in range(2):
    print([(word, round(value, 3)) for word, value in r.words(row)])

# Where is it? The ink of each digit is known, since we drew it: how much of the positive relevance lies there.
for row, digit in enumerate(answers(drawn)[0].tolist()):
    ink = drawn.masks[0, digit].repeat_interleave(3, 0).repeat_interleave(6, 1)
    inside = r.image[row].clamp(min=0)
    print(f"{rows[row]['text'][8:]} {inside[ink].sum() / inside.sum():.0%} of the positive relevance lies on the "
          f"{DIGITS[digit]}, which has {ink.float().mean():.0%} of the pixels")

# Words and patches are taken out together, by relevance and in random order.
print(r.check(by="word").summary())
for suffix in ("png", "html"):
    print(r.save(folder / f"answers.{suffix}"))
