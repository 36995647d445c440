"""Images from IDX files, folders, `datasets` and tensors; the split; what a model reads of them."""

from __future__ import annotations

import gzip

import pytest
import torch

from zoo.config import ImageOptions
from zoo.errors import ConfigError, DataError
from zoo.images import SomeImages, fit, normalise, open_images, read_idx, split_images

GREY = ImageOptions(image_size=4, patch_size=2, channels=1)
COLOUR = ImageOptions(image_size=4, patch_size=2, channels=3)


def idx(path, values, packed=True):
    shape = values.shape
    data = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values.numpy().tobytes()
    path.write_bytes(gzip.compress(data) if packed else data)


@pytest.fixture
def pixels():
    return torch.randint(256, (6, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.uint8)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_as_they_were_written(tmp_path, pixels, packed):
    end = ".gz" if packed else ""
    idx(tmp_path / f"train-images-idx3-ubyte{end}", pixels, packed)
    idx(tmp_path / f"train-labels-idx1-ubyte{end}", LABELS, packed)
    for source in (tmp_path / f"train-images-idx3-ubyte{end}", str(tmp_path)):
        images = open_images(source)
        assert (len(images), images.num_labels) == (6, 3)
        assert images.labels_N.tolist() == LABELS.tolist()
        assert torch.equal(images.read(4), pixels[4][None])
        assert torch.equal(images.pixels([5, 1], GREY)[:, 0], pixels[[5, 1]] / 255)
    assert open_images(source).fingerprint() == open_images((pixels[:, None], LABELS)).fingerprint()
    assert open_images(source).fingerprint() != open_images((pixels[:, None], LABELS.flip(0))).fingerprint()


def test_what_is_no_idx_file_is_refused(tmp_path, pixels):
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    idx(images, pixels, False)
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: no such file"):
        open_images(images)
    idx(labels, LABELS[:-1], False)
    with pytest.raises(DataError, match="6 images need as many"):
        open_images(images)
    idx(tmp_path / "test-images-idx3-ubyte", pixels)
    with pytest.raises(DataError, match=r"holds several files of images; name one, such as .*train-images"):
        open_images(tmp_path)
    for broken in (images.read_bytes()[:-1], images.read_bytes() + b"x", b"", gzip.compress(images.read_bytes())[:40]):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(DataError, match="broken: "):
            read_idx(tmp_path / "broken", 3)
    with pytest.raises(DataError, match="with 1 dimensions"):
        read_idx(images, 1)
    with pytest.raises(DataError, match=r"no such file or folder; did you mean 'train-images-idx3-ubyte'"):
        open_images(tmp_path / "train-images-idx3-ubite")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="not a file of images in the IDX format"):
        open_images(tmp_path / "notes.txt")


def test_a_folder_by_class_and_a_dataset_hold_the_same(tmp_path):
    image = pytest.importorskip("PIL.Image")
    datasets = pytest.importorskip("datasets")
    from zoo.images import HubImages

    colours = torch.randint(256, (4, 6, 5, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for i, name in enumerate(("shoe", "bag", "shoe", "coat")):
        (tmp_path / name).mkdir(exist_ok=True)
        image.fromarray(colours[i].numpy()).save(tmp_path / name / f"{i}.png")
    images = open_images(str(tmp_path))
    assert images.classes == ["bag", "coat", "shoe"]
    assert images.labels_N.tolist() == [0, 1, 2, 2]
    assert torch.equal(images.read(3), colours[2].permute(2, 0, 1))
    rows = datasets.Dataset.from_dict(
        {"image": [str(p) for p in images.files], "label": images.labels_N.tolist()},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=images.classes)}),
    )
    other = HubImages(rows)
    assert (other.classes, other.labels_N.tolist()) == (images.classes, images.labels_N.tolist())
    assert torch.equal(other.pixels([0, 3], COLOUR), images.pixels([0, 3], COLOUR))
    with pytest.raises(DataError, match="no column 'imag'; did you mean 'image'"):
        HubImages(rows, "imag")
    with pytest.raises(DataError, match="no column of labels in image"):
        HubImages(rows.remove_columns("label"))
    (tmp_path / "bag" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bag/1\.png: not a picture"):
        open_images(tmp_path).pixels([0], COLOUR)
    with pytest.raises(DataError, match="neither images in a folder"):
        open_images(tmp_path / "bag")


def test_images_are_fitted_to_the_model(pixels):
    grey = pixels[:1]
    assert torch.equal(fit(grey, COLOUR), (grey / 255).expand(3, 4, 4))
    colour = pixels[:3]
    expected = (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255
    torch.testing.assert_close(fit(colour, GREY)[0], expected)
    with pytest.raises(DataError, match="2 channels, but the model reads 3"):
        fit(pixels[:2], COLOUR)
    # a ramp stays a ramp, and what is cut off is the same on both sides
    ramp = torch.arange(0, 160, 10, dtype=torch.uint8).expand(1, 8, 16)
    small = fit(ramp, GREY)
    assert small.shape == (1, 4, 4)
    torch.testing.assert_close(small[0, 0] * 255, torch.tensor([45.0, 65.0, 85.0, 105.0]), atol=0.5, rtol=0)
    assert torch.equal(fit(torch.stack([ramp, ramp.flip(2)]), GREY)[0], small)


def test_normalise_and_its_options(pixels):
    options = ImageOptions(image_size=4, patch_size=2, channels=3, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 1.0])
    x = fit(pixels[:3], options)[None]
    y = normalise(x, options)
    torch.testing.assert_close(y[0, 1], (x[0, 1] - 0.2) / 0.25)
    assert normalise(x, COLOUR) is x
    with pytest.raises(ConfigError, match="std: give mean and std together, 3 numbers"):
        ImageOptions.parse({"image_size": 4, "patch_size": 2, "mean": [0.1, 0.2, 0.3]})


def test_equal_images_fall_on_one_side_of_the_split(pixels):
    many = torch.randint(256, (400, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    twice = open_images((torch.cat([many, many]), torch.arange(800) % 7))
    train, held = split_images(twice, 0.25, seed=3)
    assert sorted([*train.numbers_N.tolist(), *held.numbers_N.tolist()]) == list(range(800))
    assert {i % 400 for i in train.numbers_N.tolist()}.isdisjoint(i % 400 for i in held.numbers_N.tolist())
    assert 140 < len(held) < 260
    assert torch.equal(held.labels_N, twice.labels_N[held.numbers_N])
    assert torch.equal(held.pixels([3], GREY), twice.pixels([int(held.numbers_N[3])], GREY))
    alone, _ = split_images(SomeImages(twice, torch.arange(400)), 0.25, seed=3)  # whatever else is in the source
    assert alone.numbers_N.tolist() == [i for i in train.numbers_N.tolist() if i < 400]
    assert split_images(twice, 0.25, seed=4)[1].numbers_N.tolist() != held.numbers_N.tolist()
    assert len(split_images(twice, 0.0)[1]) == 0
    with pytest.raises(DataError, match="at least 0 and below 1, got 1"):
        split_images(twice, 1)


def test_tensors_that_are_no_images_are_refused():
    with pytest.raises(DataError, match=r"must be uint8 .* got torch\.float32 \(2, 1, 4, 4\)"):
        open_images((torch.zeros(2, 1, 4, 4), torch.zeros(2).long()))
    with pytest.raises(DataError, match="a label is negative"):
        open_images((torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, -1])))
    with pytest.raises(DataError, match="not int"):
        open_images(3)
