"""Several mixers side by side on the same input, their outputs added (hybrid heads).

    y = sum_i s_i * m_i(x)                                     Falcon-H1 (Zuo et al. 2025, arXiv 2507.22448)
    y = sum_i s_i * m_i(x) / rms(m_i(x))                       with `branch_norm`

The branches are whole mixers with projections of their own, by a label that is also the mixer's name unless one is
given. s_i is a fixed number, or is learned, one number a branch or one a channel. Falcon-H1 is attention and Mamba-2
with s = 1; the multipliers of its muP parametrisation are constants beside weights, so that they belong into the
weights. Hymba (Dong et al. 2024, arXiv 2411.13676) normalises and scales before an output projection that its branches
share; here each branch has its own, and the norm comes after it. The state is the branches' states together.
Conversion: the first branch alone (scale 1, the others 0, learned a channel), exact where it is attention.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import MixerOptions
from zoo.errors import ConfigError, ConversionError, did_you_mean
from zoo.mixers.base import (
    AttentionStats,
    AttentionWeights,
    SequenceMixer,
    State,
    Traits,
    refuse_segments_with_state,
)
from zoo.registry import mixer_class, parse_mixer, register_mixer

_GROWTH = ("none", "constant", "window", "grows")


class ParallelConfig(MixerOptions):
    """Options of `parallel`.

    branches: by label, the options of each mixer; `name` may be left out where it is the label.
    scale: what a branch's output is multiplied with: a fixed number, one that is learned, or one a channel.
    scale_init: the fixed or initial numbers by label; 1 for those that are not named.
    branch_norm: whether the outputs of the branches are brought to a root mean square of one before.
    """

    name: Literal["parallel"] = "parallel"
    branches: dict[str, Any] = Field(min_length=2, max_length=16)
    scale: Literal["fixed", "branch", "channel"] = "fixed"
    scale_init: dict[str, float] = Field(default_factory=dict)
    branch_norm: bool = False
    branch_norm_eps: float = Field(1e-6, gt=0, le=1)
    causal: bool = True

    @model_validator(mode="after")
    def _branches_fit(self) -> Self:
        branches = {label: self._branch(label, value).plain() for label, value in self.branches.items()}
        object.__setattr__(self, "branches", branches)
        for label, number in self.scale_init.items():
            if label not in branches:
                raise ConfigError(f"scale_init.{label}: no branch has this label{did_you_mean(label, branches)}")
            if not -1e4 <= number <= 1e4:
                raise ConfigError(f"scale_init.{label}: must be between -1e4 and 1e4, got {number!r}")
        return self

    def _branch(self, label: str, value: Any) -> MixerOptions:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", label):
            raise ConfigError(f"branches: label {label!r} is not snake case")
        options = {"name": label, **value} if isinstance(value, dict) else value
        cls: Any = mixer_class(options["name"]) if isinstance(options, dict) else None
        if cls is not None and "causal" in cls.Config.model_fields:
            options.setdefault("causal", self.causal)
        parsed = parse_mixer(options, f"branches.{label}")
        if getattr(parsed, "causal", True) != self.causal:
            raise ConfigError(f"branches.{label}.causal: all branches read in the direction that causal says")
        return parsed

    def resolved(self, width: int) -> Self:
        """With the options of the branches written out."""
        branches = {label: options.resolved(width).plain() for label, options in self.branch_options().items()}
        return self.model_copy(update={"branches": branches})

    def branch_options(self) -> dict[str, MixerOptions]:
        """The options of each branch, by label."""
        return {label: parse_mixer(value, f"branches.{label}") for label, value in self.branches.items()}


@register_mixer("parallel")
class Parallel(SequenceMixer):
    """Several mixers on the same input, added; see the module docstring."""

    Config = ParallelConfig
    traits = Traits(causal=True, bidirectional=True, state="grows", exact=True)
    config: ParallelConfig

    def __init__(self, config: ParallelConfig, width: int) -> None:
        super().__init__(config, width)
        options = config.branch_options()
        made: dict[str, SequenceMixer] = {n: mixer_class(o.name)(o, width) for n, o in options.items()}
        self.branches: Any = nn.ModuleDict(made)
        # What a class says of all its instances depends on the branches here.
        grown = max((branch.traits.state for branch in made.values()), key=_GROWTH.index)
        self.traits = Traits(causal=True, bidirectional=True, state=grown)  # type: ignore[misc]
        self.keep_float32 = tuple({n for branch in made.values() for n in branch.keep_float32})  # type: ignore[misc]
        self.shares = any(branch.shares for branch in made.values())  # type: ignore[misc]
        if config.scale != "fixed":
            size = 1 if config.scale == "branch" else width
            self.scales = nn.ParameterDict({label: torch.empty(size) for label in made})
        self.reset_parameters(0.02)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        refuse_segments_with_state(segments_BL, state)
        outputs = []
        tensors: dict[str, Tensor] = {}
        for label, branch in self.branches.items():
            carried = None if state is None else state.sub(f"{label}.")
            extra = {"shared": shared} if branch.shares else {}
            y_BLD, left = branch(x_BLD, mask_BL=mask_BL, segments_BL=segments_BL, state=carried, **extra)
            outputs.append(self._scaled(label, y_BLD))
            if left is not None:
                tensors |= {f"{label}.{name}": tensor for name, tensor in left.tensors.items()}
        y_BLD = outputs[0]
        for other_BLD in outputs[1:]:
            y_BLD = y_BLD + other_BLD
        return y_BLD, None if state is None else State(tensors, state.length + x_BLD.shape[1])

    def _scaled(self, label: str, y_BLD: Tensor) -> Tensor:
        if self.config.branch_norm:
            y_BLD = F.rms_norm(y_BLD, y_BLD.shape[-1:], eps=self.config.branch_norm_eps)
        if self.config.scale != "fixed":
            return y_BLD * self.scales[label].to(y_BLD.dtype)
        number = self.config.scale_init.get(label, 1.0)
        return y_BLD if number == 1 else y_BLD * number

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        state = State()
        for label, branch in self.branches.items():
            state = state.joined(f"{label}.", branch.init_state(batch_size, device=device, dtype=dtype))
        return state

    def reset_parameters(self, std: float) -> None:
        """Scales at their initial numbers; the branches are mixers and reset themselves."""
        if self.config.scale != "fixed":
            for label, scale in self.scales.items():
                init.constant_(scale, self.config.scale_init.get(label, 1.0))

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        """Each branch as its own `config_from_attention` says, the first with scale 1 and the others with 0.

        `branches` may be a list of names, or a mapping as in the config; options of a branch that are given there win.
        By default attention and a recurrence.
        """
        branches = options.pop("branches", ["attention", "mamba2" if attention.causal else "linear_attention"])
        if isinstance(branches, list) and all(isinstance(name, str) for name in branches):
            branches = {name: {} for name in branches}
        if not isinstance(branches, dict) or not all(isinstance(value, dict) for value in branches.values()):
            raise ConfigError(f"mixer.branches: expected names or a mapping of options by label, got {branches!r}")
        made = {}
        for label, value in branches.items():
            branch: Any = mixer_class(value.get("name", label))
            own = {k: v for k, v in value.items() if k != "name"}
            made[label] = branch.config_from_attention(attention, **own).plain()
        defaults = {"scale": "channel", "scale_init": dict.fromkeys(list(made)[1:], 0.0), "causal": attention.causal}
        return cls.Config.parse({"name": cls.name, **defaults, **options, "branches": made}, "mixer")

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        """Every branch starts from the attention; the output is that of the first one alone.

        Raises ConversionError with fixed scales or a norm, under which the others could not be silent, or the first
        not be itself.
        """
        mixer = cls(config, attention.q_HKD.shape[1])  # type: ignore[arg-type]
        if mixer.config.scale == "fixed" or mixer.config.branch_norm:
            raise ConversionError(
                "mixer 'parallel' starts from attention as its first branch alone; "
                "for that it needs scale 'channel' or 'branch', and no branch_norm"
            )
        for i, (label, options) in enumerate(mixer.config.branch_options().items()):
            branch: Any = mixer_class(options.name)
            mixer.branches[label] = branch.from_attention(options, attention, stats)
            mixer.scales[label].fill_(0.0 if i else 1.0)
        return mixer

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Branches for the tests of `zoo.testing`, which cannot guess them; both have a two-sided form."""
        heads = {"num_heads": 2, "head_dim": 8}
        return {"branches": {"attention": {**heads, "rotary": {"theta": 100.0}}, "retention": heads}}
