"""Tiny images, a teacher and students for the tests of training on images."""

import torch

from zoo.config import ZooConfig
from zoo.convert.surgery import replace_mixers
from zoo.models.heads import ZooForImageClassification

SIZE = {"image_size": 8, "patch_size": 4, "channels": 1, "mean": [0.5], "std": [0.25]}


def make_images(count=96, seed=0):
    """Noise with a bright row or column in one of three places: (uint8 images, labels)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    pixels = torch.randint(120, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        pixels[i, 0, 1 + 3 * label] = 255
    return pixels, labels


def make_classifier(seed=0, layers=2, mixer=None, **fields):
    torch.manual_seed(seed)
    mixer = mixer or {"name": "attention", "num_heads": 2, "head_dim": 8, "causal": False}
    image = {**SIZE, **fields.pop("image", {})}
    fields = {"hidden_size": 16, "num_labels": 3, "pooling": "mean", "initializer_range": 0.2, **fields}
    layer = {"mixer": mixer, "ffn": {"name": "mlp", "hidden_size": 32}}
    config = ZooConfig(task="image-classification", image=image, norm="layer_norm", layers=[layer] * layers, **fields)
    return ZooForImageClassification(config).eval()


def make_scan_student(teacher):
    torch.manual_seed(1)
    return replace_mixers(teacher, {1: {"name": "scan", "inner": {"name": "mamba2"}}})


def write_idx(path, values):
    """Unsigned bytes as a file in the IDX format."""
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes())
