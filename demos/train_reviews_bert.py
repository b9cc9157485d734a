"""Train the bundled `reviews-bert`: a small BertForSequenceClassification that tells bad from good film reviews.

    python demos/train_reviews_bert.py --sst SST --teacher TEACHER --movies MOVIES --out relprop/zoo/reviews-bert

`--sst`: {train,dev,test}.jsonl.gz with {tokens, label, leaf_labels, spans}, the trees of Socher et al. 2013 (Recursive
Deep Models for Semantic Compositionality Over a Sentiment Treebank, EMNLP). `--teacher`: a classifier with the labels
0 negative and 1 positive. `--movies`: train.jsonl.gz with {tokens, sent_ends}, whole reviews, of which only what the
teacher thinks of each sentence is used. The student starts from random weights and learns soft targets: people's labels
of every word and phrase, the mean of people and teacher for sentences, the teacher's alone for the movies.
About half an hour on one core.
"""
from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, MASK = SPECIAL.index("[PAD]"), SPECIAL.index("[MASK]")
POSITIVE = (0.03, 0.2, 0.5, 0.8, 0.97)  # probability that stands for people's labels, very negative to very positive
SENTENCES, PHRASES, MOVIES = 3, 60_000, 25_000  # an epoch: how often each sentence, how many phrases, movie sentences
LONGEST = 40  # words of a movie sentence
POOL = 50  # batches sorted by length together

Example = tuple[str, float]  # text, probability of POSITIVE


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def human_labels(trees: list[dict]) -> dict[str, float]:
    """Mean probability of POSITIVE that people gave each word, phrase and sentence."""
    seen = defaultdict(list)
    for tree in trees:
        words = [(i, i + 1, label) for i, label in enumerate(tree["leaf_labels"])]
        for start, end, label in words + tree["spans"]:
            seen[" ".join(tree["tokens"][start:end])].append(POSITIVE[label])
    return {text: sum(given) / len(given) for text, given in seen.items()}


def sentences(documents: list[dict]) -> list[str]:
    """Distinct sentences of 3 to LONGEST words."""
    found = {}
    for document in documents:
        ends = document["sent_ends"]
        for start, end in zip([0, *ends][:-1], ends, strict=True):
            if 3 <= end - start <= LONGEST:
                found[" ".join(document["tokens"][start:end])] = None
    return list(found)


def key(text: str) -> str:
    """Letters and digits only, for finding the same sentence in another writing."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def as_written(text: str) -> str:
    """Treebank tokens joined as people write them: "do n't" is "don't"."""
    text = re.sub(r" (n't|'\w{1,2})\b", r"\1", text)
    text = re.sub(r" ([.,;:!?)\]%])", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text)


@torch.no_grad()
def teacher_labels(folder: Path, texts: list[str], *, batch: int = 64) -> list[float]:
    """The teacher's probability of POSITIVE for each text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    labels = [0.5] * len(texts)
    for start in tqdm(range(0, len(order), batch), desc="teacher", mininterval=10):
        rows = order[start : start + batch]
        inputs = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
        for i, p in zip(rows, teacher(**inputs).logits.softmax(-1)[:, 1].tolist(), strict=True):
            labels[i] = p
    return labels


def cached_teacher_labels(args: argparse.Namespace, texts: list[str]) -> dict[str, float]:
    """`teacher_labels` by text, kept in `--labels` between runs."""
    if args.labels and args.labels.exists():
        return json.loads(args.labels.read_text())
    labels = dict(zip(texts, teacher_labels(args.teacher, texts), strict=True))
    if args.labels:
        args.labels.write_text(json.dumps(labels))
    return labels


def make_tokenizer(texts: list[str], size: int, out: Path) -> BertTokenizerFast:
    """A lower-case WordPiece tokenizer learnt from the texts, written to `out`."""
    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=size, min_frequency=2, special_tokens=SPECIAL, show_progress=False)
    out.mkdir(parents=True, exist_ok=True)
    learner.save(str(out / "learner.json"))
    tokenizer = BertTokenizerFast(tokenizer_file=str(out / "learner.json"), do_lower_case=True, model_max_length=128)
    (out / "learner.json").unlink()
    tokenizer.save_pretrained(out)
    return tokenizer


def make_model(vocabulary: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=128, pad_token_id=PAD, num_labels=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    return BertForSequenceClassification(config)


def hide(ids: list[int], words: list[int | None], target: float) -> tuple[list[int], float]:
    """Some words masked or left out, and the target drawn as much towards 1/2 as words are gone.

    Explanations are checked by hiding words, so the model must know what to make of it: nothing left, nothing said.
    """
    if torch.rand(()) < 0.4:
        return ids, target
    rate = 1.0 if torch.rand(()) < 0.05 else 0.6 * torch.rand(()).item()
    count = max((w for w in words if w is not None), default=-1) + 1
    draw = torch.rand(count).tolist()
    drop_below = rate * torch.rand(()).item()  # hidden words under this are left out, the others masked
    kept = []
    for token, word in zip(ids, words, strict=True):
        if word is None or draw[word] >= rate:
            kept.append(token)
        elif draw[word] >= drop_below:
            kept.append(MASK)
    hidden = sum(d < rate for d in draw) / max(count, 1)
    return kept, 0.5 + (target - 0.5) * (1 - hidden)


def batches(tokenizer: BertTokenizerFast, examples: list[Example], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids (B, T) and targets (B,) of the examples, shuffled, of like length, half of them written as people do."""
    order = torch.randperm(len(examples)).tolist()
    for start in range(0, len(order), POOL * size):
        pool = [examples[i] for i in order[start : start + POOL * size]]
        texts = [as_written(text) if torch.rand(()) < 0.5 else text for text, _ in pool]
        encoded = tokenizer(texts, truncation=True, max_length=128)
        rows = [hide(encoded["input_ids"][i], encoded.word_ids(i), p) for i, (_, p) in enumerate(pool)]
        rows.sort(key=lambda row: len(row[0]))
        cuts = [rows[at : at + size] for at in range(0, len(rows), size)]
        for i in torch.randperm(len(cuts)).tolist():
            ids = [torch.tensor(row) for row, _ in cuts[i]]
            targets = torch.tensor([p for _, p in cuts[i]])
            yield pad_sequence(ids, batch_first=True, padding_value=PAD), targets


def epochs(
    count: int, whole: list[str], human: dict[str, float], teacher: dict[str, float]
) -> Iterator[list[Example]]:
    """The examples of each epoch: `whole` sentences, phrases of them that people judged, sentences of movie reviews."""
    both = [(text, (human[text] + teacher[text]) / 2) for text in whole]
    parts = [(text, p) for text, p in human.items() if text not in teacher]
    movies = [(text, p) for text, p in teacher.items() if text not in human]
    for _ in range(count):
        some = [parts[i] for i in torch.randperm(len(parts))[:PHRASES].tolist()]
        yield SENTENCES * both + some + [movies[i] for i in torch.randperm(len(movies))[:MOVIES].tolist()]


@torch.no_grad()
def accuracy(model: BertForSequenceClassification, tokenizer: BertTokenizerFast, trees: list[dict]) -> float:
    """Part of the sentences people do not call neutral that the model puts on the right side."""
    model.eval()
    judged = [tree for tree in trees if tree["label"] != 2]
    right = 0
    for start in range(0, len(judged), 64):
        rows = judged[start : start + 64]
        texts = [" ".join(tree["tokens"]) for tree in rows]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        said = model(**inputs).logits.argmax(-1) == 1
        right += (said == torch.tensor([tree["label"] > 2 for tree in rows])).sum().item()
    return right / len(judged)


def write(model: BertForSequenceClassification, out: Path) -> None:
    """Weights in half precision, to be small; the config says float32, so that they are computed with in float32."""
    model.config.architectures, model.config.dtype = ["BertForSequenceClassification"], "float32"
    model.config.save_pretrained(out)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def train(
    model: BertForSequenceClassification,
    tokenizer: BertTokenizerFast,
    data: Iterator[list[Example]],
    dev: list[dict],
    args: argparse.Namespace,
) -> None:
    """AdamW under a cosine; what is kept is the moving average of the weights, where it did best on dev."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule, best = None, 0.0
    for epoch, examples in enumerate(data, start=1):
        steps = -(-len(examples) // args.batch)
        if schedule is None:
            total = args.epochs * (steps + 1)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=total, pct_start=0.1)
        model.train()
        bar = tqdm(batches(tokenizer, examples, args.batch), total=steps, desc=f"epoch {epoch}", mininterval=10)
        for ids, target in bar:
            logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
            loss = F.cross_entropy(logits, torch.stack([1 - target, target], dim=1))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        reached = accuracy(average.module, tokenizer, dev)
        tqdm.write(f"epoch {epoch}: dev {reached:.4f}, without averaging {accuracy(model, tokenizer, dev):.4f}")
        if reached >= best:
            best = reached
            write(average.module, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sst", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--movies", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("relprop/zoo/reviews-bert"))
    parser.add_argument("--labels", type=Path, help="file for the teacher's labels, written once and read after")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    trees, dev, test = (read(args.sst / f"{split}.jsonl.gz") for split in ("train", "dev", "test"))
    unseen = {key(" ".join(tree["tokens"])) for tree in dev + test}
    human = {text: p for text, p in human_labels(trees).items() if key(text) not in unseen or len(text.split()) < 4}
    trees = [tree for tree in trees if " ".join(tree["tokens"]) in human]
    movies = [text for text in sentences(read(args.movies / "train.jsonl.gz")) if key(text) not in unseen]
    whole = list(dict.fromkeys(" ".join(tree["tokens"]) for tree in trees))
    teacher = cached_teacher_labels(args, whole + movies)
    tokenizer = make_tokenizer([as_written(text) for text in whole + whole + movies], args.vocabulary, args.out)
    model = make_model(len(tokenizer))
    train(model, tokenizer, epochs(args.epochs, whole, human, teacher), dev, args)
    kept = AutoModelForSequenceClassification.from_pretrained(args.out, dtype=torch.float32)
    print({split: round(accuracy(kept, tokenizer, rows), 4) for split, rows in (("dev", dev), ("test", test))})


if __name__ == "__main__":
    main()
