"""Achtibat et al. 2024, table 1: area between the logit by least and by most relevant first, and where answers stand.

    python demos/recipe_attnlrp.py imagenet --data imagenet/val --model timm/vit_base_patch16_224 --out out/imagenet
    python demos/recipe_attnlrp.py wikipedia --data dump.jsonl --model meta-llama/Llama-2-7b-hf --out out/wikipedia
    python demos/recipe_attnlrp.py imdb --data aclImdb/test --model FOLDER --classes neg=0,pos=1 --out out/imdb
    python demos/recipe_attnlrp.py squad --data dev-v2.0.json --model FOLDER --out out/squad

imagenet, imdb: one subfolder a class. wikipedia: text, of which the next token is explained. squad: a language model
is asked, and the first token of the answer is explained; pointing-game is the accuracy of the most relevant word. What
the model gets wrong is left out, but with --all.
"""
from __future__ import annotations

from relprop import data, load
from relprop.benchmark import benchmark, recipe
from relprop.benchmark.published import ANSWER_METRIC, AREA_METRIC, ATTNLRP, means

TASKS = {"imagenet": (["area"], data.imagefolder), "wikipedia": ([AREA_METRIC], data.passages),
         "imdb": ([AREA_METRIC], data.textfolder), "squad": (["pointing-game", ANSWER_METRIC, AREA_METRIC], data.squad)}
METHODS = ["attnlrp", "cp-lrp", "attnlrp-gamma", "transformer-attribution", "rollout", "attention-gradcam",
           "input-x-gradient", "integrated-gradients", "smoothgrad"]

options = recipe.parser(__doc__, model="timm/vit_base_patch16_224", methods=METHODS, data="as the task says")
options.add_argument("task", choices=TASKS)
options.add_argument("--length", type=int, metavar="N", help="most words of a text (default: 100 of wikipedia)")
options.add_argument("--classes", metavar="NAME=N,...", help="class of each subfolder, or a file with them")
options.add_argument("--all", action="store_true", help="measure what the model gets wrong as well")
options.add_argument("--dtype", help="of the model, such as bfloat16 (default: float32 on a CPU, elsewhere as saved)")

with recipe.errors_in_a_line():
    args = options.parse_args()
    metrics, read = TASKS[args.task]
    more = {"length": args.length} if args.length and args.task != "imagenet" else {}
    if args.classes:
        more["classes"] = recipe.pairs(args.classes) if "=" in args.classes else args.classes
    examples = read(args.data, args.limit, seed=args.seed, **more)
    subject = load(args.model, device=args.device, dtype=args.dtype)

    found = benchmark(subject, examples, methods=args.methods, metrics=metrics, out=args.out, count=None,
                      seed=args.seed, batch_size=args.batch_size, correct_only=not args.all)

    columns = {metric["name"]: means(found, metric["name"]) for metric in found.metrics}
    if recipe.leads():  # of several processes, the first
        print(recipe.concluded(ATTNLRP, columns, args.out, of=found))
