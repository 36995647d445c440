"""Scans: a causal mixer reads a sequence, or an image, in several orders, and its answers are averaged.

    y = 1/n sum_d  P_d^-1 mixer_d(P_d x)

P_d puts the tokens into the order of scan d: forwards and backwards along the sequence, as in Vision Mamba (Zhu et al.
2024, arXiv 2401.09417), and for images also along the columns, downwards and upwards: the cross-scan of VMamba (Liu et
al. 2024, arXiv 2401.10166). Every token then sees all others, and `mixer` may be any causal one. The special tokens of
an image (class tokens) stay in front of the patches, so a scan backwards ends at them: there they have seen everything.

Both papers sum, with projections around the scans and a norm or gate behind them; here each scan is a whole mixer, and
the mean keeps the scale where there were averages before, in a model that is converted. Conversion starts every scan
from the attention layer, made causal. There is no state: the last scans need the end of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from zoo.config import MixerOptions
from zoo.errors import ConfigError, TraitError
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, State, Traits
from zoo.registry import mixer_class, parse_mixer, register_mixer


class ScanOptions(MixerOptions):
    """Options of `scan`.

    inner: the causal mixer, by name with its options. directions: along the sequence only, or along both sides of an
    image (without an image the two are the same). own_weights: a mixer for each scan, or one for all of them.
    """

    name: Literal["scan"] = "scan"
    inner: dict[str, Any]
    directions: Literal["sequence", "cross"] = "cross"
    own_weights: bool = False
    causal: bool = False

    @model_validator(mode="after")
    def _inner_fits(self) -> Self:
        if not getattr(self.inner_options(), "causal", True):
            raise ValueError("inner.causal: a scan makes a causal mixer see both ways; this one does already")
        return self

    def inner_options(self) -> MixerOptions:
        """The options of the mixer that scans."""
        options = parse_mixer(self.inner, "inner")
        if not mixer_class(options.name).traits.causal:  # type: ignore[attr-defined]
            raise ConfigError(f"inner.name: {options.name!r} has no causal form, so there is nothing to scan with")
        return options

    @property
    def scans(self) -> int:
        """How many scans there are."""
        return 4 if self.directions == "cross" else 2


Order = tuple[Callable[[Any], Any], Callable[[Any], Any]]


@register_mixer("scan")
class Scan(SequenceMixer):
    """A causal mixer in several orders; see the module docstring."""

    Config = ScanOptions
    traits = Traits(causal=False, bidirectional=True, state="none")
    config: ScanOptions
    shares = True

    def __init__(self, config: ScanOptions, width: int) -> None:
        super().__init__(config, width)
        options = config.inner_options()
        cls: Any = mixer_class(options.name)
        self.inner = nn.ModuleList(cls(options, width) for _ in range(config.scans if config.own_weights else 1))

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        if state is not None:
            raise TraitError(f"mixer {self.name!r} is two-sided, so there is no state to carry")
        orders = self._orders(x_BLD.shape[1], shared, x_BLD.device)
        count, parts = len(orders), len(self.inner)
        inputs = [self._stack([to(x) for to, _ in orders], parts) for x in (x_BLD, mask_BL, segments_BL)]
        outputs: list[Tensor] = []
        for i, mixer in enumerate(self.inner):
            x, mask, segments = (None if part is None else part[i] for part in inputs)
            extra, passed = self._passed_on(mixer, i, shared)
            y = mixer(x, mask_BL=mask, segments_BL=segments, **extra)[0]
            outputs += y.unflatten(0, (count // parts, -1)).unbind(0)
            if shared is not None:
                shared.update({f"scan.{i}.{name}": tensor for name, tensor in passed.items()})
        back = [undo(y) for (_, undo), y in zip(orders, outputs, strict=True)]
        return torch.stack(back).mean(0), None

    @staticmethod
    def _stack(orders: list[Any], parts: int) -> list[Tensor] | None:
        """The input in all orders, for one mixer in one batch, or apart for a mixer each."""
        if orders[0] is None:
            return None
        return [torch.cat(orders)] if parts == 1 else orders

    @staticmethod
    def _passed_on(mixer: Any, i: int, shared: dict[str, Tensor] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What scan i of all layers share, for a mixer that asks for it."""
        if not mixer.shares:
            return {}, {}
        start = f"scan.{i}."
        passed = {n.removeprefix(start): t for n, t in (shared or {}).items() if n.startswith(start)}
        return {"shared": passed}, passed

    def _orders(self, L: int, shared: dict[str, Tensor] | None, device: torch.device) -> list[Order]:
        """For each scan a function that puts tensors (B, L, ...) into its order, None to None, and the way back."""

        def flip(x: Any) -> Any:
            return None if x is None else x.flip(1)

        def keep(x: Any) -> Any:
            return x

        along: list[Order] = [(keep, keep), (flip, flip)]
        grid_RC = (shared or {}).get("grid_RC")
        if self.config.directions == "sequence" or grid_RC is None:
            return along * max(1, len(self.inner) // 2)
        special = L - grid_RC.numel()
        down_L = torch.cat([torch.arange(special, device=device), grid_RC.mT.flatten().to(device)])
        back_L = down_L.argsort()

        def turn(x: Any) -> Any:
            return None if x is None else x.index_select(1, down_L)

        def unturn(x: Any) -> Any:
            return x.index_select(1, back_L)

        columns: list[Order] = [(turn, unturn), (lambda x: flip(turn(x)), lambda x: unturn(flip(x)))]
        return [*along, *columns]

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        return State()

    def reset_parameters(self, std: float) -> None:
        """As each of the mixers."""
        for mixer in self.inner:
            mixer.reset_parameters(std)  # type: ignore[operator]

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """A mixer that scans, for `zoo.testing`."""
        return {"inner": {"name": "retention", "num_heads": 2, "head_dim": 4}}

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        inner = options.get("inner", "linear_attention")  # of the causal ones the nearest to softmax
        inner = {"name": inner} if isinstance(inner, str) else inner
        if not isinstance(inner, dict) or "name" not in inner:
            raise ConfigError(
                f"mixer.inner: expected the name of a causal mixer or a mapping with 'name', got {inner!r}"
            )
        made: Any = mixer_class(inner["name"])
        if made.traits.causal:
            own = {key: value for key, value in inner.items() if key != "name"}
            inner = made.config_from_attention(replace(attention, causal=True), **own).plain()
        return cls.Config.parse({"name": cls.name, **options, "inner": inner}, "mixer")

    @classmethod
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        assert isinstance(config, ScanOptions)
        mixer = cls(config, attention.q_HKD.shape[1])
        options, causal = config.inner_options(), replace(attention, causal=True)
        made: Any = mixer_class(options.name)
        mixer.inner = nn.ModuleList(made.from_attention(options, causal, stats) for _ in mixer.inner)
        return mixer
