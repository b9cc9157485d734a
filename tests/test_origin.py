"""Where pixels come from is found for every processor, whatever it does with a picture."""
from __future__ import annotations

import numpy as np
import pictured
import pytest
import torch
from PIL import Image

from relprop import origin, prompt, sight
from relprop.pictures import Lattice, Pictures

SIZES = ((40, 60), (50, 37))


def pictures(*sizes):
    return [torch.from_numpy(np.array(pictured.picture(*size, seed))) for seed, size in enumerate(sizes)]


def turned(images, scale=1):
    """Pixels (B, C, Y, X) of pictures of one size, turned by a quarter, mirrored, and normalised."""
    x = torch.stack(list(images)).permute(0, 3, 1, 2).double() / 255
    x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return {"pixels": (x.rot90(1, (2, 3)).flip(3) - 0.3) / 0.2}


def test_every_pixel_of_a_turned_picture_is_found():
    (found,) = origin.probe(turned, pictures((12, 16), (12, 16))).values()
    y, x = torch.meshgrid(torch.arange(12), torch.arange(16), indexing="ij")
    places = lambda t: turned([t[..., None].expand(-1, -1, 3)] * 2)["pixels"] * 0.2 + 0.3
    assert torch.equal(found.picture, torch.arange(2).view(2, 1, 1, 1).expand(2, 3, 16, 12))
    torch.testing.assert_close(found.y.double(), places(y) * 255 + 0.5, atol=0.05, rtol=0)
    torch.testing.assert_close(found.x.double(), places(x) * 255 + 0.5, atol=0.05, rtol=0)
    for extent in (found.height, found.width):
        torch.testing.assert_close(extent, torch.ones_like(extent), atol=0.05, rtol=0)


def test_entries_of_a_larger_picture_share_its_pixels():
    (found,) = origin.probe(lambda images: turned(images, 3), pictures((12, 16))).values()
    values = torch.randn(found.picture.shape, dtype=torch.float64)
    assert values.shape == (1, 3, 48, 36)
    expected = values.flip(3).rot90(-1, (2, 3)).unflatten(3, (16, 3)).unflatten(2, (12, 3)).sum((0, 1, 3, 5))
    torch.testing.assert_close(found.spread(values, 0, (12, 16)), expected, atol=0.4, rtol=0)


@pytest.mark.parametrize("name", pictured.some("clip", "qwen2_vl", "llava_next", "idefics3", "siglip2"))
def test_pictures_become_what_their_places_say(name):
    _, processor, sign = pictured.made(name)
    rows = pictured.rows(sign)
    make = prompt.maker(prompt.read(rows, processor, name), processor)
    grey = [one.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64) for one in pictures(*SIZES)]
    given = [one.round().to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous() for one in grey]
    for key, found in origin.probe(make, given).items():
        seen, black, white = (make([torch.full_like(one, level) if level is not None else one for one in given])[key]
                              for level in (None, 0, 255))
        expected = origin.sampled(found, grey) / 255
        level = ((seen - black) / (white - black)).double().nan_to_num(0.0, 0.0, 0.0)
        for number, size in enumerate(SIZES):
            own = found.picture == number
            assert torch.corrcoef(torch.stack([level[own], expected[own]]))[0, 1] > 0.95, key
            assert bool((found.y[own] <= size[0]).all() and (found.x[own] <= size[1]).all())
            covered = found.spread(torch.ones(own.shape), number, size)
            assert covered.sum() == pytest.approx(int(own.sum()), rel=1e-9)
        padded = found.picture < 0
        assert torch.equal(black[padded], white[padded])
        assert bool((black != white)[~padded].all())


def test_a_value_stays_at_its_place():
    """A mark in the picture is where the relevance of what became of it is put."""
    for name in ("qwen2_vl", "llava_next", "internvl"):
        _, processor, sign = pictured.made(name)
        make = prompt.maker(prompt.read(pictured.rows(sign), processor, name), processor)
        plain = [torch.full((*size, 3), 90, dtype=torch.uint8) for size in SIZES]
        (key, found), = origin.probe(make, pictures(*SIZES)).items()
        marked = [one.clone() for one in plain]
        marked[1][20:26, 8:14] = 255
        change = (make(marked)[key] - make(plain)[key]).abs().double()
        assert float(change[found.picture != 1].sum()) == 0
        drawn = found.spread(change, 1, SIZES[1])
        # what is brightened, and what a smooth resize spreads of it over a pixel or two around
        assert float(drawn[17:29, 5:17].sum()) > 0.97 * float(drawn.sum()), name
        y, x = (torch.arange(side) + 0.5 for side in SIZES[1])
        centre = (float((drawn.sum(1) * y).sum() / drawn.sum()), float((drawn.sum(0) * x).sum() / drawn.sum()))
        assert centre == pytest.approx((23, 11), abs=0.7), name


def test_many_pictures_are_told_apart():
    (found,) = origin.probe(turned, pictures(*[(8, 8)] * 57)).values()
    assert torch.equal(found.picture[:, 0, 0, 0], torch.arange(57))


def test_a_processor_that_cuts_by_content_is_refused():
    def cropped(images):
        """What is not white."""
        made = []
        for image in images:
            dark = (image.sum(2) < 700).nonzero()
            (top, left), (bottom, right) = (dark.amin(0), dark.amax(0) + 1) if len(dark) else ((0, 0), image.shape[:2])
            part = Image.fromarray(image[top:bottom, left:right].numpy()).resize((24, 24))
            made.append(torch.from_numpy(np.array(part)).permute(2, 0, 1) / 255.0)
        return {"pixels": torch.stack(made)}

    image = torch.full((64, 64, 3), 255, dtype=torch.uint8)
    image[4:20, 40:60] = pictures((16, 20))[0] // 2
    with pytest.raises(ValueError, match="cuts or moves by what is in it|does not treat"):
        origin.probe(cropped, [image])


def test_a_processor_that_makes_nothing_of_pictures_is_refused():
    with pytest.raises(ValueError, match="black picture"):
        origin.probe(lambda images: {"pixels": torch.zeros(len(images), 3)}, pictures((8, 8)))


def test_identity():
    found = origin.identity((2, 3, 4, 5))
    values = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for row in range(2):
        torch.testing.assert_close(found.spread(values, row, (4, 5)), values[row].sum(0))


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "llava_next", "siglip2"])
def test_rows_are_taken_with_what_is_theirs(name):
    _, processor, sign = pictured.made(name)
    asked = prompt.read(pictured.rows(sign), processor, name)
    tensors = prompt.process(asked, processor)
    whole = sight.pictures(asked, processor, tensors, ((pictured.PATCH,) * 2, 3))
    taken = whole.take([1, 0, 1])
    assert taken.rows == [0, 1, 2]
    assert [tuple(image.shape) for image in taken.images] == [(50, 37, 3), (40, 60, 3), (50, 37, 3)]
    (key, found), = whole.origins.items()
    values = torch.randn(found.picture.shape, dtype=torch.float64)
    items = whole.items([1, 0, 1]).get(key, torch.tensor([1, 0, 1]))
    maps, rest = whole.maps({key: values}, 2)
    again, others = taken.maps({key: values[items]}, 3)
    for one, other in zip(again, (maps[1], maps[0], maps[1]), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(others, rest[torch.tensor([1, 0, 1])])
    assert float(sum(map(torch.sum, maps)) + rest.sum()) == pytest.approx(float(values.sum()), rel=1e-9)
    fill = taken.filled(lambda image: torch.zeros_like(image))[key]
    assert torch.equal(fill, whole.filled(lambda image: torch.zeros_like(image))[key][items])


def test_patches_need_not_be_whole_pixels():
    lattice = Lattice(top=1.0, left=0.0, height=2.5, width=2.5, rows=2, columns=2)
    cells = lattice.pixels((7, 6))
    assert cells[0].tolist() == [-1] * 6 and cells[1].tolist() == [0, 0, 1, 1, 1, -1]
    assert cells[:, 0].tolist() == [-1, 0, 0, 2, 2, 2, -1]


def test_patches_are_counted_over_all_pictures_of_a_row():
    one = Lattice(0.0, 0.0, 2.0, 2.0, 2, 3)
    images = [torch.zeros(4, 6, 3, dtype=torch.uint8)] * 3
    some = Pictures(images, [0, 0, 1], {"pixels": origin.identity((3, 3, 4, 6))}, lattices=[one] * 3)
    assert some.starts == [0, 6, 0] and some.counts == {0: 12, 1: 6}
    assert some.cells("pixels")[1, 0, 0].tolist() == [6, 6, 7, 7, 8, 8]
