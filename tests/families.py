"""Tiny random models of every family that relprop promises, from configs: one row a family, nothing downloaded."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

PAD = 0


@dataclass(frozen=True)
class Family:
    """How to build a model of a family, and what it reads: "text" with padding in the batch, or "image"."""

    build: Callable[[], nn.Module]
    modality: str
    size: int = 24

    def model(self, seed: int = 0) -> nn.Module:
        """A random model in float32 whose biases, positions and norms are not at the values that they start from."""
        torch.manual_seed(seed)
        model = self.build().eval()
        for name, parameter in model.named_parameters():
            # class tokens, biases, layer scales and norm weights start at constants, at which errors hide
            parameter.data.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 or "token" in name else 0.05))
        return model

    def inputs(self, dtype: torch.dtype = torch.float32, rows: int = 3) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """A batch; texts differ in length. Rows and tokens are of different number."""
        generator = torch.Generator().manual_seed(1)
        if self.modality == "image":
            return (torch.randn(rows, 3, self.size, self.size, generator=generator).to(dtype),), {}
        ids = torch.randint(3, 40, (rows, 7), generator=generator)
        mask = torch.ones_like(ids)
        for row, left_out in zip(range(rows), (0, 3, 1), strict=False):
            if left_out:
                ids[row, -left_out:], mask[row, -left_out:] = PAD, 0
        return (), {"input_ids": ids, "attention_mask": mask}

    def value(self, output: Any) -> Tensor:
        """A number a row: a logit, at the last but third position of language models, else the mean of the states."""
        if isinstance(output, Tensor):
            return output[:, 1]
        if getattr(output, "logits", None) is not None:
            return output.logits[:, 1] if output.logits.dim() == 2 else output.logits[:, 3, 5]
        return output.last_hidden_state[:, 0, 1]  # one state; their sum is constant behind a norm

    def states(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The explained tensor, pixels or word embeddings, as a leaf of plain autograd, and the output for it."""
        if args:
            leaf = args[0].clone().requires_grad_()
            return leaf, model(leaf)
        found: list[Tensor] = []

        def take(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            found.append(output.detach().requires_grad_())
            return found[0]

        table = model.get_input_embeddings().weight  # which T5 has two modules for
        handles = [module.register_forward_hook(take) for module in model.modules()
                   if getattr(module, "weight", None) is table and isinstance(module, nn.Embedding)]
        output = model(**kwargs)
        for handle in handles:
            handle.remove()
        return found[0], output

    def row(self, index: int, dtype: torch.dtype = torch.float32) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """One row of the batch alone, its padding with it."""
        args, kwargs = self.inputs(dtype)
        return tuple(a[index:index + 1] for a in args), {k: v[index:index + 1] for k, v in kwargs.items()}


_SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
              max_position_embeddings=32)
_GQA = dict(_SMALL, num_key_value_heads=1)
_OPT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, max_position_embeddings=32)
_T5 = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
_DEBERTA = dict(_SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=4)
_GPT2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32)
_IMAGE = dict(_SMALL, image_size=24, patch_size=6, num_labels=4)
_TIMM = dict(img_size=24, patch_size=6, num_classes=4, embed_dim=16, depth=2, num_heads=2)
_IDS = dict(vocab_size=40, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)


def _transformers(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        return cls(cls.config_class(**config))
    return build


def _text(name: str, **config: Any) -> Family:
    return Family(_transformers(name, **{**_IDS, **config}), "text")


def _timm(path: str, size: int = 24, **options: Any) -> Family:
    def build() -> nn.Module:
        import timm.models

        module, name = path.split(".")
        settings = {**_TIMM, **options}
        return getattr(getattr(timm.models, module), name)(**{k: v for k, v in settings.items() if v is not None})
    return Family(build, "image", size)


def _torchvision() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(image_size=24, patch_size=6, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24,
                             num_classes=4)


class Sequences(nn.Module):
    """torch's encoder over patches of the image, as someone would write it; `batch_first` as torch has it."""

    def __init__(self, *, batch_first: bool, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", batch_first=batch_first, norm_first=norm_first)
        self.patches, self.batch_first = nn.Conv2d(3, 16, 6, 6), batch_first
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patches(pixels).flatten(2).mT  # (B, T, D)
        tokens = self.encoder(tokens if self.batch_first else tokens.transpose(0, 1))
        return self.head(tokens.mean(1 if self.batch_first else 0))


FAMILIES: dict[str, Family] = {
    "bert": _text("BertForSequenceClassification", **_SMALL, num_labels=4),
    "bert-eager": _text("BertForSequenceClassification", **_SMALL, num_labels=4, attn_implementation="eager"),
    "bert-masked-lm": _text("BertForMaskedLM", **_SMALL),
    "roberta": _text("RobertaForSequenceClassification", **_SMALL, num_labels=4),
    "distilbert": _text("DistilBertForSequenceClassification", dim=16, n_layers=2, n_heads=2, hidden_dim=24,
                        max_position_embeddings=32, num_labels=4),
    "electra": _text("ElectraForSequenceClassification", **_SMALL, embedding_size=8, num_labels=4),
    "gpt2": _text("GPT2LMHeadModel", **_GPT2),
    "gpt-neox": _text("GPTNeoXForCausalLM", **_SMALL),
    "gpt-neox-sequential": _text("GPTNeoXForCausalLM", **_SMALL, use_parallel_residual=False),
    "opt": _text("OPTForCausalLM", **_OPT, word_embed_proj_dim=16),
    "opt-post-norm": _text("OPTForCausalLM", **_OPT, word_embed_proj_dim=8, do_layer_norm_before=False),
    "bloom": _text("BloomForCausalLM", hidden_size=16, n_layer=2, n_head=2),
    "llama": _text("LlamaForCausalLM", **_GQA),
    "llama-eager": _text("LlamaForCausalLM", **_GQA, attn_implementation="eager"),
    "mistral": _text("MistralForCausalLM", **_GQA, sliding_window=4),
    "qwen2": _text("Qwen2ForCausalLM", **_GQA),
    "qwen3": _text("Qwen3ForCausalLM", **_GQA, head_dim=8),
    "gemma2": _text("Gemma2ForCausalLM", **_GQA, head_dim=8, sliding_window=4),
    "gemma3": _text("Gemma3ForCausalLM", **_GQA, head_dim=8, sliding_window=4),
    "phi3": _text("Phi3ForCausalLM", **_GQA),
    "modernbert": _text("ModernBertForSequenceClassification", **_SMALL, num_labels=4),
    "deberta-v2": _text("DebertaV2ForSequenceClassification", **_DEBERTA, conv_kernel_size=3),
    "deberta-v3": _text("DebertaV2ForSequenceClassification", **_DEBERTA, position_buckets=4, share_att_key=True,
                        norm_rel_ebd="layer_norm", position_biased_input=False),
    "t5-encoder": _text("T5EncoderModel", **_T5),
    "t5-encoder-gated": _text("T5EncoderModel", **_T5, feed_forward_proj="gated-gelu"),
    "hf-vit": Family(_transformers("ViTForImageClassification", **_IMAGE), "image"),
    "hf-deit": Family(_transformers("DeiTForImageClassification", **_IMAGE), "image"),
    "hf-deit-distilled": Family(_transformers("DeiTForImageClassificationWithTeacher", **_IMAGE), "image"),
    "hf-dinov2": Family(_transformers("Dinov2ForImageClassification", **_IMAGE), "image"),
    "hf-dinov2-swiglu": Family(_transformers("Dinov2ForImageClassification", **_IMAGE, use_swiglu_ffn=True), "image"),
    "hf-dinov2-registers": Family(
        _transformers("Dinov2WithRegistersForImageClassification", **_IMAGE, num_register_tokens=2), "image"),
    "timm-vit": _timm("vision_transformer.VisionTransformer"),
    "timm-vit-registers": _timm("vision_transformer.VisionTransformer", reg_tokens=2, qk_norm=True),
    "timm-deit": _timm("vision_transformer.VisionTransformer", global_pool="avg", init_values=0.1),
    "timm-deit-distilled": _timm("deit.VisionTransformerDistilled"),
    "timm-beit": _timm("beit.Beit", use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    "timm-eva02": _timm("eva.Eva", qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
    "timm-cait": _timm("cait.Cait", init_values=0.1),
    "timm-swin": _timm("swin_transformer.SwinTransformer", size=32, img_size=32, patch_size=4, embed_dim=8, depth=None,
                       depths=(2, 2), num_heads=(2, 2), window_size=4),
    "torchvision-vit": Family(_torchvision, "image"),
    "torch-encoder": Family(lambda: Sequences(batch_first=True), "image"),
    "torch-encoder-sequence-first": Family(lambda: Sequences(batch_first=False, norm_first=True), "image")}


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a family in `dtype`, made once: for tests that give it back as it came."""
    return FAMILIES[name].model().to(dtype)
