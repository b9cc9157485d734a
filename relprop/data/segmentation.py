"""ImageNet-Segmentation: pictures of one thing each, with the pixels of the thing. The file does not ship.

Reference: M. Guillaumin, D. Kuettel and V. Ferrari, "ImageNet Auto-Annotation with Segmentation Propagation", IJCV 110,
2014; its 4276 pictures of 445 categories, `gtsegs_ijcv.mat`, are what H. Chefer, S. Gur and L. Wolf, "Transformer
Interpretability Beyond Attention Visualization", CVPR 2021, measure segmentation on.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .example import Data, Example, Lazy, chosen
from .picture import pictures

if TYPE_CHECKING:
    from h5py import File

FILE = "gtsegs_ijcv.mat"
FIELDS = ("img", "gt")  # of the struct `value`: a picture and the list of its masks, one cell each


def segmentation(path: str | Path, count: int | None = None, *, seed: int = 0) -> Data:
    """Pictures with the pixels of what they show; asked for is what the model says, as in Chefer et al. 2021.

    Many of the categories are none of the 1000 that classifiers of ImageNet know, so that there is no label to ask for.

    Args: path: `gtsegs_ijcv.mat` (MATLAB 7.3, that is HDF5; its pictures are read as they are needed), a folder with
        it, or a folder of pictures with masks, as of `pictures`. count: how many, drawn by the seed; None: all.
    Raises: ValueError for what is none of these; ImportError without h5py for the .mat file.
    """
    path = Path(path)
    if path.is_dir() and not (path / FILE).is_file():
        return pictures(path, count, seed=seed)
    path = path / FILE if path.is_dir() else path
    file = _opened(path)
    rows = chosen(range(len(file["value/img"])), count, seed)
    return Data(path.stem, "image", Lazy(lambda row: _example(file, row), rows), {"count": count, "seed": seed})


def _opened(path: Path) -> File:
    if not path.is_file():
        raise ValueError(f"no file or folder {path}; give {FILE}, or a folder of pictures with masks")
    try:
        import h5py
    except ImportError as cause:
        raise ImportError(f"{path.name} is a file of MATLAB 7.3, which is HDF5; pip install h5py") from cause
    try:
        file = h5py.File(path, "r")
    except OSError as cause:
        raise ValueError(f"{path.name} is no file of MATLAB 7.3 (HDF5); give {FILE} as it was published") from cause
    if missing := [name for name in FIELDS if f"value/{name}" not in file]:
        raise ValueError(f"{path.name} has no value/{' and no value/'.join(missing)}; it is not laid out as {FILE}")
    return file


def _example(file: File, row: int) -> Example:
    """MATLAB keeps the columns of an array behind each other, so that HDF5 shows its axes in reverse."""
    import numpy as np

    levels = np.array(file[file["value/img"][row, 0]]).T  # (Y, X, C), or (Y, X) for a grey picture
    mask = np.array(file[file[file["value/gt"][row, 0]][0, 0]]).T  # (Y, X), the first of the picture's masks
    levels = np.repeat(levels[..., None], 3, -1) if levels.ndim == 2 else levels
    return Example(input=np.ascontiguousarray(levels), marked=torch.from_numpy(mask != 0))
