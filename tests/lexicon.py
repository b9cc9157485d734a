"""Tiny tokenizers built on the spot, for models that need texts: one of BERT's kind, one of GPT's."""
from __future__ import annotations

PIECES = ("who saw where is when alice bob the dog a cat in at paris london today was born here walks good day yes no "
          "un ##seen ##s . , ?").split()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
WRITTEN = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|model|>", "\n",
           *(f"\u0120{piece}" for piece in PIECES), *PIECES]
CHAT = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|model|>\n{% endif %}")


def reading():
    """Words and pieces of words, with [CLS] and [SEP] around a text or a pair."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, WORDS.index(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")


def writing(*, begins: bool = True, padding_side: str = "right", chat: bool = False):
    """Words with the space before them, as byte-level vocabularies have; `begins` puts <s> in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WRITTEN)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n| ?[a-z]+| ?[.,?]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    more = {"chat_template": CHAT, "additional_special_tokens": ["<|user|>", "<|model|>"]} if chat else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", padding_side=padding_side, **more)
