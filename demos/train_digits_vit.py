"""Train the bundled `digits-vit`: a plain timm VisionTransformer that names the handwritten digits on a canvas.

    python demos/train_digits_vit.py --out relprop/zoo/digits-vit

The class token learns which digits are there. Beside it a linear reader of the patches, dropped at the end, learns
whose ink each patch holds, which the canvases know: dozens of lessons a canvas instead of one, so that a model of this
size learns to read in an hour instead of a day. Weights and config are written at every evaluation. About an hour on
one core.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from relprop.zoo.digits import CLASSES, SIZE, Canvases, canvases

# One channel: ink is grey, so colour would only triple the input.
KWARGS = dict(
    img_size=SIZE, patch_size=6, in_chans=1, num_classes=CLASSES, embed_dim=128, depth=6, num_heads=4, mlp_ratio=4.0
)
MEAN, STD = 0.18, 0.23  # about those of the grey levels of training canvases
FAINT = 0.1  # a patch with less ink than this part of it belongs to no digit
FREE = 0.5  # the part of the training after which attention is the plain model's
CHUNK = 512  # canvases drawn at once
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


def batches(steps: int, size: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`steps` of images (B, 1, Y, X), labels (B, 10) and the digit of each patch (B, T), no canvas twice."""
    for chunk in range(-(-steps * size // CHUNK)):
        drawn = canvases(CHUNK, seed=seed + chunk, split="train", digits=(1, 3))
        parts = normalise(drawn.images), drawn.labels.float(), owners(drawn.masks)
        yield from zip(*(part.split(size) for part in parts), strict=True)


def owners(masks: Tensor) -> Tensor:
    """The digit whose ink each patch holds most of, `CLASSES` where there is none, (B, T)."""
    ink, digit = F.avg_pool2d(masks.float(), KWARGS["patch_size"]).flatten(2).max(1)
    return torch.where(ink > FAINT, digit, CLASSES)


def distances() -> Tensor:
    """How many patches beyond its neighbours each patch is from each, (T, T); 0 to and from the class token."""
    place = torch.cartesian_prod(*2 * [torch.arange(SIZE // KWARGS["patch_size"])])  # (S, 2)
    apart = (place[:, None] - place).abs().amax(-1)  # (S, S)
    return F.pad((apart - 2).clamp(min=0), (1, 0, 1, 0)).float()


def train(model: VisionTransformer, args: argparse.Namespace) -> None:
    """AdamW under a linear warm-up and a cosine."""
    reader, far = nn.Linear(KWARGS["embed_dim"], CLASSES + 1), distances()
    weights = [*model.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps, pct_start=0.08)
    bar = tqdm(batches(args.steps, args.batch, seed=args.seed), total=args.steps, mininterval=10)
    for step, (images, labels, owner) in zip(range(1, args.steps + 1), bar):
        model.train()
        near = args.near * max(0.0, 1 - step / (FREE * args.steps))  # what attention loses by a patch of distance
        tokens = model.forward_features(images, attn_mask=-near * far if near else None)  # (B, 1 + T, D)
        named = F.binary_cross_entropy_with_logits(model.forward_head(tokens), labels)
        read = F.cross_entropy(reader(tokens[:, 1:]).flatten(0, 1), owner.flatten())
        optimizer.zero_grad()
        (named + read).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(named=f"{named.item():.4f}", read=f"{read.item():.4f}", refresh=False)
        if step % args.every == 0 or step == args.steps:
            accuracy = evaluate(model, canvases(args.test, seed=TEST_SEED))
            tqdm.write(f"{step}: {accuracy}")
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
    parser.add_argument("--steps", type=int, default=9500)
    parser.add_argument("--batch", type=int, default=32, help="canvases a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="the learning rate's peak")
    parser.add_argument("--near", type=float, default=1.0, help="logits a patch of distance costs as training begins")
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--test", type=int, default=500, help="canvases of unseen handwriting to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to start from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = make_model()
    if args.start:
        model.load_state_dict(load_file(args.start))
    train(model, args)
    accuracy = evaluate(model, canvases(4 * args.test, seed=TEST_SEED + 1))
    write(model, accuracy, args.out)
    print(accuracy)


if __name__ == "__main__":
    main()
