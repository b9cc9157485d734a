"""ERASER's movie reviews: token F1 of the k most relevant words, AUPRC, comprehensiveness and sufficiency.

    python demos/recipe_eraser.py --data eraser/movies --model FOLDER --out out/eraser --device cuda

The data are the folder `movies` of ERASER (J. DeYoung et al., ACL 2020): test.jsonl and docs/. The model classifies
reviews, such as a BERT fine-tuned on its training set; its labels are NEGATIVE and POSITIVE, or --labels says which is
which. F1 against k is how Chefer et al. 2021 compare maps of BERT; the other three are ERASER's.
"""
from __future__ import annotations

from relprop import load
from relprop.benchmark import benchmark, recipe
from relprop.benchmark.published import ERASER, KS, RATIONALE_METRICS, here, means
from relprop.data import eraser
from relprop.view import series

METHODS = ["transformer-attribution", "rollout", "last-layer-attention", "attention-gradcam", "full-lrp", "partial-lrp",
           "attnlrp"]
FAITHFUL = ["auprc", "comprehensiveness", "sufficiency"]

options = recipe.parser(__doc__, model="reviews-bert", methods=METHODS, data="the folder movies of ERASER")
options.add_argument("--split", default="test", help="train, val or test (default: %(default)s)")
options.add_argument("--labels", type=lambda text: text.split(","), metavar="A,B",
                     help="of the model's classes in their order, NEGATIVE,POSITIVE or reversed (default: its own)")
options.add_argument("--length", type=int, metavar="N",
                     help="cut reviews into passages of N words, for a model of short texts (default: whole reviews)")

with recipe.errors_in_a_line():
    args = options.parse_args()
    data = eraser(args.data, args.limit, seed=args.seed, length=args.length, split=args.split)
    subject = load(args.model, device=args.device, labels=args.labels)

    # Words are deleted, as in ERASER, by hiding them from attention. The label is explained, also where it is not the
    # prediction.
    found = benchmark(subject, data, methods=args.methods, out=args.out, count=None, seed=args.seed, by="word",
                      metrics=[*RATIONALE_METRICS, *FAITHFUL], baseline="delete", correct_only=False,
                      batch_size=args.batch_size)

    places = {f"token-f1@{k}": k for k in KS}
    if recipe.leads():  # of several processes, the first
        curves = series(found, places, title=here(found), along="k, most relevant words", up="token F1")
        curves.savefig(args.out / "curve.svg")
        columns = {name: means(found, name) for name in [*places, *FAITHFUL]}
        print(recipe.concluded(ERASER, columns, args.out, of=found))
