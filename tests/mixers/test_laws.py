"""Laws 1 to 7 over every registered mixer, variants worth a case of their own, and mixers from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from zoo import registry
from zoo.errors import ConfigError, TraitError, ZooError
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import Traits
from zoo.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from zoo.mixers.windowed_linear import _can_be_branch
from zoo.registry import list_mixers, mixer_class
from zoo.testing import LAWS, check_mixer, check_modules, check_state_size, example_configs

BRANCHES = [name for name in list_mixers() if _can_be_branch(mixer_class(name))]

VARIANTS: dict[str, dict[str, Any]] = {
    "attention with a window": {"name": "attention", "window": 6, "qk_norm": True, "rotary": {"theta": 100.0}},
    "attention with convolutions": {"name": "attention", "conv": 3, "conv_bias": True, "conv_activation": None},
    "attention with a sigmoid gate": {
        "name": "attention", "gate": True, "gate_activation": "sigmoid", "qk_norm": True, "qk_norm_zero_centered": True,
    },
    "window of one, no sinks": {"name": "sliding_window", "window": 1, "sinks": 0},
    "window longer than the text": {"name": "sliding_window", "window": 200, "sinks": 3},
    "more sinks than window": {"name": "sliding_window", "window": 2, "sinks": 7, "rotary": {"theta": 100.0}},
    "two-sided window with sinks": {"name": "sliding_window", "causal": False, "sinks": 3},
    "hedgehog": {"name": "linear_attention", "feature_map": "hedgehog", "rotary": {"theta": 100.0}},
    "two-sided hedgehog": {"name": "linear_attention", "feature_map": "hedgehog", "causal": False},
    "multi-query retention": {"name": "retention", "num_kv_heads": 1, "value_head_dim": 12, "learn_decay": True},
    "paper's retention": {"name": "retention", "head_norm_centered": True, "decay_norm": True, "num_kv_heads": 2},
    "two-sided retention": {"name": "retention", "causal": False, "decay_norm": True, "rotary": {"theta": 100.0}},
    "GLA with convolutions": {"name": "gated_linear_attention", "conv": 3, "conv_bias": True, "value_head_dim": 12},
    "Mamba-2 with groups": {"name": "mamba2", "num_groups": 2, "num_kv_heads": None, "value_head_dim": 6},
    "DeltaNet": {"name": "gated_delta_net", "use_decay": False, "allow_neg_eigval": True},
    "Gated DeltaNet with groups": {"name": "gated_delta_net", "num_groups": 2, "num_kv_heads": None, "conv": 2},
    **{
        f"window beside {name}{', older only' if older else ''}": {
            "name": "windowed_linear", "linear": {"name": name}, "older_only": older, "gate_init": 0.0, "sinks": 1,
        }
        for name in BRANCHES
        for older in (False, True)
    },
    "window beside gated_delta_net, a gate that sees the token": {
        "name": "windowed_linear", "linear": {"name": "gated_delta_net"}, "mix_gate": "token", "branch_norm": False,
        "gate_init": 0.0, "sinks": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", list_mixers())
def test_law_holds(name, law):
    check_mixer(name, laws=[law], variants=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_obeys_all_laws(variant):
    options = VARIANTS[variant]
    check_mixer(options["name"], config=options, seed=1)


# --- Mixers from outside the package -------------------------------------------------------------------------------


class OutsideConfig(LinearAttentionConfig):
    name: Literal["outside"] = "outside"


class Outside(LinearAttention):
    Config = OutsideConfig


class Forgetful(Outside):
    def mix(self, q, k, v, inputs):
        return super().mix(q, k, v, replace(inputs, state=inputs.state and self.init_state(q.shape[0])))


class SeesPadding(Outside):
    def mix(self, q, k, v, inputs):
        return super().mix(q, k, v, replace(inputs, mask_BL=None))


class IgnoresSegments(Outside):
    def mix(self, q, k, v, inputs):
        return super().mix(q, k, v, replace(inputs, segments_BL=None))


class LooksAhead(Outside):
    def mix(self, q, k, v, inputs):
        return self._all_positions(q.exp(), k.exp(), v, inputs), {}


class WrongGradient(Outside):
    def mix(self, q, k, v, inputs):
        return super().mix(q.detach() + 0 * q, k, v, inputs)


class SumsInHalfPrecision(Outside):
    def mix(self, q, k, v, inputs):
        y, state = super().mix(q, k, v, inputs)
        return y.bfloat16().to(y.dtype) if y.dtype != torch.float64 else y, state


class Grows(Attention):
    class Config(AttentionConfig):
        name: Literal["grows"] = "grows"

    traits = Traits(state="constant")


class ReadsWeights(Outside):
    def finish(self, y, x):
        return F.linear(y.transpose(1, 2).flatten(-2), self.o_proj.weight)


BROKEN = {
    "split": Forgetful,
    "mask": SeesPadding,
    "packing": IgnoresSegments,
    "causality": LooksAhead,
    "gradients": WrongGradient,
    "precision": SumsInHalfPrecision,
    "state_size": Grows,
    "modules": ReadsWeights,
}


def test_registered_from_outside(monkeypatch):
    list_mixers()  # loads all, so that the copy is complete
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))
    registry.register_mixer("outside")(type("Registered", (Outside,), {}))
    assert "outside" in list_mixers()
    check_mixer("outside", variants=1)


def test_unregistered_class_passes():
    check_mixer(Outside, variants=0)


@pytest.mark.parametrize("law", LAWS)
def test_broken_mixer_fails_its_law(law):
    with pytest.raises(AssertionError, match=f"^{law.replace('_', ' ')}: "):
        check_mixer(BROKEN[law], laws=[law], variants=0)


def test_every_law_has_a_breaker():
    assert BROKEN.keys() == LAWS.keys()


def test_weights_read_behind_a_module_are_named():
    with pytest.raises(AssertionError, match="o_proj"):
        check_modules(ReadsWeights)


def test_growing_state_is_told_with_its_sizes():
    with pytest.raises(AssertionError, match=r"bytes went \["):
        check_state_size(Grows)


def test_unknown_law_is_refused():
    with pytest.raises(ZooError, match="did you mean 'packing'"):
        check_mixer("attention", laws=["packng"])


def test_random_configs_are_seeded_and_differ():
    one, again, other = (example_configs("retention", seed=s) for s in (0, 0, 1))
    assert one == again
    assert one != other


# --- What users get wrong ------------------------------------------------------------------------------------------


def test_two_sided_mixers_have_no_state():
    mixer = mixer_class("sliding_window")(
        mixer_class("sliding_window").Config(num_heads=2, head_dim=4, causal=False), 8
    )
    with pytest.raises(TraitError, match="two-sided"):
        mixer(torch.zeros(1, 3, 8), state=mixer.init_state(1))


def test_causal_only_mixers_say_so():
    with pytest.raises(TraitError, match="bidirectional"):
        mixer_class("mamba2")(mixer_class("mamba2").Config(num_heads=2, head_dim=4, causal=False), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"linear": {"name": "linear_attention", "feature_mp": "elu"}},
            r"linear\.feature_mp: unknown key; did you mean",
        ),
        ({"linear": {"name": "linear_attention", "conv": 4}}, r"linear\.conv: belongs to the mixer itself"),
        ({"linear": {"name": "sliding_window"}}, "no recurrence to stand beside a window"),
        ({"linear": {}}, "expected a mapping with 'name'"),
        ({"linear": {"name": "linear_attention"}, "older_only": True, "causal": False}, "older_only needs a past"),
        ({"linear": {"name": "linear_attention"}, "window": 0}, "window: input should be greater than or equal to 1"),
    ],
)
def test_impossible_windowed_linear(options, message):
    with pytest.raises(ConfigError, match=message):
        mixer_class("windowed_linear").Config.parse({"num_heads": 2, "head_dim": 4, **options})


@pytest.mark.parametrize("name", ["mamba2", "gated_delta_net"])
def test_groups_must_divide(name):
    with pytest.raises(ConfigError, match="not a multiple of num_groups"):
        mixer_class(name).Config.parse({"num_heads": 4, "head_dim": 4, "num_groups": 3})
    with pytest.raises(ConfigError, match="exclude each other"):
        mixer_class(name).Config.parse({"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "num_groups": 2})


def test_mamba2_norm_groups_must_divide():
    with pytest.raises(ConfigError, match="does not divide into 5"):
        mixer_class("mamba2").Config.parse({"num_heads": 4, "head_dim": 4, "norm_groups": 5})
