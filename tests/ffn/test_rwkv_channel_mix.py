"""RWKV's channel mix: its formula, also padded, packed and with a carried state."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ffn.rwkv import RWKVChannelMix, RWKVChannelMixConfig

B, L, D = 2, 11, 8


def made(version):
    torch.manual_seed(version)
    ffn = RWKVChannelMix(RWKVChannelMixConfig(version=version, hidden_size=20), D).double()
    with torch.no_grad():
        for p in ffn.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return ffn.requires_grad_(False)


def formula(ffn, x_LD):
    """One sequence, as in the papers."""
    before_LD = torch.cat([torch.zeros(1, D, dtype=torch.double), x_LD[:-1]])
    now_LD, then_LD = (before_LD, x_LD) if ffn.config.version == 4 else (x_LD, before_LD)
    mix = lambda share: now_LD * (1 - share) + then_LD * share  # noqa: E731
    y_LD = (mix(ffn.shift_k) @ ffn.key.weight.T).clamp(min=0) ** 2 @ ffn.value.weight.T
    return y_LD if ffn.config.version == 7 else torch.sigmoid(mix(ffn.shift_r) @ ffn.receptance.weight.T) * y_LD


@pytest.mark.parametrize("version", [4, 6, 7])
def test_it_is_the_formula_also_padded_packed_and_in_pieces(version):
    ffn, x_BLD = made(version), torch.randn(B, L, D, dtype=torch.double)
    expected = torch.stack([formula(ffn, x) for x in x_BLD])
    torch.testing.assert_close(ffn(x_BLD)[0], expected)
    state, parts = ffn.init_state(B), []
    for x in x_BLD.split([4, 1, 1, 5], 1):
        y, state = ffn(x, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert state.length == L
    mask_BL = torch.rand(B, L) > 0.4
    y_BLD, state = ffn(x_BLD.masked_fill(~mask_BL[..., None], torch.nan), mask_BL=mask_BL, state=ffn.init_state(B))
    for b in range(B):
        torch.testing.assert_close(y_BLD[b, mask_BL[b]], formula(ffn, x_BLD[b, mask_BL[b]]))
        assert torch.equal(state["shift"][b], x_BLD[b, mask_BL[b]][-1])
    segments_BL = torch.tensor([0] * 5 + [1] * 6).expand(B, L)
    y_BLD, _ = ffn(x_BLD, segments_BL=segments_BL)
    for part in (slice(0, 5), slice(5, L)):
        torch.testing.assert_close(y_BLD[0, part], formula(ffn, x_BLD[0, part]))


def test_sizes_are_those_of_the_published_models():
    sizes = {4: 3072, 6: 2688, 7: 3072}
    for version, size in sizes.items():
        assert RWKVChannelMix(RWKVChannelMixConfig(version=version), 768).key.out_features == size


def test_a_version_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="version"):
        RWKVChannelMixConfig.parse({"name": "rwkv_channel_mix", "version": 5})
    with pytest.raises(ConfigError, match="this key is needed"):
        RWKVChannelMixConfig.parse({"name": "rwkv_channel_mix"})
    with pytest.raises(ValueError, match="segments and state"):
        made(7)(torch.zeros(B, L, D).double(), segments_BL=torch.zeros(B, L).long(), state=made(7).init_state(B))
