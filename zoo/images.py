"""Images with labels from files: read by number, split by a hash that never leaks, fitted to what a model reads.

A source is one of
    a file of images in the IDX format      such as train-images-idx3-ubyte(.gz); its labels lie beside it
    a folder with a folder for each class   class names in alphabetical order are the labels 0, 1, ...
    "hf:NAME[@CONFIG][:split[:image[:label]]]"   a name for the `datasets` package
    a pair of tensors                       uint8 images (N, channels, rows, columns) and labels (N,)

IDX is the format of MNIST (LeCun, Cortes and Burges 1998) and Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747).
Shapes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import ImageOptions
from zoo.errors import DataError, did_you_mean

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LUMA = (0.299, 0.587, 0.114)  # grey from red, green, blue (ITU-R BT.601)
IDX_BYTES = 0x08  # the type code of unsigned bytes


class Images(ABC):
    """Images and their labels (N,) int64. `name` is for messages; `classes` the names of the labels, where known."""

    name: str
    labels_N: Tensor
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} images)"

    @abstractmethod
    def read(self, number: int) -> Tensor:
        """One image, uint8 (C, H, W)."""

    @abstractmethod
    def content(self, number: int) -> bytes:
        """Bytes that are equal for equal images."""

    def fingerprint(self) -> str:
        """What tells this source from another one, where that can be had without reading it all."""
        digest = hashlib.sha256(self.labels_N.numpy().tobytes())
        for i in range(len(self)):
            digest.update(self.content(i))
        return digest.hexdigest()

    def pixels(self, numbers: Sequence[int], options: ImageOptions) -> Tensor:
        """Images as a model reads them but for `normalise`: float32 (B, channels, image_size, image_size) in 0 to 1."""
        return torch.stack([fit(self.read(i), options, self.name) for i in numbers])

    @property
    def num_labels(self) -> int:
        """How many labels there are: one more than the largest."""
        return int(self.labels_N.max()) + 1


class TensorImages(Images):
    """Images in memory."""

    def __init__(self, pixels_NCHW: Tensor, labels_N: Tensor, name: str = "images given by the caller") -> None:
        if pixels_NCHW.dim() != 4 or pixels_NCHW.dtype != torch.uint8:
            found = f"{pixels_NCHW.dtype} {tuple(pixels_NCHW.shape)}"
            raise DataError(f"{name}: images must be uint8 of shape (images, channels, rows, columns), got {found}")
        if labels_N.dim() != 1 or labels_N.is_floating_point() or len(labels_N) != len(pixels_NCHW):
            found = f"{labels_N.dtype} {tuple(labels_N.shape)}"
            raise DataError(f"{name}: {len(pixels_NCHW)} images need as many whole numbers as labels, got {found}")
        if not len(labels_N) or int(labels_N.min()) < 0:
            raise DataError(f"{name}: there is no image" if not len(labels_N) else f"{name}: a label is negative")
        self.pixels_NCHW, self.labels_N, self.name = pixels_NCHW, labels_N.long(), name

    def read(self, number: int) -> Tensor:
        return self.pixels_NCHW[number]

    def content(self, number: int) -> bytes:
        return self.pixels_NCHW[number].numpy().tobytes()

    def pixels(self, numbers: Sequence[int], options: ImageOptions) -> Tensor:
        return fit(self.pixels_NCHW[list(numbers)], options, self.name)


class FolderImages(Images):
    """A folder with a folder for each class; an image is decoded when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        found = [(p.parent.name, p) for p in sorted(folder.glob("*/*")) if p.suffix.lower() in ENDINGS]
        if not found:
            raise DataError(f"{folder}: neither images in a folder for each class, nor a file of images (*-idx3-ubyte)")
        self.classes = sorted({name for name, _ in found})
        self.files = [path for _, path in found]
        self.labels_N = torch.tensor([self.classes.index(name) for name, _ in found])

    def read(self, number: int) -> Tensor:
        return decode(self.content(number), str(self.files[number]))

    def content(self, number: int) -> bytes:
        return self.files[number].read_bytes()

    def fingerprint(self) -> str:
        found = [[path.parent.name, path.name, path.stat().st_size] for path in self.files]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()


class HubImages(Images):
    """Rows of a `datasets.Dataset` with a column of images and one of labels."""

    def __init__(self, rows: Any, image: str | None = None, label: str | None = None, name: str = "dataset") -> None:
        import datasets

        self.name, columns = name, rows.features
        for column in (image, label):
            if column is not None and column not in columns:
                raise DataError(f"{name}: no column {column!r}{did_you_mean(column, columns)}")
        image = image or next((c for c, kind in columns.items() if isinstance(kind, datasets.Image)), None)
        label = label or next((c for c, kind in columns.items() if isinstance(kind, datasets.ClassLabel)), None)
        if image is None or label is None:
            what = "images" if image is None else "labels"
            raise DataError(f"{name}: no column of {what} in {', '.join(columns)}; write NAME:split:image:label")
        self.rows, self.image = rows.cast_column(image, datasets.Image(decode=False)), image
        self.labels_N = torch.tensor(list(rows[label]), dtype=torch.long)
        self.classes = getattr(columns[label], "names", None)
        if not len(self.labels_N) or int(self.labels_N.min()) < 0:
            raise DataError(f"{name}: there is no image" if not len(self.labels_N) else f"{name}: images without label")

    def read(self, number: int) -> Tensor:
        return decode(self.content(number), f"{self.name}, row {number}")

    def fingerprint(self) -> str:
        return f"{self.name} {self.rows._fingerprint}"

    def content(self, number: int) -> bytes:
        stored = self.rows[int(number)][self.image]
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


class SomeImages(Images):
    """Those images of a source that have the given numbers."""

    def __init__(self, whole: Images, numbers_N: Tensor) -> None:
        self.whole, self.numbers_N = whole, numbers_N
        self.name, self.classes, self.labels_N = whole.name, whole.classes, whole.labels_N[numbers_N]

    def read(self, number: int) -> Tensor:
        return self.whole.read(int(self.numbers_N[number]))

    def content(self, number: int) -> bytes:
        return self.whole.content(int(self.numbers_N[number]))

    def pixels(self, numbers: Sequence[int], options: ImageOptions) -> Tensor:
        return self.whole.pixels(self.numbers_N[list(numbers)].tolist(), options)


def open_images(source: Any) -> Images:
    """The images of a source (see the module docstring). Raises DataError where there are none, or broken ones."""
    if isinstance(source, Images):
        return source
    if isinstance(source, tuple | list) and len(source) == 2 and all(isinstance(part, Tensor) for part in source):
        return TensorImages(*source)
    if isinstance(source, list | tuple) and len(source) == 1:
        return open_images(source[0])
    if not isinstance(source, str | Path):
        raise DataError(f"images come from one file, folder, hf:NAME or pair of tensors, not {type(source).__name__}")
    if str(source).startswith("hf:"):
        return _open_hub(str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if "idx3" in p.name)
        if len(files) > 1:
            raise DataError(f"{path}: holds several files of images; name one, such as {files[-1]}")
        return _open_idx(files[0]) if files else FolderImages(path)
    if path.is_file():
        return _open_idx(path)
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"{path}: no such file or folder{did_you_mean(path.name, siblings)}")


def _open_idx(path: Path) -> Images:
    if "idx3" not in path.name:
        raise DataError(f"{path}: not a file of images in the IDX format, such as train-images-idx3-ubyte.gz")
    labels = path.with_name(path.name.replace("idx3", "idx1").replace("images", "labels"))
    if not labels.is_file():
        raise DataError(f"{labels}: no such file; it should hold the labels of {path.name}")
    return TensorImages(read_idx(path, 3)[:, None], read_idx(labels, 1), str(path))


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The unsigned bytes of an IDX file, as it is or gzipped, in its shape. Raises DataError for anything else."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes([0, 0, IDX_BYTES, dimensions]):
        raise DataError(f"{path}: not an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    values = torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8) if data[start:] else torch.empty(0)
    if values.numel() != torch.Size(shape).numel():
        raise DataError(f"{path}: {values.numel()} bytes behind the header, which names {' x '.join(map(str, shape))}")
    return values.view(shape)


def _open_hub(source: str) -> Images:
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 3:
        raise DataError(f"{source!r}: write hf:NAME[@CONFIG][:split[:image[:label]]], such as hf:org/name:train")
    split, image, label = [*rest, *[""] * 3][:3]
    name, _, config = name.partition("@")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # datasets raises its own, the Hub's and the network's kinds
        raise DataError(f"{source}: cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    return HubImages(rows, image or None, label or None, source)


def decode(data: bytes, where: str) -> Tensor:
    """The bytes of a picture to uint8 (C, H, W), grey or red, green, blue. Raises DataError naming `where`."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"{where}: reading pictures needs pillow (pip install 'zoo[vision]')") from None
    import numpy as np

    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened if opened.mode in ("L", "RGB") else opened.convert("RGB")
            values = np.array(picture)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: not a picture that can be read: {error}") from None
    pixels = torch.from_numpy(values)
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def fit(pixels: Tensor, options: ImageOptions, where: str = "image") -> Tensor:
    """uint8 (..., C, H, W) to float32 (..., channels, image_size, image_size) between 0 and 1.

    Grey becomes the same in every channel, colours become grey where the model has one. Other sizes are resized on the
    shorter side (bicubic, with antialiasing) and cut to the square in the middle.
    """
    x = pixels.float() / 255
    channels, size = x.shape[-3], options.image_size
    if channels == 1:
        x = x.expand(*x.shape[:-3], options.channels, *x.shape[-2:])
    elif channels == 3 and options.channels == 1:
        x = (x * x.new_tensor(LUMA)[:, None, None]).sum(-3, keepdim=True)
    elif channels != options.channels:
        raise DataError(f"{where}: an image of {channels} channels, but the model reads {options.channels}")
    height, width = x.shape[-2:]
    if (height, width) == (size, size):
        return x
    scale = size / min(height, width)
    new = [max(size, round(height * scale)), max(size, round(width * scale))]
    flat = x.reshape(-1, *x.shape[-3:])
    flat = F.interpolate(flat, size=new, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return flat[..., top : top + size, left : left + size].reshape(*x.shape[:-2], size, size)


def sample_images(images: Images, options: ImageOptions, *, count: int = 512, seed: int = 0) -> Tensor:
    """Images drawn by `seed` as a model reads them (B, channels, image_size, image_size): `count`, or all there are."""
    numbers = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return normalise(images.pixels(numbers, options), options)


def normalise(x_BCHW: Tensor, options: ImageOptions) -> Tensor:
    """(x - mean) / std of each channel, as the model's config says; x itself where it says nothing."""
    if not options.mean:
        return x_BCHW
    mean, std = (x_BCHW.new_tensor(values)[:, None, None] for values in (options.mean, options.std))
    return (x_BCHW - mean) / std


def split_images(images: Images, held_out: float, seed: int = 0) -> tuple[Images, Images]:
    """(for training, held out): a split by a hash of the image, so that equal images fall on one side.

    An image falls on the same side for the same `seed` whatever else is in the source. Every image is read once for
    it. Raises DataError for a share outside [0, 1), or where a side would be empty.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"held_out must be a share of at least 0 and below 1, got {held_out}")
    if not held_out:
        return images, SomeImages(images, torch.empty(0, dtype=torch.long))
    key, limit = seed.to_bytes(8, "little", signed=True), int(held_out * (1 << 64))
    digests = (hashlib.blake2b(images.content(i), digest_size=8, key=key).digest() for i in range(len(images)))
    held_N = torch.tensor([int.from_bytes(digest, "little") < limit for digest in digests])
    if bool(held_N.all()):
        raise DataError(f"{images.name}: {len(images)} images are too few to hold a share of {held_out} out")
    return SomeImages(images, (~held_N).nonzero()[:, 0]), SomeImages(images, held_N.nonzero()[:, 0])
