"""What a config of transformers says of pictures and sounds, whatever it calls it and in whichever part."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SEEN = ("vision_config", "vision", "vq_config", "visual_config", "encoder", "image_encoder", "backbone_config")
HEARD = ("audio_config", "speech_config", "audio_encoder_config", "encoder_config", "encoder")


class Description:
    """A config, read part by part: the part for one sense first, then the whole, then the other parts."""

    def __init__(self, whole: Any, parts: tuple[str, ...]) -> None:
        self.whole = whole
        own = [part for name in parts if hasattr(part := getattr(whole, name, None), "model_type")]
        self.parts = [*own, whole, *(part for part in _parts(whole) if all(part is not one for one in own))]

    def first(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these names that a part has, part after part."""
        for part in self.parts:
            for name in names:
                if (found := getattr(part, name, None)) is not None:
                    return found
        return default

    def number(self, *names: str, default: int) -> int:
        """The same as one number: of several sides the first, of widths by stage the first."""
        found = self.first(*names, default=default)
        while isinstance(found, (list, tuple, dict)):
            found = next(iter(found.values() if isinstance(found, dict) else found), default)
        return found if isinstance(found, int) and not isinstance(found, bool) else default

    def token(self, kind: str) -> int | None:
        """The id of the token that stands for a piece of an image, a video or a sound."""
        return self.first(f"{kind}_token_id", f"{kind}_token_index")


def seen(whole: Any) -> Description:
    """What a config says of pictures."""
    return Description(whole, SEEN)


def heard(whole: Any) -> Description:
    """What a config says of sounds."""
    return Description(whole, HEARD)




def _parts(whole: Any) -> Iterator[Any]:
    for value in vars(whole).values():
        if hasattr(value, "model_type"):
            yield value
            yield from _parts(value)
