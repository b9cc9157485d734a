"""Chefer et al. 2021, segmentation: pixel accuracy, mAP and mIoU of maps of a ViT on ImageNet-Segmentation.

    python demos/recipe_segmentation.py --data gtsegs_ijcv.mat --out out/segmentation --device cuda

The file (M. Guillaumin et al., "ImageNet Auto-Annotation with Segmentation Propagation", IJCV 2014; 4276 pictures)
needs h5py; a folder of pictures NAME.jpg with masks NAME_mask.png does as well. The model is the ViT-B/16 of the paper.
"""
from __future__ import annotations

from dataclasses import replace

from relprop import load
from relprop.benchmark import benchmark, recipe
from relprop.benchmark.published import SEGMENTATION, SEGMENTATION_METRICS, segmentation
from relprop.data import segmentation as pictures
from relprop.pixels import squeezed

METHODS = ["transformer-attribution", "rollout", "last-layer-attention", "attention-gradcam", "full-lrp", "partial-lrp",
           "attnlrp-gamma"]

options = recipe.parser(__doc__, model="timm/vit_base_patch16_224.orig_in21k_ft_in1k", methods=METHODS,
                        data="gtsegs_ijcv.mat, or a folder of pictures with masks")

with recipe.errors_in_a_line():
    args = options.parse_args()
    data = pictures(args.data, args.limit, seed=args.seed)
    subject = load(args.model, device=args.device)
    subject = replace(subject, pixels=squeezed(subject.pixels))  # as in the paper: whole pictures, nothing cut off

    # What is explained is the prediction. The paper's three numbers come from the first three metrics; the others are
    # this package's own, which do not pool the pictures.
    found = benchmark(subject, data, methods=args.methods, out=args.out, count=None, seed=args.seed,
                      metrics=[*SEGMENTATION_METRICS, "pixel-accuracy", "mean-average-precision", "mean-iou"],
                      batch_size=args.batch_size)

    if recipe.leads():  # of several processes, the first
        print(recipe.concluded(SEGMENTATION, segmentation(found), args.out, of=found))
