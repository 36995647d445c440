"""Mamba, Falcon Mamba and Mamba-2 in GGUF.

A is stored as it is used, -exp(A_log), one column of it in Mamba-2. The A_log that is read is the one whose -exp is the
file's A to the last bit, wherever float32 has one (`decay`), so that a file that comes in goes out with the same A.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import OtherKindError, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.gguf import GGUF
from zoo.convert.layouts.mamba import one_mixer
from zoo.convert.layouts.mamba2 import check_convolved, mamba2_entries, mamba2_options
from zoo.convert.layouts.mapping import Entry, mapped, same
from zoo.errors import ExportError


def decay(theirs: str, ours: str, column: bool) -> Entry:
    """-exp(A_log) there, one column of it for Mamba-2; A_log here."""
    return mapped(
        theirs,
        ours,
        lambda t: nearest_log(-(t.squeeze(1) if column else t).float()),
        lambda t: -(t.float().exp().unsqueeze(1) if column else t.float().exp()),
    )


def nearest_log(wanted: Tensor, steps: int = 4) -> Tensor:
    """The logarithm in float32 whose `exp` is `wanted` to the last bit, or comes nearest to it.

    The rounded logarithm and up to `steps` neighbours on each side are tried. float32 logarithms beyond 1 lie further
    apart than the numbers they stand for, so not every number has one; A that was made as -exp(A_log) has.
    """
    best = wanted.log()
    error = (best.exp() - wanted).abs()
    up = down = best
    for _ in range(steps):
        up, down = (torch.nextafter(t, torch.full_like(t, end)) for t, end in ((up, torch.inf), (down, -torch.inf)))
        for candidate in (up, down):
            found = (candidate.exp() - wanted).abs()
            best, error = torch.where(found < error, candidate, best), torch.minimum(found, error)
    return best


@register_family
class GGUFMamba(GGUF):
    """Mamba."""

    name = "mamba"
    architecture = about = "mamba"
    mixers = ("mamba",)
    inert = ("out_init", "dt_min", "dt_max")
    normed = False

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return super().recognises(checkpoint) and bool(checkpoint.config.get("mamba.ssm.dt_b_c_rms")) == self.normed

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        around = self.around(checkpoint)
        mixer = {
            "name": "mamba",
            "inner_dim": self.key(checkpoint, "ssm.inner_size"),
            "state_dim": self.key(checkpoint, "ssm.state_size"),
            "dt_rank": self.key(checkpoint, "ssm.time_step_rank"),
            "conv": self.key(checkpoint, "ssm.conv_kernel"),
            "bcdt_norm_eps": around["norm_eps"] if self.normed else None,
        }
        return {**around, "layers": [{"mixer": mixer}] * self.key(checkpoint, "block_count")}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer = one_mixer(config)
        if mixer.inner_dim != 2 * config.hidden_size:
            raise ExportError(f"layers.0.mixer.inner_dim is {mixer.inner_dim}; llama.cpp has twice the width only")
        return self.keys(
            config,
            feed_forward_length=0,
            attention__head_count=0,
            ssm__inner_size=mixer.inner_dim,
            ssm__state_size=mixer.state_dim,
            ssm__time_step_rank=mixer.dt_rank,
            ssm__conv_kernel=mixer.conv,
            ssm__dt_b_c_rms=self.normed,
        )

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield from self.outside(config)
        for i in range(config.num_hidden_layers):
            theirs, ours = f"blk.{i}.", f"model.layers.{i}.mixer."
            yield same(f"{theirs}attn_norm.weight", f"model.layers.{i}.mixer_norm.weight")
            names = {"in": "in_proj", "x": "x_proj", "dt": "dt_proj", "out": "out_proj", "conv1d": "conv"}
            for name, mine in names.items():
                yield same(f"{theirs}ssm_{name}.weight", f"{ours}{mine}.weight")
            yield same(f"{theirs}ssm_conv1d.bias", f"{ours}conv.bias")
            yield same(f"{theirs}ssm_dt.bias", f"{ours}dt_bias")
            yield same(f"{theirs}ssm_d", f"{ours}D")
            yield decay(f"{theirs}ssm_a", f"{ours}A_log", column=False)


@register_family
class GGUFFalconMamba(GGUFMamba):
    """Falcon Mamba: steps, B and C are divided by their root mean square, with the epsilon of all norms there."""

    name = "falcon_mamba"
    about = "mamba with ssm.dt_b_c_rms"
    normed = True

    def config(self, config: ZooConfig) -> dict[str, Any]:
        eps = one_mixer(config).bcdt_norm_eps
        if eps is None:
            raise OtherKindError("norms steps, B and C, which this model does not")
        if eps != config.spec.norm_eps:
            raise ExportError(
                f"layers.0.mixer.bcdt_norm_eps is {eps:g}, and llama.cpp has one epsilon, norm_eps, which is "
                f"{config.spec.norm_eps:g}; set it to that where the difference does not matter"
            )
        return super().config(config)


_NAMES = {
    "in_proj.weight": "ssm_in.weight", "out_proj.weight": "ssm_out.weight", "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias", "dt_bias": "ssm_dt.bias",
}  # fmt: skip


def mamba2_fields(family: GGUF, checkpoint: Checkpoint, eps: float) -> dict[str, Any]:
    """Options of `mamba2`; its norm is there where its tensors are."""
    inner, heads = family.key(checkpoint, "ssm.inner_size"), family.key(checkpoint, "ssm.time_step_rank")
    return mamba2_options(
        heads, inner // heads, family.key(checkpoint, "ssm.state_size"), family.key(checkpoint, "ssm.group_count"),
        conv=family.key(checkpoint, "ssm.conv_kernel"), conv_bias=True, bias=False, eps=eps, floor=0.0,
        norm=any(name.endswith(".ssm_norm.weight") for name in checkpoint.shapes),
    )  # fmt: skip


def mamba2_keys(mixer: Any) -> dict[str, Any]:
    """Their keys of `mamba2`, with `__` for the dots in names."""
    check_convolved(mixer)
    return {
        "ssm__inner_size": mixer.num_heads * mixer.value_dim,
        "ssm__state_size": mixer.head_dim,
        "ssm__time_step_rank": mixer.num_heads,
        "ssm__group_count": mixer.num_groups or mixer.num_heads,
        "ssm__conv_kernel": mixer.conv,
    }


def mamba2_tensors(theirs: str, ours: str, options: Any, width: int) -> Iterator[Entry]:
    """A Mamba-2 layer; vectors of heads have an axis of one there, the norm one of groups."""
    o = options.resolved(width)
    for entry in mamba2_entries("", ours, options, width):
        name = entry.theirs[0]
        if name == "conv1d.weight":  # (channels, taps) there, with an axis of one in transformers
            yield _without_axis(entry, f"{theirs}ssm_conv1d.weight")
        elif name in _NAMES:
            yield Entry((f"{theirs}{_NAMES[name]}",), entry.ours, entry.read, entry.write)
    yield decay(f"{theirs}ssm_a", f"{ours}A_log", column=True)
    yield mapped(f"{theirs}ssm_d", f"{ours}D", lambda t: t.squeeze(1), lambda t: t.unsqueeze(1))
    if o.norm:
        groups = o.num_groups or o.num_heads
        yield mapped(
            f"{theirs}ssm_norm.weight",
            f"{ours}norm.weight",
            lambda t: t.flatten(),
            lambda t: t.unflatten(0, (groups, -1)),
        )


def _without_axis(entry: Entry, theirs: str) -> Entry:
    def read(tensors: list[Tensor]) -> list[Tensor]:
        return entry.read([tensors[0].unsqueeze(1)])

    def write(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.squeeze(t, 1) for t in entry.write(tensors)]

    return Entry((theirs,), entry.ours, read, write)


@register_family
class GGUFMamba2(GGUF):
    """Mamba-2."""

    name = architecture = "mamba2"
    about = "mamba2"
    mixers = ("mamba2",)
    inert = ("dt_min", "dt_max")

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        around = self.around(checkpoint)
        mixer = mamba2_fields(self, checkpoint, around["norm_eps"])
        return {**around, "layers": [{"mixer": mixer}] * self.key(checkpoint, "block_count")}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        keys = mamba2_keys(one_mixer(config))
        return self.keys(config, feed_forward_length=0, attention__head_count=0, **keys)

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield from self.outside(config)
        for i, layer in enumerate(config.spec.layers):
            theirs, ours = f"blk.{i}.", f"model.layers.{i}."
            yield same(f"{theirs}attn_norm.weight", f"{ours}mixer_norm.weight")
            yield from mamba2_tensors(theirs, f"{ours}mixer.", layer.mixer, config.hidden_size)
