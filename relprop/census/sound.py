"""Sounds as models of transformers read them, by the names of their arguments."""
from __future__ import annotations

import math
from collections.abc import Iterator, Set
from itertools import product

import torch
from torch import Generator, Tensor

from .config import LENGTH
from .description import Description

Named = dict[str, Tensor]
FRAMES = 16


class Recorder:
    """Random sounds for a model: `accepted` are the names of its arguments, `about` is its config."""

    def __init__(self, accepted: Set[str], about: Description, rows: int, generator: Generator) -> None:
        self.accepted, self.about, self.rows, self.generator = accepted, about, rows, generator
        bands = about.number("num_mel_bins", "audio_embed_dim", "feature_projection_input_dim", "input_feat_size",
                             "feature_size", "n_mels", "mel_bins", "num_mel_bands", "input_dim", "input_size",
                             default=0)
        self.bands = (bands,) if bands else (80, 128)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def layouts(self) -> Iterator[Named]:
        """Sounds in each layout that the names allow, the likeliest first; none if the model reads none."""
        if "input_features" in self.accepted:
            for frames, bands in product(self.lengths(), self.bands):
                for shape in ((bands, frames), (frames, bands)):
                    yield {"input_features": self.noise(self.rows, *shape), **self.masks(frames)}
        elif "input_values" in self.accepted:
            length = self.about.number("max_length", default=0)
            if length and self.about.first("num_mel_bins"):  # a spectrogram
                yield {"input_values": self.noise(self.rows, length, self.bands[0])}
            for samples in self.samples():
                yield {"input_values": self.noise(self.rows, samples), **self.masks(samples)}
                yield {"input_values": self.noise(self.rows, 1, samples), **self.masks(samples)}

    def lengths(self) -> Iterator[int]:
        """How many frames a spectrogram may have."""
        of_word = self.about.number("audio_length_per_tok", default=0)
        if of_word:
            yield of_word * LENGTH  # heard while words are read, one by one
        known = self.about.number("max_source_positions", default=0)
        if known:
            yield 2 * known  # behind a convolution of stride 2
        yield from (8 * FRAMES, 2 * FRAMES)

    def samples(self) -> Iterator[int]:
        """How many samples make some frames behind the convolutions."""
        strides = self.about.first("conv_stride", "patch_sizes", "downsampling_ratios", "upsampling_ratios",
                                   default=(320,))
        yield math.prod(strides) * (FRAMES + 1)
        yield math.prod(strides) * 4 * FRAMES

    def masks(self, frames: int) -> Named:
        """Which frames count: all."""
        whole = torch.ones(self.rows, frames, dtype=torch.long)
        made = {"input_features_mask": whole.bool(), "feature_attention_mask": whole,
                "padding_mask": whole.bool(), "input_values_mask": whole.bool(),
                "chunk_sample_lengths": torch.full((self.rows,), frames * self.about.number("hop_length", default=1))}
        return {name: value for name, value in made.items() if name in self.accepted}
