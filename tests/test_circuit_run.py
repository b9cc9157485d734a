"""A circuit run alone: against the forward pass written out by hand, in every family, with every ablation."""
from __future__ import annotations

from importlib import import_module

import pytest
import torch
import transformers
from families import FAMILIES, model
from peers import CASES, case
from test_address import MORE
from test_circuit_graph import Attentions
from torch import Tensor, nn

from relprop.circuit import Task
from relprop.circuit.ablated import ablated
from relprop.circuit.graph import graph
from relprop.circuit.run import Piece, Pieces, outcomes
from relprop.circuit.streams import Chain, Sum
from relprop.errors import RelpropError
from relprop.intervene import Mean, Resample, Zero, intervened
from relprop.mediation import KL, LogOdds
from relprop.mediation.outcome import Outcome, Question
from relprop.mediation.task import ready
from relprop.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CHAINS = {"bert", "bert-eager", "bert-masked-lm", "roberta", "distilbert", "electra", "opt-post-norm", "gemma2",
          "gemma3", "timm-cait", "timm-swin", "torch-encoder", "albert"}
SLOW = {"albert", "bert-eager", "bert-masked-lm", "distilbert", "electra", "falcon", "gemma3", "gpt-bigcode",
        "gpt-neox-sequential", "hf-deit", "hf-deit-distilled", "hf-dinov2", "hf-dinov2-registers", "hf-dinov2-swiglu",
        "llama-eager", "mistral", "modernbert", "opt", "opt-post-norm", "phi3", "qwen2", "qwen2-moe", "roberta",
        "t5-encoder", "t5-encoder-gated", "timm-beit", "timm-cait", "timm-deit", "timm-deit-distilled", "timm-swin",
        "timm-vit", "torch-encoder", "torchvision-vit"}
SEVERAL = {"deberta-v2", "deberta-v3"}  # their scores are sums of several products
EXPERTS = {"mixtral", "qwen2-moe"}  # whose products of matrices are in float32 at most
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in (*FAMILIES, *MORE)
         if name not in SEVERAL and name not in ("t5", "bart")]


def prepared(name: str, dtype: torch.dtype = torch.float64):
    """A task of a family: other words of the same length, or the other pictures."""
    family = FAMILIES.get(name) or MORE[name]
    whole = model(name, dtype) if name in FAMILIES else family.model().to(dtype)
    args, kwargs = family.inputs(dtype)
    if args:
        clean, other = args[0], 0.7 * args[0].flip(0) + 0.1
    else:
        drawn = torch.randint(3, 40, kwargs["input_ids"].shape, generator=torch.Generator().manual_seed(5))
        clean, other = kwargs, {**kwargs, "input_ids": torch.where(kwargs["attention_mask"] > 0, drawn,
                                                                   kwargs["input_ids"])}
    return Task("words", clean, other, family.value).prepared(Subject.from_module(whole))


def drawn(pieces: Pieces, count: int = 5, share: float = 0.3) -> Tensor:
    """Edges that are cut at random, (C, D, S)."""
    edges = pieces.wired.graph.edges.T
    return (torch.rand(count, *edges.shape, generator=torch.Generator().manual_seed(3)) < share) & edges


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_all_kept_is_clean_and_all_cut_is_corrupted(name):
    task = prepared(name, torch.float32 if name in EXPERTS else torch.float64)
    with ready(task.model):
        pieces = Pieces(task)
        edges = pieces.wired.graph.edges.T
        cut = torch.stack([torch.zeros_like(edges), edges, *drawn(pieces, 2)])
        found = pieces.run(cut)
        kind = type(pieces.ready(pieces.rows[0]).streams)
    clean, corrupted = task.measured
    assert kind is (Chain if name in CHAINS else Sum)
    close = 1e-6 if name in EXPERTS else 1e-12
    torch.testing.assert_close(found[:2], torch.stack([clean, corrupted]), rtol=0, atol=close)
    assert float((clean - corrupted).abs().max()) > 1e-3 and float((found[2:] - clean).abs().min()) > 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "bloom", "hf-vit", "torch-encoder-sequence-first"])
def test_a_sum_of_streams_is_what_the_model_makes_of_the_parts(name):
    task = prepared(name)
    with ready(task.model):
        pieces = Pieces(task)
        cut, piece = drawn(pieces), pieces.ready(pieces.rows[0])
        found = piece.run(cut)
        piece.streams = Chain(pieces.wired, piece.stage, ablated(task, pieces.wired.taps, "resample"))
        torch.testing.assert_close(piece.run(cut), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "rounds"), [("gpt2", 1), ("gpt-neox", 1), ("llama", 2), ("torchvision-vit", 1)])
def test_a_heads_entries_alone_are_what_all_are(monkeypatch, name, rounds):
    """Of linear maps that make queries, keys and values; heads that share some take turns."""
    task, module = prepared(name), import_module("relprop.circuit.piece")
    with ready(task.model):
        pieces = Pieces(task)
        cut = drawn(pieces)
        monkeypatch.setattr(module, "MANY", 10 ** 9)
        found = pieces.run(cut)
        monkeypatch.setattr(module, "MANY", 0)
        monkeypatch.setattr(Piece, "_operands", None)  # is not called
        torch.testing.assert_close(pieces.run(cut), found, rtol=0, atol=1e-12)
        assert [len(made.rounds) for made in pieces.projections[0]] == [rounds] * 2


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "bert"])
def test_rows_and_circuits_are_run_as_each_would_be_alone(name):
    task = prepared(name)
    with ready(task.model):
        pieces = Pieces(task)
        cut = drawn(pieces)
        found = pieces.run(cut)
        small = Pieces(task, batch_size=1).run(cut)
        alone = torch.cat([Pieces(task.take([row])).run(cut) for row in range(task.rows)], -1)
    torch.testing.assert_close(small, found, rtol=0, atol=1e-12)
    torch.testing.assert_close(alone, found, rtol=0, atol=1e-12)


def test_attentions_alone():
    torch.manual_seed(0)
    whole = Attentions().double().eval()
    task = Task("words", ids(7, 1), ids(7, 2), lambda x: x[:, -1, 2]).prepared(Subject.from_module(whole))
    with ready(whole):
        pieces = Pieces(task)
        edges, piece = pieces.wired.graph.edges.T, pieces.ready(pieces.rows[0])
        cut = torch.stack([torch.zeros_like(edges), edges, *drawn(pieces)])
        found = piece.run(cut)
        assert isinstance(piece.streams, Sum)
        piece.streams = Chain(pieces.wired, piece.stage, ablated(task, pieces.wired.taps, "resample"))
        torch.testing.assert_close(piece.run(cut), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[:2], torch.stack(task.measured), rtol=0, atol=1e-12)


def test_memory_that_runs_out_is_halved(monkeypatch):
    task = prepared("gpt2")
    walk, sizes = Piece._walk, []

    def small(self, cut, start):
        sizes.append(len(cut))
        if len(cut) > 1:
            raise MemoryError
        return walk(self, cut, start)

    with ready(task.model):
        pieces = Pieces(task)
        cut = drawn(pieces)
        found = pieces.run(cut)
        monkeypatch.setattr(Piece, "_walk", small)
        torch.testing.assert_close(pieces.run(cut), found, rtol=0, atol=1e-12)
    assert max(sizes) == len(cut) and sizes.count(1) == len(cut)


def test_denoising_is_the_other_run_with_the_other_edges():
    task = prepared("llama")
    with ready(task.model):
        noisy = Pieces(task)
        edges = noisy.wired.graph.edges.T
        found = Pieces(task, denoise=True).run(torch.stack([torch.zeros_like(edges), edges]))
        clean, corrupted = task.measured
        torch.testing.assert_close(found, torch.stack([corrupted, clean]), rtol=0, atol=1e-12)
        some = drawn(noisy)
        back = Pieces(prepared_backwards(task), denoise=False).run(some)
        torch.testing.assert_close(Pieces(task, denoise=True).run(some), back, rtol=0, atol=1e-12)


def prepared_backwards(task):
    return Task("back", task.corrupted, task.clean, task.task.metric).prepared(task.subject)


# -- by hand ----------------------------------------------------------------------------------------------------------


def ids(vocabulary: int, seed: int, rows: int = 3, length: int = 5) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=2, n_head=3, n_embd=12, vocab_size=17, n_positions=8, bos_token_id=0,
                                     eos_token_id=0)
    return _moved(transformers.GPT2LMHeadModel(config))


def grouped() -> nn.Module:
    """Two query heads a key; of this family no part is in float32 whatever the model is."""
    config = transformers.Starcoder2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                                           intermediate_size=20, num_key_value_heads=2, vocab_size=17,
                                           max_position_embeddings=8, bos_token_id=0, eos_token_id=0)
    return _moved(transformers.Starcoder2ForCausalLM(config))


def _moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5 + (parameter.dim() == 1)
    return model.double().eval()


class Hand:
    """A forward pass written out, head by head: each source by name in `made`, and each input with a sum of its own."""

    def __init__(self, model: nn.Module, tokens: Tensor, cut: dict | None = None, gone: dict | None = None) -> None:
        self.cut, self.gone, self.made, self.bias = cut or {}, gone or {}, {}, 0
        self.logits = (self.gpt2 if hasattr(model, "transformer") else self.grouped)(model, tokens)

    def read(self, name: str) -> Tensor:
        whole = self.bias
        for source, value in self.made.items():
            where = self.cut.get((source, name), False)
            whole = whole + torch.where(torch.as_tensor(where)[..., None], self.gone.get(source, value), value)
        return whole

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1) @ v

    def gpt2(self, model: nn.Module, tokens: Tensor) -> Tensor:
        body, H = model.transformer, model.config.n_head
        self.made["embed"] = body.wte(tokens) + body.wpe.weight[:tokens.shape[1]]
        for number, block in enumerate(body.h):
            heads = {}
            for h in range(H):
                name = f"L{number}.attn.H{h}"
                q, k, v = (block.attn.c_attn(block.ln_1(self.read(f"{name}.{inner}"))).chunk(3, -1)[i].chunk(H, -1)[h]
                           for i, inner in enumerate("qkv"))
                heads[name] = self.attend(q, k, v) @ block.attn.c_proj.weight.chunk(H)[h]
            self.made |= heads
            self.bias = self.bias + block.attn.c_proj.bias
            self.made[f"L{number}.mlp"] = block.mlp(block.ln_2(self.read(f"L{number}.mlp")))
        return model.lm_head(body.ln_f(self.read("logits")))

    def grouped(self, model: nn.Module, tokens: Tensor) -> Tensor:
        from transformers.models.starcoder2.modeling_starcoder2 import apply_rotary_pos_emb

        body, H, K = model.model, model.config.num_attention_heads, model.config.num_key_value_heads
        self.made["embed"] = body.embed_tokens(tokens)
        turns = body.rotary_emb(self.made["embed"], torch.arange(tokens.shape[1])[None])
        for number, block in enumerate(body.layers):
            heads, own = {}, block.self_attn
            for h in range(H):
                name, shared = f"L{number}.attn.H{h}", h * K // H
                q, k, v = (map_(block.input_layernorm(self.read(f"{name}.{inner}"))).chunk(n, -1)[i] for inner, map_, n,
                           i in (("q", own.q_proj, H, h), ("k", own.k_proj, K, shared), ("v", own.v_proj, K, shared)))
                q, k = (one[:, 0] for one in apply_rotary_pos_emb(q[:, None], k[:, None], *turns))
                heads[name] = self.attend(q, k, v) @ own.o_proj.weight.T.chunk(H)[h]
            self.made |= heads
            self.bias = self.bias + own.o_proj.bias
            self.made[f"L{number}.mlp"] = block.mlp(block.post_attention_layernorm(self.read(f"L{number}.mlp")))
        return model.lm_head(body.norm(self.read("logits")))


def gone_by_hand(model: nn.Module, ablation: str, corrupted: Tensor) -> dict[str, Tensor]:
    """What is put in the place of each source."""
    made = Hand(model, corrupted).made
    if ablation == "resample":
        return made
    if ablation != "zero":
        return {name: value.mean((0,) if ablation == "mean by position" else (0, 1), keepdim=True).expand_as(value)
                if name != "embed" or not hasattr(model, "transformer") else
                model.transformer.wte(corrupted).mean((0,) if ablation == "mean by position" else (0, 1), keepdim=True)
                + model.transformer.wpe.weight[:corrupted.shape[1]] + 0 * value for name, value in made.items()}
    zeros = {name: torch.zeros_like(value) for name, value in made.items()}
    if hasattr(model, "transformer"):  # positions are no source
        zeros["embed"] = zeros["embed"] + model.transformer.wpe.weight[:corrupted.shape[1]]
    return zeros


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean", "mean by position"])
@pytest.mark.parametrize("made", [gpt2, grouped])
@torch.no_grad()
def test_circuits_by_hand(made, ablation):
    model, clean, corrupted = made(), ids(17, 1), ids(17, 2)
    torch.testing.assert_close(Hand(model, clean).logits, model(clean).logits, rtol=0, atol=1e-11)
    task = Task("words", clean, corrupted, LogOdds([3], [7])).prepared(Subject.from_module(model))
    pairs = list(graph(model, clean).pairs())
    draw = torch.rand(3, len(pairs), generator=torch.Generator().manual_seed(4))
    kept = [[edge for edge, one in zip(pairs, row) if one > share] for row, share in zip(draw, (0.02, 0.3, 0.8))]
    gone = gone_by_hand(model, ablation, corrupted)
    by_hand = [Hand(model, clean, {edge: edge not in some for edge in pairs}, gone).logits[:, -1] for some in kept]
    expected = torch.stack([z[:, 3] - z[:, 7] for z in by_hand])
    found = outcomes(task, kept, ablation=ablation)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert float((expected - task.measured[0]).abs().min()) > 1e-6


@torch.no_grad()
def test_edges_at_positions_by_hand():
    model, clean, corrupted = gpt2(), ids(17, 1), ids(17, 2)
    spans = {"name": [[1, 2], [0], [3]]}
    task = Task("words", clean, corrupted, LogOdds([3], [7]), spans).prepared(Subject.from_module(model))
    among = [("embed", "L1.attn.H2.k@-1"), ("L0.mlp", "L1.attn.H2.k@name"), ("L0.attn.H1", "L0.mlp"),
             ("L1.mlp@4", "logits@4"), ("embed", "L0.attn.H0.v@1-2")]
    at = torch.zeros(5, 3, 5, dtype=torch.bool)
    at[0, :, 4] = at[2] = at[3, :, 4] = at[4, :, 1:3] = True
    at[1, 0, 1:3] = at[1, 1, 0] = at[1, 2, 3] = True
    whole = [tuple(end.partition("@")[0] for end in edge) for edge in among]
    gone = Hand(model, corrupted).made
    for left in ([0], [1], [2], [3], [4], [0, 1, 2, 3, 4]):
        hand = Hand(model, clean, {whole[i]: at[i] for i in left}, gone).logits[:, -1]
        found = outcomes(task, [[edge for i, edge in enumerate(among) if i not in left]], among=among)
        torch.testing.assert_close(found[0], hand[:, 3] - hand[:, 7], rtol=0, atol=1e-11)
        assert float((found[0] - task.measured[0]).abs().max()) > 1e-6


@torch.no_grad()
def test_means_are_of_a_rows_own_group():
    model, clean, corrupted = gpt2(), ids(17, 1, rows=4), ids(17, 2, rows=4)
    task = Task("words", clean, corrupted, 3, groups=["a", "b", "a", "b"]).prepared(Subject.from_module(model))
    tap = Pieces(task).wired.sources[1]
    by_group = [ablated(Task("words", clean[g::2], corrupted[g::2], 3).prepared(Subject.from_module(model)), [tap],
                        "mean by position")[tap][0] for g in (0, 1)]
    found = ablated(task, [tap], "mean by position")[tap]
    for row in range(4):
        torch.testing.assert_close(found[row], by_group[row % 2])
    assert not torch.allclose(by_group[0], by_group[1])
    with pytest.raises(ValueError, match="8 reference inputs and 4 groups"):
        ablated(Task("words", clean, corrupted, 3, groups=["a", "b", "a", "b"], reference=ids(17, 5, rows=8)).prepared(
            Subject.from_module(model)), [tap], "mean")


# -- nodes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean", "mean by position"])
@torch.no_grad()
def test_nodes_are_what_interventions_make_of_them(ablation):
    model, clean, corrupted = grouped(), ids(17, 1), ids(17, 2)
    task = Task("words", clean, corrupted, LogOdds([3], [7])).prepared(Subject.from_module(model))
    among = ["L0.attn.H1", "L0.attn.H2@-1", "L1.attn.H3", "L0.mlp", "L1.mlp.N4", "L1.mlp@1"]
    kept = [among[:2], among[3:], among, []]
    value = {"resample": Resample((corrupted,)), "zero": Zero(), "mean": Mean((corrupted,)),
             "mean by position": Mean((corrupted,), per_position=True)}[ablation]
    found = outcomes(task, kept, among=among, ablation=ablation)
    for some, one in zip(kept, found):
        left = {name: value for name in among if name not in some}
        with intervened(model, left):
            z = model(clean).logits[:, -1]
        torch.testing.assert_close(one, z[:, 3] - z[:, 7], rtol=0, atol=1e-12)
    assert not torch.allclose(found[0], found[3]) and torch.equal(found[2], task.measured[0])
    late = {name: value for name in ("L0.attn.H2@-1", "L1.mlp@-1", "L0.attn.H0@3")}  # what is before them is cached
    with intervened(model, late):
        z = model(clean).logits[:, -1]
    torch.testing.assert_close(outcomes(task, [[]], among=list(late), ablation=ablation)[0], z[:, 3] - z[:, 7],
                               rtol=0, atol=1e-12)


def test_a_node_is_all_the_edges_that_leave_it():
    task = prepared("gpt-neox")
    nodes = ["L0.attn.H1", "L0.mlp", "L1.attn.H0", "embed"]
    pairs = list(graph(task.subject, task.clean).pairs())
    for node in nodes:
        by_node = outcomes(task, [[]], among=[node])
        by_edge = outcomes(task, [[edge for edge in pairs if edge[0] != node]])
        torch.testing.assert_close(by_edge, by_node, rtol=0, atol=1e-12)


# -- against the original codes ---------------------------------------------------------------------------------------


class Logits(Outcome):
    """The logits of the last position, (R, V) for each row."""

    def pairs(self, subject, base, counterfactual):
        asked = [Question(batch, torch.full((batch.rows, 1), batch.kwargs["input_ids"].shape[1] - 1),
                          lambda z, rows: z[:, 0], torch.ones_like(batch.kwargs["input_ids"], dtype=torch.bool))
                 for batch in (base, counterfactual)]
        return [tuple(asked)]

    def name(self, subject):
        return "logits"


def asked(one, outcome=None):
    labels = one.labels.T[..., None].tolist()
    return Task("reference", one.clean, one.corrupted, outcome or LogOdds(*labels)).prepared(
        Subject.from_module(one.model))


def matrix(one, pieces: Pieces, kept: Tensor) -> Tensor:
    """Their circuit, bool (S, D), as the edges that are cut, (D, S)."""
    sources, destinations = pieces.wired.graph.names
    order = [[names.index(name) for name in theirs] for names, theirs in zip((sources, destinations), one.names)]
    cut = torch.zeros_like(pieces.wired.graph.edges)
    cut[torch.tensor(order[0])[:, None], torch.tensor(order[1])] = ~kept.bool()
    return (cut & pieces.wired.graph.edges).T


@pytest.mark.parametrize("name", CASES)
def test_circuits_give_the_metric_of_the_original_codes(shared, name):
    one = case(shared / "reference", name)
    with ready(one.model):
        pieces = Pieces(asked(one))
        for kind in ("topn", "greedy"):
            kept = one.out[f"{kind}.eap_ig_inputs.in_graph"]
            assert 0 < int(kept.sum()) < int(one.out["real_edge_mask"].sum())
            found = pieces.run(matrix(one, pieces, kept)[None])[0]
            _close(found, one.out[f"{kind}.eap_ig_inputs.metric_per_example"])
        divergence = Pieces(asked(one, KL()))
        kept = one.out["topn.eap_ig_inputs.in_graph"]
        _close(divergence.run(matrix(one, divergence, kept)[None])[0], one.out["topn.eap_ig_inputs.kl_per_example"])


@pytest.mark.parametrize("name", CASES)
def test_circuits_give_the_logits_of_auto_circuit(shared, name):
    one = case(shared / "reference", name)
    scores, real = one.out["eap_ig_inputs.edge_scores"].abs(), one.out["real_edge_mask"]
    order = torch.where(real, scores, -1).flatten().sort(descending=True).indices
    task = asked(one, Logits())
    with ready(one.model):
        for kind, denoise in (("tree", False), ("edge", True)):
            pieces = Pieces(task, denoise=denoise)
            cuts = []
            for count in one.out[f"ac.run_circuits_{kind}.edge_counts"].tolist():
                kept = torch.zeros(real.numel(), dtype=torch.bool)
                kept[order[:count]] = True
                kept = kept.view_as(real)
                cuts.append(matrix(one, pieces, ~kept if denoise else kept))  # clean values go where the circuit is
            found = pieces.ready(pieces.rows[0]).run(torch.stack(cuts))
            _close(found, one.out[f"ac.run_circuits_{kind}.logits_last"])


def _close(found: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(found, reference.double(), rtol=0, atol=1e-5 * float(reference.abs().max()))


# -- given back, and bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "hf-vit"])
def test_the_model_is_given_back(name):
    task = prepared(name)
    whole = task.model
    before = {path: module for path, module in whole.named_modules()}
    plain = task.forward()
    outcomes(task, [[]])
    assert dict(whole.named_modules()) == before and torch.equal(task.forward(), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in whole.modules())
    with ready(whole):
        pieces = Pieces(task)
        piece = pieces.ready(pieces.rows[0])
        piece.streams.wired = None
        with pytest.raises(AttributeError):
            piece.run(drawn(pieces))
    assert dict(whole.named_modules()) == before and torch.equal(task.forward(), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in whole.modules())


def test_a_pass_that_never_comes_there_is_told():
    from relprop.circuit.wiring import passed
    from relprop.trace import Tap

    task = prepared("gpt2")
    with ready(task.model):
        pieces = Pieces(task)
        stage = pieces.ready(pieces.rows[0]).stage
        with pytest.raises(RelpropError, match="never came to Tap.path='nowhere'"):
            passed(stage, 1, {}, start=pieces.wired.embed, keep=[Tap("nowhere")])


@pytest.mark.parametrize(("circuits", "more", "message"), [
    ([[("embed", "L9.mlp")]], {}, "'L9.mlp'. is in a circuit, and none of the 46 items"),
    ([[]], {"among": [("L1.mlp", "L0.mlp")]}, "L1.mlp -> L0.mlp is no edge of this model"),
    ([["L0.mlp"]], {}, "give among="),
    ([["L1.mlp"]], {"among": ["L0.mlp"]}, "'L1.mlp' is in a circuit, and none of the 1 items"),
    ([[]], {"among": [("L0.mlp@1", "logits@2")]}, "read at the position where it is written"),
    ([[]], {"ablation": "noise"}, "no ablation 'noise'; there are resample, mean, mean by position, zero"),
    ([[]], {"among": ["L7.mlp"]}, "no layer 7"),
])
def test_what_cannot_be_run(circuits, more, message):
    with pytest.raises(ValueError, match=message):
        outcomes(prepared("gpt2"), circuits, **more)


def test_models_without_edges_of_their_own():
    with pytest.raises(ValueError, match="attention scores are made of 3 products.*take a level of nodes"):
        outcomes(prepared("deberta-v2"), [[]])
    family = MORE["t5"]
    kwargs = family.inputs()[1]
    both = {**kwargs, "decoder_input_ids": kwargs["input_ids"]}
    other = {**both, "input_ids": both["input_ids"].flip(1), "attention_mask": both["attention_mask"].flip(1)}
    two = Task("words", both, other, family.value).prepared(Subject.from_module(family.model()))
    with pytest.raises(ValueError, match="two, an encoder's and a decoder's; take a level of nodes"):
        outcomes(two, [[]])
    assert outcomes(two, [[]], among=["L0.attn.H1", "L2.cross.H0"]).shape == (1, 3)
    with pytest.raises(ValueError, match="no ablation 'zero'; there is resample"):
        Pieces(prepared("gpt2"), "zero", denoise=True)
