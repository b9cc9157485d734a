"""Chefer et al. 2021, table 1: area under the accuracy of a ViT while pixels are painted black by relevance.

    python demos/recipe_perturbation.py --data imagenet/val --out out/perturbation --device cuda

The data are ImageNet's validation pictures (O. Russakovsky et al., IJCV 2015) in one subfolder a class, n01440764 and
so on, or any folder like it: other names are labels of the model, or --classes lists them. Positive: the most relevant
goes first, lower is better. Negative: the least, higher is better. Each by the map of the predicted class and of the
label.
"""
from __future__ import annotations

from dataclasses import replace

from relprop import load
from relprop.benchmark import benchmark, recipe
from relprop.benchmark.published import PERTURBATION, PERTURBATION_METRICS, means
from relprop.data import imagefolder
from relprop.pixels import squeezed

METHODS = ["transformer-attribution", "rollout", "last-layer-attention", "attention-gradcam", "full-lrp", "partial-lrp",
           "attnlrp-gamma"]

options = recipe.parser(__doc__, model="timm/vit_base_patch16_224.orig_in21k_ft_in1k", methods=METHODS,
                        data="a folder with one subfolder of pictures a class")
options.add_argument("--classes", metavar="FILE",
                     help="names of the subfolders, one a line, or JSON: {name: index} or {index: [name, label]}")

with recipe.errors_in_a_line():
    args = options.parse_args()
    data = imagefolder(args.data, args.limit, seed=args.seed, classes=args.classes)
    subject = load(args.model, device=args.device)
    subject = replace(subject, pixels=squeezed(subject.pixels))  # as in the paper: whole pictures, nothing cut off
    how = {"count": None, "seed": args.seed, "batch_size": args.batch_size, "metrics": PERTURBATION_METRICS,
           "correct_only": False}  # the area is under the accuracy, so that wrong pictures count

    # The accuracy is against the label in both; what differs is whose map it is.
    by_label = benchmark(subject, data, methods=args.methods, out=args.out / "label", **how)
    by_prediction = benchmark(subject, data, methods={name: recipe.of_prediction for name in args.methods},
                              options={name: {"method": name} for name in args.methods},
                              out=args.out / "predicted", **how)

    columns = {f"{sign}, {of}": means(table, f"{sign}-accuracy-area") for sign in ("negative", "positive")
               for of, table in (("predicted", by_prediction), ("label", by_label))}
    if recipe.leads():  # of several processes, the first
        print(recipe.concluded(PERTURBATION, columns, args.out, of=by_label))
