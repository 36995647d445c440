"""What `zoo.testing` needs beside the laws: example and random configs, and one mixer put up to be compared."""

from __future__ import annotations

import random
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.config import MixerOptions
from zoo.errors import ConfigError
from zoo.mixers.base import SequenceMixer, State
from zoo.registry import mixer_class

LENGTH = 70  # more than one chunk of every op
EXACT, SINGLE = 1e-10, 1e-5  # relative to the largest output, for float64 and float32

MixerLike = str | type[SequenceMixer]
ConfigLike = MixerOptions | dict[str, Any] | None


def example_configs(mixer: MixerLike, seed: int = 0, variants: int = 3) -> list[MixerOptions]:
    """An example config, its two-sided form where `traits` have one, and `variants` random ones."""
    cls, rng = find_class(mixer), random.Random(seed)
    example = example_options(cls)
    configs = [cls.Config.parse(example)] if cls.traits.causal else []
    if cls.traits.bidirectional and "causal" in cls.Config.model_fields:
        configs.append(cls.Config.parse({**example, "causal": False}))
    return configs + [random_config(cls, rng, causal=cls.traits.causal) for _ in range(variants)]


# Small sizes for the options that mixers share by name; a class with others of its own has `example_options`.
_SIZES: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 5, "sinks": 2}
_CHOICES: dict[str, list[Any]] = {
    "num_kv_heads": [None, 1, 2, 4],
    "value_head_dim": [None, 6, 12],
    "num_groups": [None, 1, 2],
    "norm_groups": [None, 2, 4],
    "conv": [None, 2, 4],
    "window": [1, 2, 5, 16],
    "sinks": [0, 1, 3],
    "rotary": [None, {"theta": 100.0}, {"dim": 4, "interleaved": True}],
}


def example_options(mixer: MixerLike) -> dict[str, Any]:
    """The options of the example config: small sizes, then what the class' own `example_options()` says."""
    cls = find_class(mixer)
    fields = cls.Config.model_fields
    options = {name: value for name, value in _SIZES.items() if name in fields}
    options |= getattr(cls, "example_options", dict)()
    if not cls.traits.causal and "causal" in fields:
        options["causal"] = False
    return {"name": typing.get_args(fields["name"].annotation)[0], **options}


def random_config(mixer: MixerLike, rng: random.Random, *, causal: bool = True) -> MixerOptions:
    """The example config with flags, choices and shared sizes drawn at random; impossible combinations are redrawn."""
    cls = find_class(mixer)
    for _ in range(200):
        options = example_options(cls)
        for name, field in cls.Config.model_fields.items():
            choices = _CHOICES.get(name) or _choices(field.annotation)
            if choices and name not in ("name", "causal"):
                options[name] = rng.choice(choices)
        try:
            config = cls.Config.parse(
                {**options, **({"causal": causal} if "causal" in cls.Config.model_fields else {})}
            )
            cls(config, 16)
        except ConfigError:
            continue
        return config
    raise ConfigError(f"no random config of {cls.__name__} was valid; give it `example_options` or pass config=")


def _choices(annotation: Any) -> list[Any]:
    """All values of a flag or a Literal, with None where it is optional; [] for everything else."""
    if annotation is bool:
        return [False, True]
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [_choices(part) for part in typing.get_args(annotation) if part is not type(None)]
        return [None, *parts[0]] if len(parts) == 1 and parts[0] else []
    return []


def find_class(mixer: MixerLike) -> type[SequenceMixer]:
    return mixer_class(mixer) if isinstance(mixer, str) else mixer


def parse_config(cls: type[SequenceMixer], config: ConfigLike) -> MixerOptions:
    if isinstance(config, MixerOptions):
        return config
    return cls.Config.parse({**example_options(cls), **(config or {})}, "mixer")


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


class RoundEachStep(TorchFunctionMode):
    """Rounds the result of every torch function to bfloat16, but not inside `zoo.ops`, which accumulate in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._in_ops():
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if not isinstance(result, Tensor) or result.untyped_storage().data_ptr() in given:  # a view, or in place
            return result
        rounded = [self._round(a) for a in args]  # what came out of an op is rounded where it is used
        return self._round(func(*rounded, **(kwargs or {})))

    @staticmethod
    def _round(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or not x.is_floating_point():
            return x
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def _in_ops() -> bool:
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("zoo.ops"):
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


@dataclass
class Case:
    """One mixer with one config: a float64 module with random weights, an input, and ways to run and compare."""

    law: str
    mixer: MixerLike
    given: ConfigLike
    width: int
    seed: int
    length: int = LENGTH

    def __post_init__(self) -> None:
        self.cls = find_class(self.mixer)
        self.config = parse_config(self.cls, self.given)
        self.generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.module = self.cls(self.config, self.width)
            self.module.reset_parameters(0.02)
            with torch.no_grad():
                for p in self.module.parameters():  # so that nothing rests on weights of zero or one
                    p.add_(0.1 * torch.randn_like(p))
        self.module = self.module.double().eval()
        self.x_BLD = torch.randn(2, self.length, self.width, dtype=torch.double, generator=self.generator)
        self.causal = getattr(self.config, "causal", self.cls.traits.causal)
        self.has_state = self.causal and self.cls.traits.state != "none"

    def within_chunk(self) -> Case:
        """The same case, as long as splits and causality are promised for."""
        if self.cls.traits.splits == "anywhere":
            return self
        return replace(self, length=min(self.length, self.config.chunk))  # type: ignore[attr-defined]

    def demand(self, holds: bool, otherwise: str) -> None:
        """Raise AssertionError, naming the law and the config, unless `holds`."""
        if not holds:
            name = getattr(self.cls, "name", self.cls.__name__)
            raise AssertionError(f"{self.law}: {name}: {otherwise} (config {self.config.plain()}, seed {self.seed})")

    def close(
        self, got: Tensor, expected: Tensor, what: str, mask_BL: Tensor | None = None, tolerance: float = EXACT
    ) -> None:
        """Demand equality at real positions, relative to the largest expected value."""
        if mask_BL is not None:
            got, expected = got[mask_BL], expected[mask_BL]
        if not got.numel():
            return
        self.demand(bool(got.isfinite().all()), f"{what}: values that are not finite")
        error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()
        self.demand(error <= tolerance, f"{what}: relative difference {error:.3g}, allowed {tolerance:.0e}")

    @torch.no_grad()
    def run(self, x_BLD: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
        """The module without gradients. No positions give no outputs."""
        return (x_BLD, None) if not x_BLD.shape[1] else self.module(x_BLD, **arguments)

    def fresh(self) -> State:
        """A state before the first position, in the module's dtype."""
        return self.module.init_state(2)

    def run_in_pieces(self, x_BLD: Tensor, sizes: list[int], mask_BL: Tensor | None = None) -> tuple[Tensor, State]:
        """The outputs of consecutive pieces with the state carried, joined, and the last state."""
        state, outputs, start = self.fresh(), [], 0
        for n in sizes:
            mask = None if mask_BL is None else mask_BL[:, start : start + n]
            y, state = self.run(x_BLD[:, start : start + n], mask_BL=mask, state=state)
            outputs.append(y)
            start += n
        return torch.cat(outputs, 1), state

    def prompt_then_steps(self, mask_BL: Tensor, prompt: int) -> Tensor:
        """A padded prompt with its mask, then single steps with none."""
        y, state = self.run(self.x_BLD[:, :prompt], mask_BL=mask_BL[:, :prompt], state=self.fresh())
        outputs = [y]
        for t in range(prompt, self.length):
            y, state = self.run(self.x_BLD[:, t : t + 1], state=state)
            outputs.append(y)
        return torch.cat(outputs, 1)

    def pieces(self) -> list[int]:
        """Sizes of random pieces that make up the length, one of them 1."""
        sizes, rest = [1], self.length - 1
        while rest:
            n = min(int(torch.randint(1, 30, (), generator=self.generator)), rest)
            sizes.append(n)
            rest -= n
        return sizes

    def random_mask(self) -> Tensor:
        """Two rows with holes everywhere."""
        return torch.rand(2, self.length, generator=self.generator) > 0.4

    def masks(self) -> dict[str, Tensor]:
        """Padding left, right, inside, everywhere; rows of different length; a row without any token."""
        position_L = torch.arange(self.length)
        left = torch.stack([position_L >= 7, position_L >= self.length - 9])
        inside = torch.stack([(position_L < 3) | (position_L > 40), (position_L % 9) != 4])
        empty = torch.stack([position_L < 0, position_L >= 0])
        return {"left": left, "right": left.flip(1), "interior": inside, "ragged": self.random_mask(), "full": empty}

    @contextmanager
    def as_type(self, dtype: torch.dtype) -> Iterator[None]:
        """The module in another dtype, with `keep_float32` honoured under bfloat16; restored afterwards."""
        before = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        kept = {n for m in self.module.modules() if isinstance(m, SequenceMixer) for n in m.keep_float32}
        try:
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    low = dtype.itemsize < 4 and name.split(".")[-1] in kept
                    tensor.data = tensor.data.to(torch.float32 if low else dtype)
            yield
        finally:
            for name, tensor in tensors.items():
                if name in before:
                    tensor.data = before[name]
