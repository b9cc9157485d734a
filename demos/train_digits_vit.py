"""Train the bundled `digits-vit`: a plain timm VisionTransformer that names the handwritten digits on a canvas.

    python demos/train_digits_vit.py --out relprop/zoo/digits-vit

Two stages, because most of what must be learned is what a digit looks like, and a window is read five times as fast
as a canvas. First the model reads windows of 4 x 4 patches with one digit, clean ones to begin with, each batch with
the positions of a random place of the canvas; then whole canvases. Weights and config are written at every evaluation.
About half an hour on one core.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from relprop.zoo.digits import CLASSES, SIZE, Canvases, canvases

# One channel: ink is grey, so colour would only triple the input.
KWARGS = dict(
    img_size=SIZE, patch_size=6, in_chans=1, num_classes=CLASSES, embed_dim=128, depth=6, num_heads=4, mlp_ratio=4.0
)
MEAN, STD = 0.18, 0.23  # about those of the grey levels of training canvases
WINDOW = 4  # patches on a side of the first stage's windows
FREE = 0.75  # the part of the second stage after which attention is the plain model's
CHUNK = 1024  # canvases drawn at once
TEST_SEED = 2_000_000  # training seeds count up from `--seed` and stay far below


def normalise(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (side * side, D): positions to start from.

    timm starts near zero, where a model has to find out by itself which patches are neighbours; from here it learns
    several times faster (Beyer et al. 2022, Better plain ViT baselines for ImageNet-1k, arXiv 2205.01580).
    """
    angle = torch.arange(side)[:, None] / 100 ** torch.linspace(0, 1, width // 4)  # (side, D / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, D / 2)
    return torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], dim=2).flatten(0, 1)


def make_model() -> VisionTransformer:
    # timm's other initialisation keeps the branches of so narrow a model (D = 128) from starting near silence.
    model = VisionTransformer(**KWARGS, weight_init="jax")
    with torch.no_grad():
        model.pos_embed[0, 1:] = 0.5 * waves(SIZE // KWARGS["patch_size"], KWARGS["embed_dim"])
    return model


def batches(steps: int, size: int, *, seed: int, window: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` pairs of images (B, 1, Y, X) and labels (B, 10), no canvas twice."""
    chunks = -(-steps * size // CHUNK)
    for chunk in range(chunks):
        kind = dict(digits=(1, 3))
        if window:  # no clutter at first, all of it from half of the stage on
            kind = dict(digits=(1, 1), size=WINDOW * KWARGS["patch_size"], clutter=min(1.0, 2 * chunk / chunks))
        drawn = canvases(CHUNK, seed=seed + chunk, split="train", **kind)
        yield from zip(normalise(drawn.images).split(size), drawn.labels.float().split(size), strict=True)


def read_window(model: VisionTransformer, images: Tensor) -> Tensor:
    """Logits (B, 10) of windows (B, 1, 24, 24), with the positions of a random place of the canvas."""
    side = SIZE // KWARGS["patch_size"]
    top, left = torch.randint(side - WINDOW + 1, (2,)).tolist()
    grid = model.pos_embed[:, 1:].unflatten(1, (side, side))  # (1, 9, 9, D)
    place = grid[:, top : top + WINDOW, left : left + WINDOW].flatten(1, 2)  # (1, 16, D)
    patches = model.patch_embed.proj(images).flatten(2).mT + place  # (B, 16, D)
    first = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
    return model.head(model.norm(model.blocks(torch.cat([first, patches], dim=1)))[:, 0])


def distances() -> Tensor:
    """How many patches farther than a window reaches each patch is from each, (T, T); 0 to and from the class token."""
    place = torch.cartesian_prod(*2 * [torch.arange(SIZE // KWARGS["patch_size"])])  # (S, 2)
    apart = (place[:, None] - place).abs().amax(-1)  # (S, S)
    return F.pad((apart - WINDOW // 2).clamp(min=0), (1, 0, 1, 0)).float()


def read_canvas(model: VisionTransformer, images: Tensor, near: float) -> Tensor:
    """Logits (B, 10) of whole canvases; `near` is what attention loses by a patch of distance, in logits."""
    return model(images, attn_mask=-near * distances() if near else None)


def train(
    model: VisionTransformer, data: Iterator[tuple[Tensor, Tensor]], args: argparse.Namespace, *, window: bool
) -> None:
    """One stage: AdamW under a linear warm-up and a cosine."""
    steps, peak = (args.window_steps, 7e-4) if window else (args.steps, 5e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.08)
    stage = "windows" if window else "canvases"
    bar = tqdm(islice(data, steps), total=steps, desc=stage, mininterval=10)
    for step, (images, labels) in enumerate(bar, start=1):
        model.train()
        if window:  # it holds one digit, so the ten labels exclude each other, which teaches faster
            loss = F.cross_entropy(read_window(model, images), labels)
        else:
            near = args.near * max(0.0, 1 - step / (FREE * steps))
            loss = F.binary_cross_entropy_with_logits(read_canvas(model, images, near), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if step % args.every == 0 or step == steps:
            accuracy = evaluate(model, canvases(args.test, seed=TEST_SEED))
            tqdm.write(f"{stage} {step}: loss {loss.item():.4f} {accuracy}")
            write(model, accuracy, args.out)


@torch.no_grad()
def evaluate(model: VisionTransformer, drawn: Canvases) -> dict[str, float]:
    """Part of the labels, and of the canvases with all ten labels, that the model gets right."""
    model.eval()
    said = torch.cat([model(images) > 0 for images in normalise(drawn.images).split(100)])  # (B, 10)
    right = said == drawn.labels
    return {"label": round(right.float().mean().item(), 4), "exact_match": round(right.all(1).float().mean().item(), 4)}


def write(model: VisionTransformer, accuracy: dict[str, float], out: Path) -> None:
    """Weights and config; the model card beside them is written by hand."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "model.safetensors")
    config = {
        "library": "timm", "architecture": "VisionTransformer", "kwargs": KWARGS, "problem": "multi_label",
        "labels": [str(label) for label in range(CLASSES)], "input_size": [KWARGS["in_chans"], SIZE, SIZE],
        "mean": [MEAN], "std": [STD], "accuracy": accuracy,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("relprop/zoo/digits-vit"))
    parser.add_argument("--window-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=32, help="canvases a step; windows come twice as many")
    parser.add_argument("--near", type=float, default=3.0, help="logits a patch of distance costs as canvases begin")
    parser.add_argument("--every", type=int, default=200, help="steps between evaluations")
    parser.add_argument("--test", type=int, default=500, help="canvases of unseen handwriting to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to start from; skips the windows")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = make_model()
    if args.start:
        model.load_state_dict(load_file(args.start))
    else:
        train(model, batches(args.window_steps, 2 * args.batch, seed=args.seed, window=True), args, window=True)
    train(model, batches(args.steps, args.batch, seed=args.seed + 1_000_000, window=False), args, window=False)
    print(evaluate(model, canvases(4 * args.test, seed=TEST_SEED + 1)))


if __name__ == "__main__":
    main()
