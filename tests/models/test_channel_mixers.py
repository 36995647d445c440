"""What a block hands to a channel mixer with context and to a mixer that shares within a pass."""

from __future__ import annotations

import copy
import re
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from zoo import registry
from zoo.config import FFNOptions, ZooConfig
from zoo.ffn.base import ChannelMixer
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import State
from zoo.models.create import create_model
from zoo.models.heads import ZooForCausalLM


class ShiftedConfig(FFNOptions):
    name: Literal["shifted"] = "shifted"


class Shifted(ChannelMixer):
    """y_t = W (x_t + x_{t-1}), with the mean square of the real inputs as its loss."""

    Config = ShiftedConfig

    def __init__(self, config: ShiftedConfig, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, *, mask_BL=None, segments_BL=None, state=None) -> tuple[Tensor, State | None]:
        if mask_BL is not None:
            x_BLD = x_BLD * mask_BL[..., None]
        before = torch.zeros_like(x_BLD[:, :1]) if state is None else state["x"]
        all_BLD = torch.cat([before, x_BLD], 1)
        self.auxiliary_loss = x_BLD.square().mean() if self.training else None
        after = None if state is None else State({"x": x_BLD[:, -1:]}, state.length + x_BLD.shape[1])
        return self.proj(all_BLD[:, :-1] + x_BLD), after

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        return State({"x": torch.zeros(batch_size, 1, self.proj.in_features, device=device, dtype=dtype)})

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.proj.weight, std=std)


class SharingConfig(AttentionConfig):
    name: Literal["sharing"] = "sharing"  # type: ignore[assignment]


class Sharing(Attention):
    """Attention that adds the first layer's input to its output."""

    Config = SharingConfig
    shares = True

    def forward(self, x_BLD: Tensor, *, shared=None, **context: Any) -> tuple[Tensor, State | None]:
        first_BLD = x_BLD if shared is None else shared.setdefault("first", x_BLD)
        y_BLD, state = super().forward(x_BLD, **context)
        return y_BLD + first_BLD, state


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ZooForCausalLM:
    registry.list_mixers()  # so that the tables are filled before they are added to
    monkeypatch.setattr(registry, "_FFNS", {**registry._FFNS, "shifted": Shifted})
    monkeypatch.setattr(registry, "_MIXERS", {**registry._MIXERS, "sharing": Sharing})
    monkeypatch.setattr(Shifted, "name", "shifted", raising=False)
    monkeypatch.setattr(Sharing, "name", "sharing")
    torch.manual_seed(0)
    layer = {"mixer": {"name": "sharing", "num_heads": 2, "head_dim": 8}, "ffn": {"name": "shifted"}}
    return ZooForCausalLM(ZooConfig(vocab_size=32, hidden_size=16, layers=[layer, layer, layer])).double().eval()


@torch.no_grad()
def test_a_channel_mixers_state_is_carried_and_reordered_with_the_mixers(model: ZooForCausalLM) -> None:
    ids = torch.randint(32, (2, 12))
    whole = model(ids, use_cache=False).logits
    out = model(ids[:, :5], use_cache=True)
    parts = [out.logits]
    cache = out.past_key_values
    assert "ffn.x" in cache.layers[0].state
    for i in range(5, 12):
        parts.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    cache.reorder_cache(torch.tensor([1, 0]))
    after = model(ids[:, :1].flip(0), past_key_values=cache).logits
    torch.testing.assert_close(after.flip(0), model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:])


def test_what_channel_mixers_add_to_the_loss_is_added_in_training_only(model: ZooForCausalLM) -> None:
    ids = torch.randint(32, (2, 12))
    plain = model(ids, labels=ids).loss
    assert model.model.auxiliary_loss() is None
    model.train()
    loss, added = model(ids, labels=ids).loss, model.model.auxiliary_loss()
    torch.testing.assert_close(loss, plain + added)
    assert added > 0
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@torch.no_grad()
def test_sharing_goes_through_all_layers_of_a_pass_and_no_further(model: ZooForCausalLM) -> None:
    ids = torch.randint(32, (1, 6))
    seen = []
    handles = [
        block.mixer.register_forward_pre_hook(lambda m, a, k: seen.append(k["shared"]), with_kwargs=True)
        for block in model.model.layers
    ]
    first = model(ids).logits
    torch.testing.assert_close(model(ids).logits, first)
    for handle in handles:
        handle.remove()
    assert seen[0] is seen[1] is seen[2]
    assert seen[3] is not seen[0]
    assert set(seen[0]) == {"first"}


@torch.no_grad()
def test_saved_weights_can_be_read_by_whoever_can_read_the_config(model: ZooForCausalLM, tmp_path) -> None:
    create_model("retnet-tiny").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


@pytest.mark.parametrize("name", ["mixture-of-depths-tiny", "mixtral-tiny"])
def test_a_model_can_be_copied_in_the_middle_of_training(name: str) -> None:
    trained = create_model(name).train()
    ids = torch.randint(256, (1, 12))
    loss = trained(ids, labels=ids).loss
    assert trained.model.auxiliary_loss() is not None
    other = copy.deepcopy(trained)
    assert other.model.auxiliary_loss() is None
    loss.backward()
    assert all(p.grad is None for p in other.parameters())


def test_only_whole_names_stay_in_float32(tmp_path) -> None:
    """Mamba-2 keeps `D`: a parameter with a D somewhere in its name is not meant."""
    model = create_model("mamba2-tiny")
    model.model.layers[0].mixer.register_parameter("weight_LD", nn.Parameter(torch.zeros(2, 2)))
    pattern = re.compile("|".join(model.model._keep_in_fp32_modules_strict))
    kept = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters() if pattern.search(name)}
    assert kept == {"A_log", "D", "dt_bias"}
