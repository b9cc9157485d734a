"""Train the bundled `tasks-gpt2`: a small GPT2LMHeadModel that completes the sentences of `relprop.zoo.tasks`.

    python demos/train_tasks_gpt2.py --out relprop/zoo/tasks-gpt2

The text is made as it goes. The model learns to say which word follows, and where a sentence asks for something, how
likely each of the words is that may follow. What is kept is the moving average of the weights. A run that was stopped
goes on from `--checkpoint`. About half an hour on one core.
"""
from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.stats import spearmanr
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from relprop import data
from relprop.zoo import tasks

START, UNKNOWN = "<|endoftext|>", "<unk>"
KINDS = {"indirect objects": (tasks.indirect_sentences, 2), "year spans": (tasks.span_sentences, 1),
         "professions": (tasks.profession_sentences, 1)}
"""Who makes the sentences, and how many parts of four each has of a batch."""
OTHER = 0.1  # weight of the words that are not asked for
REST = 0.01  # how often a word is hidden as <unk>, as tools that leave words out do it
WORD = r" ?\p{L}+| ?\d\d?|[^\s\p{L}\d]|\s"  # years are a century and two digits


def make_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, written to `out`. The space before a word is a part of it, as with GPT-2."""
    marked = {word.replace(" ", "\u0120") for word in tasks.words()}
    vocabulary = {word: row for row, word in enumerate([START, UNKNOWN, *sorted(marked)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START, pad_token=START,
                                   unk_token=UNKNOWN, model_max_length=64, clean_up_tokenization_spaces=False)
    fast.save_pretrained(out)
    return AutoTokenizer.from_pretrained(out)


def make_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> GPT2LMHeadModel:
    start = tokenizer.bos_token_id
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=start, eos_token_id=start))


def continued(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> GPT2LMHeadModel:
    """The model with the weights of an earlier one, whose words may have been fewer: the others stay as they are."""
    known, before = AutoTokenizer.from_pretrained(folder).get_vocab(), tokenizer.get_vocab()
    weights = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    embedding = model.transformer.wte.weight.detach().clone()
    shared = sorted(known.keys() & before.keys())
    embedding[[before[word] for word in shared]] = weights["transformer.wte.weight"][[known[word] for word in shared]]
    model.load_state_dict({**weights, "transformer.wte.weight": embedding, "lm_head.weight": embedding})
    return model


def batch(tokenizer: PreTrainedTokenizerFast, sentences: list[tasks.Sentence], rng: random.Random
          ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids (B, T) with what may be left open after them (-100: padding), the place (B,) of what is asked for, and the
    probability of each word there, (B, V).
    """
    start = tokenizer.bos_token_id
    vocabulary = tokenizer.get_vocab()
    prompts = tokenizer([one.prompt for one in sentences])["input_ids"]
    rests = tokenizer([one.rest for one in sentences], add_special_tokens=False)["input_ids"]
    targets = torch.zeros(len(sentences), len(tokenizer))
    rows = []
    for row, (one, prompt, rest) in enumerate(zip(sentences, prompts, rests, strict=True)):
        answers = {vocabulary[word.replace(" ", "\u0120")]: p for word, p in one.answers.items()}
        targets[row, list(answers)] = torch.tensor(list(answers.values()))
        rows.append([*prompt, *rng.choices(list(answers), list(answers.values())), *rest, start])
    width = max(map(len, rows))
    ids = torch.tensor([row + [start] * (width - len(row)) for row in rows])
    following = torch.tensor([row[1:] + [-100] * (width - len(row) + 1) for row in rows])
    return ids, following, torch.tensor([len(prompt) - 1 for prompt in prompts]), targets


def losses(model: GPT2LMHeadModel, made: tuple[Tensor, Tensor, Tensor, Tensor], unknown: int) -> tuple[Tensor, Tensor]:
    """In nats: of what is asked for, above the least there can be, and of all other words."""
    ids, following, place, targets = made
    rows = torch.arange(len(ids))
    hidden = (torch.rand(ids.shape) < REST) & (targets.gather(1, ids) == 0) & (ids != 0)  # not what is copied
    z = model(ids.masked_fill(hidden, unknown)).logits  # (B, T, V)
    least = torch.special.entr(targets).sum(1)
    asked = F.cross_entropy(z[rows, place], targets, reduction="none") - least
    following = following.index_put((rows, place), torch.tensor(-100))
    return asked.mean(), F.cross_entropy(z.transpose(1, 2), following)


@torch.no_grad()
def shrink_heads(model: GPT2LMHeadModel, by: float) -> float:
    """Takes `by` from the norm of each head's weights of values and of outputs, and returns the sum of what is left.

    A head that does not earn it back goes to zero, so that few are left to do a thing (group lasso by proximal steps,
    Yuan and Lin 2006).
    """
    total, config = 0.0, model.config
    for block in model.transformer.h:
        value = block.attn.c_attn.weight[:, -config.n_embd:].unflatten(1, (config.n_head, -1))  # (D, H, K)
        output = block.attn.c_proj.weight.unflatten(0, (config.n_head, -1))  # (H, K, D)
        size = (value.square().sum((0, 2)) + output.square().sum((1, 2))).sqrt()  # (H,)
        kept = (1 - by / size.clamp(min=1e-9)).clamp(min=0)
        value *= kept[:, None]  # these are views of the weights
        output *= kept[:, None, None]
        bias = block.attn.c_attn.bias[-config.n_embd:].unflatten(0, (config.n_head, -1))  # (H, K)
        bias *= kept[:, None]  # or the head comes back
        total += (size * kept).sum().item()
    return total


@torch.no_grad()
def after(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    """Probability of each next word, (B, V)."""
    ids = tokenizer(prompts, padding=True, return_tensors="pt")
    z = model(**ids).logits.log_softmax(-1)
    return z[torch.arange(len(prompts)), ids["attention_mask"].sum(1) - 1].exp()


def figures(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, *, count: int = 400, seed: int = 1
            ) -> dict[str, float]:
    """What the model reaches on combinations of words that it was not trained on."""
    model.eval()
    ids = lambda words: torch.tensor([tokenizer.encode(word, add_special_tokens=False) for word in words])[:, 0]
    pairs = data.indirect_objects(count, seed=seed)
    p = after(model, tokenizer, pairs.bases)
    right, wrong = (ids([one.continuations[side] for one in pairs.pairs])[:, None] for side in (1, 0))
    found = {"indirect objects": (p.argmax(1, keepdim=True) == right).float().mean(),
             "logit difference": (p.gather(1, right) / p.gather(1, wrong)).log().mean()}
    spans = data.year_spans(count, seed=seed)
    q = after(model, tokenizer, spans.bases)[:, ids(tasks.YEARS)]  # (B, 100)
    start = torch.tensor([one.facts["year"] for one in spans.pairs])[:, None]
    found["later years"] = (q * (torch.arange(100) > start)).sum(1).mean()
    held = data.planted_professions(split="test")
    she, he = after(model, tokenizer, held.bases)[:, ids([" she", " he"])].log().unbind(1)
    size = torch.tensor([one.facts["planted"] for one in held.pairs])
    found |= {"rank of professions": torch.tensor(spearmanr(size, she - he).statistic),
              "sign of professions": ((she - he) * size > 0).float().mean(),
              "error of professions": (she - he - size).abs().max()}
    return {name: round(value.item(), 4) for name, value in found.items()}


def write(model: GPT2LMHeadModel, out: Path) -> None:
    """Weights in half precision, to be small; the config says float32, so that they are computed with in float32."""
    model.config.architectures, model.config.dtype = ["GPT2LMHeadModel"], "float32"
    model.config.save_pretrained(out)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]  # is the embedding
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


class Training:
    """A model, its moving average, and all else that a run needs to go on after it was stopped."""

    def __init__(self, model: GPT2LMHeadModel, args: argparse.Namespace) -> None:
        self.model, self.step, self.file = model, 0, args.checkpoint
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        decayed = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": args.decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, args.lr, total_steps=args.steps + 1,
                                                            pct_start=0.1)
        if self.file is not None and self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.step = saved.pop("step")
            for name, state in saved.items():
                getattr(self, name).load_state_dict(state)

    def save(self) -> None:
        if self.file is None:
            return
        parts = ("model", "average", "optimizer", "schedule")
        part = self.file.with_suffix(".part")
        torch.save({"step": self.step, **{name: getattr(self, name).state_dict() for name in parts}}, part)
        part.replace(self.file)

    def advance(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        self.step += 1


def train(training: Training, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """AdamW under a cosine, each step on sentences of all kinds."""
    bar = tqdm(initial=training.step, total=args.steps, mininterval=10)
    while training.step < args.steps:
        training.model.train()
        rng = random.Random(f"{args.seed} {training.step}")
        torch.manual_seed(args.seed * 1_000_003 + training.step)
        loss, said = torch.zeros(()), {}
        for name, (make, parts) in KINDS.items():
            made = batch(tokenizer, make(rng, args.batch * parts // 4), rng)
            asked, other = losses(training.model, made, tokenizer.unk_token_id)
            loss = loss + asked + OTHER * other
            said[name] = f"{asked.item():.3f}"
        training.advance(loss)
        sparse = args.sparse if training.step >= args.grown * args.steps else 0.0
        said["heads"] = f"{shrink_heads(training.model, sparse * training.schedule.get_last_lr()[0]):.0f}"
        bar.update()
        bar.set_postfix(said, refresh=False)
        if training.step % args.every == 0 or training.step == args.steps:
            tqdm.write(f"step {training.step}: {json.dumps(figures(training.average.module, tokenizer))}")
            write(training.average.module, args.out)
            training.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("relprop/zoo/tasks-gpt2"))
    parser.add_argument("--checkpoint", type=Path, help="file to go on from, if it is there, and to write to")
    parser.add_argument("--start", type=Path, help="folder of an earlier model of the same shape, to start from")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128, help="sentences")
    parser.add_argument("--every", type=int, default=250, help="steps between figures, weights and checkpoints")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--sparse", type=float, default=6.0, help="how much heads shrink, times the learning rate")
    parser.add_argument("--grown", type=float, default=0.4, help="part of the run after which they do")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.out)
    model = make_model(tokenizer, args)
    if args.start is not None:
        model = continued(model, tokenizer, args.start)
    train(Training(model, args), tokenizer, args)
    kept = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32)
    print(json.dumps({"parameters": kept.num_parameters(), **figures(kept, tokenizer, count=2000, seed=2)}, indent=2))


if __name__ == "__main__":
    main()
