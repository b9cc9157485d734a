"""A model with what is needed to explain it: how its inputs are prepared and what its outputs are called."""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import chat, family, fit, grid, prompt, sight
from .pictures import Pictures
from .pixels import Pixels, Reordered, from_processor
from .target import Targets, Vocabulary
from .tokens import Batch, ImageUnits, TensorUnits, TextUnits, encode, from_ids

STRETCH = "interpolate_pos_encoding"  # models take pictures of other sizes with it
LOSS = ("labels",)  # what processors add for training, which makes models compute what nobody asked for


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its processor and what is known of both. Made by `relprop.load`, or by `from_module`.

    `modality` is "text", "image", "both" or "tensors"; `processor` is the tokenizer of a text model, `pixels` prepares
    the pictures of an image model; `patch` is (Py, Px); `prefix_tokens` counts the class, distillation and register
    tokens in front of the patches; `multilabel` says that each class is decided for itself, `regression` that the
    outputs are numbers. None: not known.
    """

    model: nn.Module
    processor: object | None = None
    modality: str = "tensors"
    labels: tuple[str, ...] | None = None
    name: str = "model"
    task: str | None = None
    multilabel: bool = False
    pixels: Pixels | None = None
    patch: tuple[int, int] | None = None
    prefix_tokens: int = 0
    regression: bool = False

    @classmethod
    def from_module(cls, model: nn.Module, processor: object | None = None, *, name: str | None = None,
                    task: str | None = None, labels: Sequence[str] | None = None) -> Subject:
        """The subject of a model that is there already; the model is left as it is.

        Args: processor: tokenizer, image processor or `Pixels`. name: what reports call it. task: what it does, in
            transformers' words ("text-classification", "text-generation" ...). labels: of its classes. Each of them is
            taken from the model's own config where it is not given.
            What a wrapper such as `nn.DataParallel` runs as it is, is explained by itself.
        Raises: ValueError if there is not a label for each class, for a processor of another kind of input, and for a
            module that hides its operations.
        """
        model = fit.module(model)
        facts = family.facts(model)
        fit.processor(facts, processor)
        both = _of_both(model, processor)
        pixels = _pixels(facts, processor)
        labels = facts.labels if labels is None else tuple(map(str, labels))
        if labels is not None and facts.classes is not None and len(labels) != facts.classes:
            raise ValueError(f"{len(labels)} labels for a model of {facts.classes} classes; give one for each")
        modality = "both" if both else "image" if pixels is not None else facts.modality
        return cls(model=model, processor=processor, modality=modality, labels=labels, name=name or facts.name,
                   task=task or facts.task, multilabel=facts.multilabel, pixels=pixels, patch=facts.patch,
                   prefix_tokens=facts.prefix_tokens, regression=facts.regression)

    @property
    def tokenizer(self) -> object | None:
        """The tokenizer of a text model that came with one, or of a processor of text and pictures."""
        if hasattr(self.processor, "tokenizer"):
            return self.processor.tokenizer
        return self.processor if self.modality == "text" else None

    @property
    def mean(self) -> tuple[float, ...] | None:
        """Of each channel: what is subtracted from pictures of 0 to 1 before they are divided by `std`."""
        return self.pixels.mean if self.pixels else None

    @property
    def std(self) -> tuple[float, ...] | None:
        """Of each channel; see `mean`."""
        return self.pixels.std if self.pixels else None

    @property
    def mask_token_id(self) -> int | None:
        """Id of the tokenizer's mask token."""
        return getattr(self.tokenizer, "mask_token_id", None)

    @property
    def pad_token_id(self) -> int:
        """Id that fills short rows, which the model does not see: of the pad token, or else of the end of text, where
        the model's vocabulary has it.
        """
        config = getattr(self.model, "config", None)
        names, owners = ("pad_token_id", "eos_token_id"), (self.tokenizer, config)
        known = [getattr(owner, name, None) for name in names for owner in owners]
        size = family.vocabulary_size(self.model)  # configs name ids that a small vocabulary does not have
        return next((one for one in known if isinstance(one, int) and (size is None or one < size)), 0)

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is when it is used."""
        return family.device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's first floating parameter."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, batch: Batch) -> object:
        """The model's output; its mode (train, eval) is the caller's."""
        return self.model(*batch.args, **batch.kwargs)

    def targets(self, spec: object, rows: int) -> Targets:
        """A target for each row from what a user writes; see `Vocabulary.targets`."""
        return Vocabulary(self.labels, self.tokenizer, self.task, self.multilabel, self.regression).targets(spec, rows)

    def prepare(self, inputs: object, *, device: torch.device | str | None = None) -> Batch:
        """Inputs as the model takes them, on its device (or the one given), in its dtype.

        Args: inputs: a text model takes a text, a pair of texts as a tuple, a list of either, or token ids (B, T). An
            image model takes a path, a PIL image, a numpy array (Y, X), (Y, X, 3) or (Y, X, 4), a list of these, or a
            tensor of normalised pixels (B, C, Y, X) or (C, Y, X). A language model with a chat template also takes a
            conversation, [{"role": ..., "content": ...}, ...], or a list of them. A model of both takes {"text": ...,
            "image": ...}, a pair (picture, text), a conversation with pictures in its contents, or a list of these; of
            several pictures a list. Any model takes a mapping of tensors by the names of its arguments, as its
            processor gives it, and a batch that is prepared already.
            A text over the model's longest is cut, with a warning that says by how much.
        Raises: ValueError or TypeError for inputs the model cannot take, with what it takes.
        """
        fit.weights(self.model, self.name)
        device = torch.device(device or self.device)
        if self.dtype == torch.float16 and device.type == "cpu":
            raise ValueError(f"{self.name} is in float16, which is not precise enough on a CPU; "
                             "use model.float(), or bfloat16, or a GPU")
        if isinstance(inputs, Batch):
            return inputs.to(device)
        if isinstance(inputs, Mapping) and not (self.modality == "both" and prompt.is_prompt(inputs)):
            batch = self._named(inputs)
        else:
            batch = {"text": self._text, "image": self._image, "both": self._both,
                     "tensors": self._tensors}[self.modality](inputs)
        if not batch.rows:
            raise ValueError("the batch is empty; give at least one input")
        return self._checked(batch).to(device)

    def check_weights(self) -> None:
        """Nothing, if all parameters and buffers are finite. Cost: one pass over them.

        Raises: ValueError that names the first one with NaN or infinite values, and how many there are.
        """
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            # the sum takes a tenth of the time of each entry; on the meta device there is nothing to look at
            if value.is_meta or not value.is_floating_point() or value.detach().sum().isfinite():
                continue
            # masks are kept in buffers of -inf, so there only NaN is wrong
            wrong = ~value.isfinite() if isinstance(value, nn.Parameter) else value.isnan()
            if wrong.any():
                many = f"{int(wrong.sum())} NaN or infinite values of {value.numel()}"
                raise ValueError(f"{name} of {self.name} has {many}; load the weights anew, or train again")

    def _text(self, inputs: object) -> Batch:
        if isinstance(inputs, Tensor):
            return self._named({"input_ids": inputs[None] if inputs.dim() == 1 else inputs})
        chats = chat.read(inputs)
        texts = _texts(inputs, self.name) if chats is None else []
        if self.tokenizer is None:
            raise ValueError(f"{self.name} came without a tokenizer; give load(..., processor) one, or give token ids")
        if chats is not None:
            return self._chat(chats)
        if not texts:
            raise ValueError("the batch is empty; give at least one text")
        limit = family.longest(self.model, self.tokenizer)
        kwargs, units = encode(self.tokenizer, texts, pad_id=self.pad_token_id)
        if limit is not None and kwargs["input_ids"].shape[1] > limit:
            _warn_cut(kwargs["attention_mask"].sum(1).tolist(), limit)
            kwargs, units = encode(self.tokenizer, texts, pad_id=self.pad_token_id, limit=limit)
        fit.vocabulary(kwargs["input_ids"], family.vocabulary_size(self.model), self.tokenizer, self.name)
        accepted = family.arguments(self.model)
        return self.spoken({name: value for name, value in kwargs.items() if name in accepted or not accepted}, units)

    def _chat(self, chats: list[chat.Conversation]) -> Batch:
        """A batch of conversations, in the tokenizer's chat template."""
        kwargs, units = chat.encoded(chats, self.tokenizer, pad_id=self.pad_token_id)
        limit, accepted = family.longest(self.model, self.tokenizer), family.arguments(self.model)
        if limit is not None and kwargs["input_ids"].shape[1] > limit:
            raise ValueError(f"a conversation of {kwargs['input_ids'].shape[1]} tokens, {self.name} takes {limit}; "
                             "leave out early messages")
        return self.spoken({name: value for name, value in kwargs.items() if name in accepted or not accepted}, units)

    def _image(self, inputs: object) -> Batch:
        if isinstance(inputs, (list, tuple)) and inputs and all(isinstance(one, Tensor) for one in inputs):
            inputs = _stacked(inputs)
        if isinstance(inputs, Tensor):
            pixels = self.pixels.check(inputs)
        else:
            many = inputs if isinstance(inputs, (list, tuple)) else _pictures(inputs)
            if not len(many):
                raise ValueError("the batch is empty; give at least one picture")
            if any(isinstance(one, Tensor) for one in many):
                raise TypeError("some rows are tensors of normalised pixels and some are pictures; give one kind")
            try:
                pixels = self.pixels.read(many)
            except Reordered:
                return self._packed(many)
            if self.pixels.size is not None and pixels.shape[1:] != (self.pixels.channels, *self.pixels.size):
                takes = " x ".join(map(str, (self.pixels.channels, *self.pixels.size)))
                made = " x ".join(map(str, pixels.shape[1:]))
                raise ValueError(f"the image processor makes {made} of a picture, and {self.name} takes {takes}; "
                                 "give the one that belongs to it")
            pixels = self.pixels.check(pixels)
        name = family.pixel_argument(self.model)
        args, kwargs = ((), {name: pixels}) if name else ((pixels,), {})
        return Batch(args, kwargs, len(pixels), self._image_units(pixels, name))

    def _packed(self, many: Sequence) -> Batch:
        """A batch of pictures that the processor cuts up, or puts into another order."""
        images = [prompt.loaded(one) for one in many]
        if len({image.shape for image in images}) > 1:
            raise ValueError(f"{self.name} sees pictures cut into patches, and their maps are over the pictures as "
                             "they are: give pictures of one size, or explain them one by one")
        maker = getattr(self.processor, "image_processor", self.processor)
        tensors, pictures = sight.of_images(images, maker, family.cut(self.model))
        accepted = family.arguments(self.model)
        kwargs = {name: value for name, value in tensors.items() if name in accepted}
        units = ImageUnits(tuple(images[0].shape[:2]), None, None, torch.stack(images))
        return Batch((), kwargs, len(images), units, pictures=pictures)

    def _image_units(self, pixels: Tensor, name: str | None, given: Mapping[str, object] | None = None) -> ImageUnits:
        """What pictures are cut into: as the model does it where that can be seen, else as it says."""
        Y, X = pixels.shape[2:]
        patch, count = self.patch, (Y // self.patch[0], X // self.patch[1]) if self.patch else None
        if self.device.type != "meta":
            one = pixels[:1].to(self.device, self.dtype)
            rest = {key: value for key, value in (given or {}).items() if not isinstance(value, Tensor)}
            seen = grid.cut(self.model, () if name else (one,), {**rest, name: one} if name else {}, (Y, X))
            patch, count = seen or (patch, count)
        return ImageUnits((Y, X), patch, count, self.pixels.shown(pixels))

    def _both(self, inputs: object) -> Batch:
        """A batch of texts with pictures, by the processor of both."""
        prompts = prompt.read(inputs, self.processor, self.name)
        accepted = family.arguments(self.model)
        made = {name: value for name, value in prompt.process(prompts, self.processor).items() if name not in LOSS}
        tensors = {name: value for name, value in made.items() if name in accepted or not accepted}
        ids = tensors["input_ids"]
        mask = made.get("attention_mask", torch.ones_like(ids))
        units = prompt.units(prompts, ids, mask, self.processor)
        pictures = sight.pictures(prompts, self.processor, tensors, family.cut(self.model))
        return self.spoken(tensors, units, pictures)

    def _seen(self, tensors: Mapping[str, Tensor]) -> Pictures | None:
        """The pictures of prepared tensors, as far as they are known; None where there are none."""
        name = family.pixel_argument(self.model)
        pixels = tensors.get(name)
        if pixels is None:
            return None
        cut = family.cut(self.model)
        plain = pixels.dim() == 4 and len(pixels) == len(tensors["input_ids"])
        if plain and "image_sizes" not in tensors:
            shown = (self.pixels or Pixels(pixels.shape[1])).shown(pixels)
            return sight.seen(name, tensors, shown, self.processor, cut)
        return sight.prepared(tensors, self.processor, cut, family.signs(self.model))

    def _tensors(self, inputs: object) -> Batch:
        args = tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)
        wrong = next((type(one).__name__ for one in args if not isinstance(one, Tensor)), None)
        wrong = wrong or (None if args and args[0].dim() else "a tensor without rows" if args else "nothing")
        if wrong:
            raise TypeError(f"{self.name} is a plain module and takes a tensor (B, ...), or a tuple of its arguments, "
                            f"not {wrong}; load(model, processor) makes it take text or pictures")
        return Batch(args, {}, len(args[0]), TensorUnits(tuple(args[0].shape)))

    def _named(self, inputs: Mapping) -> Batch:
        """A batch from tensors by name, as a tokenizer or an image processor returns them."""
        accepted = family.arguments(self.model)
        extra = ("token_type_ids", "offset_mapping", "special_tokens_mask")  # tokenizers add these uncalled for
        kwargs = {name: value for name, value in inputs.items()
                  if (name in accepted or name not in extra) and name not in LOSS}
        for name, value in kwargs.items():
            if not isinstance(value, (Tensor, bool)):  # a switch, such as interpolate_pos_encoding
                kind = type(value).__name__
                raise TypeError(f"{name} is a {kind}, expected a tensor; tokenizers need return_tensors='pt'")
        if "inputs_embeds" in kwargs:
            raise ValueError("inputs_embeds make models read padding as text; give input_ids, "
                             "relevance reaches the embeddings from there")
        unknown = [name for name in kwargs if accepted and name not in accepted]
        if unknown or not kwargs:
            given = f"takes no argument {', '.join(unknown)}" if unknown else "was given an empty mapping"
            raise ValueError(f"{self.name} {given}; it takes {', '.join(accepted)}")
        if "input_ids" in kwargs:
            return self._ids(kwargs)
        first = next((value for value in kwargs.values() if isinstance(value, Tensor)), torch.empty(0))
        name = family.pixel_argument(self.model)
        still = name in kwargs and kwargs[name].dim() != 5  # a video, (B, T, C, Y, X), is no picture
        if self.modality == "image" and still and "spatial_shapes" not in kwargs:
            bound = self.pixels if not kwargs.get(STRETCH) else replace(self.pixels, size=None)
            pixels = bound.check(kwargs[name])
            return Batch((), {**kwargs, name: pixels}, len(pixels), self._image_units(pixels, name, kwargs))
        return Batch((), kwargs, len(first), TensorUnits(tuple(first.shape)))

    def _ids(self, kwargs: dict[str, Tensor]) -> Batch:
        ids = kwargs["input_ids"]
        if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2:
            hint = "; embeddings are reached from their ids, so give these" if ids.is_floating_point() else ""
            raise TypeError(f"token ids of dtype {ids.dtype} and shape {tuple(ids.shape)}, expected integers (B, T)"
                            f"{hint}")
        if not ids.numel():
            raise ValueError(f"token ids of shape {tuple(ids.shape)}: the batch is empty; give at least one token")
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        if mask.shape != ids.shape or not mask.bool().any(1).all():
            raise ValueError(f"attention_mask of shape {tuple(mask.shape)} for token ids {tuple(ids.shape)}; "
                             "expected the same shape, with a token in each row")
        size, limit = family.vocabulary_size(self.model), family.longest(self.model, self.tokenizer)
        if size is not None and not (0 <= ids.min() and ids.max() < size):
            raise ValueError(f"token ids from {ids.min()} to {ids.max()}, the model has 0 to {size - 1}; "
                             "use the tokenizer that belongs to it")
        if limit is not None and ids.shape[1] > limit:
            raise ValueError(f"{ids.shape[1]} tokens, {self.name} takes {limit}; cut them, or give text, which is cut")
        special = prompt.specials(ids, self.processor) if self.modality == "both" else None
        units = from_ids(ids, mask, self.tokenizer, special=special)
        return self.spoken({**kwargs, "attention_mask": mask}, units, self._seen(kwargs))

    def spoken(self, kwargs: dict[str, Tensor], units: TextUnits, pictures: Pictures | None = None) -> Batch:
        """The batch of a text model, with what its task needs beside the text, and where it answers."""
        accepted = family.arguments(self.model)
        mask = ~torch.tensor(units.padding)
        rows, length = mask.shape
        last = (mask * torch.arange(length)).amax(1)
        read = None
        if "attention_mask" not in accepted and accepted:
            kwargs = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        shifted = not mask[:, 0].all() and pictures is None  # models of pictures count positions by themselves
        if shifted and "position_ids" not in kwargs and family.takes_positions(self.model):
            # else padding on the left would shift the text
            kwargs = {**kwargs, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        if self.task == "text2text-generation":
            if "decoder_input_ids" not in kwargs:
                kwargs = {**kwargs, "decoder_input_ids": torch.full((rows, 1), family.decoder_start(self.model))}
                read = torch.zeros(rows, dtype=torch.long)
        elif self.task == "fill-mask" and self.mask_token_id is not None:
            masks = (kwargs["input_ids"] == self.mask_token_id).cpu()
            read = masks.int().argmax(1).masked_fill(masks.sum(1) != 1, -1)
        return Batch((), kwargs, rows, units, last, read, pictures=pictures)

    def _checked(self, batch: Batch) -> Batch:
        """The batch, floating tensors in the model's dtype. Raises: ValueError for NaN, or rows that do not agree."""
        named = [*enumerate(batch.args), *batch.kwargs.items()]
        for name, value in named:
            if not isinstance(value, Tensor):
                continue
            where = "the input" if isinstance(name, int) else name
            if value.is_meta:
                raise ValueError(f"{where} is on the meta device, where tensors have no values; give real ones")
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{where} has {int((~value.isfinite()).sum())} NaN or infinite values; replace them")
            packed = batch.pictures is not None and name in batch.pictures.packing
            if value.dim() and len(value) != batch.rows and batch.kwargs and not packed:
                raise ValueError(f"{name} has {len(value)} rows, the rest {batch.rows}; give one row for each")
        cast = {name: value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in named}
        args = tuple(cast[i] for i in range(len(batch.args)))
        return replace(batch, args=args, kwargs={name: cast[name] for name in batch.kwargs})


def _of_both(model: nn.Module, processor: object | None) -> bool:
    """Whether a model takes texts with pictures, and its processor makes both."""
    whole = hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")
    accepted = family.arguments(model)
    return whole and (not accepted or "input_ids" in accepted)


def _pixels(facts: family.Facts, processor: object | None) -> Pixels | None:
    """How the pictures of an image model are prepared, None if it takes none."""
    if isinstance(processor, Pixels):
        return processor
    if hasattr(processor, "image_processor"):  # a processor of several modalities
        processor = processor.image_processor
    if facts.modality != "image" and not hasattr(processor, "image_mean"):
        return None
    return from_processor(processor, facts.channels, facts.size) if processor is not None else facts.pixels


def _texts(inputs: object, name: str) -> list[str | tuple[str, str]]:
    """Texts or pairs of texts as a list. Raises: TypeError for other things, ValueError for one that says nothing."""
    texts = list(inputs) if isinstance(inputs, list) else [inputs]
    for row, text in enumerate(texts):
        parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
        for part in parts:
            if not isinstance(part, str):
                hint = "; it is a text model, a picture is nothing to it" if _is_picture(part) else ""
                kind = f"a tuple of {len(part)}" if isinstance(part, tuple) else type(part).__name__
                raise TypeError(f"{name} takes a text, a list of texts, or a tuple of two as a pair, not {kind}{hint}")
            if not part.strip():
                raise ValueError(f"the text of row {row} is empty ({part!r}); give at least one word")
    if len({isinstance(text, tuple) for text in texts}) > 1:
        raise TypeError("some rows are texts and some are pairs of texts; give one kind")
    return texts


def _is_picture(value: object) -> bool:
    kind = type(value).__module__.split(".")[0]
    return isinstance(value, Path) or kind in ("PIL", "torch") or kind == "numpy" and value.dtype.kind in "buif"


def _pictures(inputs: object) -> Sequence:
    """One picture as a list of one, an array (B, Y, X, C) as a list of B."""
    batched = type(inputs).__module__ == "numpy" and inputs.ndim == 4
    return list(inputs) if batched else [inputs]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"tensors of shapes {sorted(shapes)} in one batch; make them equal, or give PIL images")
    return torch.stack(list(tensors)) if tensors[0].dim() == 3 else torch.cat(list(tensors))


def _warn_cut(lengths: list[int], limit: int) -> None:
    long = {row: length for row, length in enumerate(lengths) if length > limit}
    row, length = next(iter(long.items()))
    others = f", and {len(long) - 1} more rows" if len(long) > 1 else ""
    warnings.warn(f"the text of row {row} has {length} tokens, the model takes {limit}: {length - limit} are cut off "
                  f"and not explained{others}", stacklevel=4)
