"""The layers that `layers.py` measures: ours by name, and those of other packages, at the same shapes.

Every maker takes the length and gives a module with a function from x (B, L, WIDTH) to an output of the same shape.
Peers in families that read both ways get what they ask for beside x (masks) made once, before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import ffn_class, mixer_class

WIDTH, HEADS = 512, 8
Layer = Callable[[Tensor], Tensor]
Made = tuple[nn.Module, Layer]


@dataclass(frozen=True)
class Case:
    """One row. Ours has the one family that it is compared within; a peer has all those it belongs to."""

    name: str
    make: Callable[[int], Made]
    families: tuple[str, ...]
    peer: bool = False
    longest: int = 1 << 20


def ours(name: str, **options) -> Callable[[int], Made]:
    """A registered mixer of this package."""

    def make(length: int) -> Made:
        cls = mixer_class(name)
        mixer = cls(cls.Config.parse({"name": name, **options}, "mixer"), WIDTH)
        return mixer, lambda x: mixer(x)[0]

    return make


class SdpaLayer(nn.Module):
    """Causal attention as anyone writes it: four projections around `F.scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


def sdpa(length: int) -> Made:
    layer = SdpaLayer()
    return layer, layer


def torchscale(value_width: int, chunk: int) -> Callable[[int], Made]:
    """The official retention layer in its chunked form. The maps that depend on the length alone are made once."""

    def make(length: int) -> Made:
        from torchscale.component.multiscale_retention import MultiScaleRetention

        layer = MultiScaleRetention(SimpleNamespace(layernorm_eps=1e-6, multiway=False), WIDTH, value_width, HEADS)
        positions = torchscale_positions(length, min(chunk, length))
        return layer, lambda x: layer(x, positions, chunkwise_recurrent=True)

    return make


def torchscale_positions(length: int, chunk: int):
    """What torchscale's RetNetRelPos gives its layers (that class itself cannot be imported without fairscale)."""
    log_decay_H11 = torch.log1p(-(2.0 ** (-5.0 - torch.arange(HEADS))))[:, None, None]
    steps = torch.arange(chunk)
    distance = steps[:, None] - steps
    map_HCC = torch.exp(distance.clamp(min=0) * log_decay_H11).tril()
    last_H1C = map_HCC[:, -1:]
    root_HC1 = map_HCC.sum(-1, keepdim=True).sqrt()
    from_start_HC1 = torch.exp(log_decay_H11 * (steps[:, None] + 1)) / (root_HC1 / last_H1C.sum(-1, keepdim=True))
    to_end_HC1 = (last_H1C / last_H1C.sum(-1, keepdim=True)).mT
    angles = torch.arange(length)[:, None] * (1e4 ** -torch.linspace(0, 1, WIDTH // HEADS // 2)).repeat_interleave(2)
    maps = (map_HCC / root_HC1, torch.exp(log_decay_H11 * chunk), from_start_HC1, to_end_HC1)
    return (angles.sin(), angles.cos()), maps


def yet_another_retnet(chunk: int) -> Callable[[int], Made]:
    """Its chunked form carries the state from call to call: the loop over chunks is the caller's."""

    def make(length: int) -> Made:
        from yet_another_retnet.retention import MultiScaleRetention

        layer = MultiScaleRetention(WIDTH, HEADS, bias=False)

        def run(x: Tensor) -> Tensor:
            parts, state = [], None
            for start in range(0, length, chunk):
                part = x[:, start : start + chunk]
                y, state = layer.forward_chunkwise(part, part, part, start, state)
                parts.append(y)
            return torch.cat(parts, 1)

        return layer, run

    return make


def mamba2(chunk: int) -> Callable[[int], Made]:
    def make(length: int) -> Made:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = Mamba2Config(
            hidden_size=WIDTH, num_heads=16, head_dim=64, state_size=128, n_groups=1, expand=2, conv_kernel=4,
            num_hidden_layers=1, chunk_size=chunk,
        )  # fmt: skip
        layer = Mamba2Mixer(config, 0)
        return layer, layer

    return make


def mamba1(length: int) -> Made:
    import mambapy  # noqa: F401 (without it transformers would fall back to a loop over time)
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    layer = MambaMixer(MambaConfig(hidden_size=WIDTH, num_hidden_layers=1, use_mambapy=True), 0)
    layer.train()  # it takes the parallel scan in training only
    return layer, layer


def qwen3_next(length: int) -> Made:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=WIDTH, linear_num_value_heads=8, linear_num_key_heads=8, linear_key_head_dim=64,
        linear_value_head_dim=64, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, 0)
    return layer, layer


def kimi(length: int) -> Made:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=WIDTH, linear_num_heads=HEADS, linear_head_dim=WIDTH // HEADS, num_hidden_layers=1,
        layer_types=["linear_attention"], mlp_layer_types=["dense"], num_attention_heads=HEADS,
    )  # fmt: skip
    layer = KimiLinearDeltaAttention(config, 0)
    return layer, layer


def deepseek(length: int) -> Made:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    config = DeepseekV3Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=length,
        **LATENT_THEIRS,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    layer = DeepseekV3Attention(config, 0)
    tables = DeepseekV3RotaryEmbedding(config)(torch.zeros(1, length, WIDTH), torch.arange(length)[None])
    return layer, lambda x: layer(x, tables, None)[0]


class WithOutput(nn.Module):
    """An encoder's self-attention and the dense layer that transformers puts into the next module."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.dense = attention, nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BLD: Tensor, *context, **options) -> Tensor:
        return self.dense(self.attention(x_BLD, *context, **options)[0])


def longformer(length: int) -> Made:
    """A window of 256 to each side in all, and one global token, as ours."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[256], num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = WithOutput(LongformerSelfAttention(config, 0))
    mask_BL = torch.zeros(1, length)
    mask_BL[:, 0] = 1.0
    context = {
        "attention_mask": mask_BL, "is_index_masked": mask_BL < 0, "is_index_global_attn": mask_BL > 0,
        "is_global_attn": True,
    }  # fmt: skip
    return layer, lambda x: layer(x, **context)


def big_bird(length: int) -> Made:
    from transformers import BigBirdConfig, BigBirdModel
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, max_position_embeddings=length, block_size=64,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = WithOutput(BigBirdBlockSparseAttention(config, seed=0))
    blocked_mask, band_mask, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, length), 64
    )
    return layer, lambda x: layer(x, band_mask, from_mask, to_mask, blocked_mask, blocked_mask)


def nystromformer(length: int) -> Made:
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_landmarks=64, segment_means_seq_len=length,
        conv_kernel_size=65,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = WithOutput(NystromformerSelfAttention(config))
    return layer, layer


def reformer(kind: str) -> Callable[[int], Made]:
    """The layers of the published Reformers; theirs ends before the output projection, which `WithOutput` adds."""

    def make(length: int) -> Made:
        from transformers import ReformerConfig
        from transformers.models.reformer import modeling_reformer as peer

        config = ReformerConfig(
            hidden_size=WIDTH, num_attention_heads=HEADS, attention_head_size=WIDTH // HEADS, is_decoder=True,
            lsh_attn_chunk_length=64, local_attn_chunk_length=64, num_hashes=2, num_buckets=length // 32, hash_seed=0,
            lsh_attention_probs_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        cls = peer.LSHSelfAttention if kind == "lsh" else peer.LocalSelfAttention
        layer = WithOutput(cls(config).train())
        return layer, layer

    return make


def fnet(length: int) -> Made:
    from transformers import FNetConfig
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

    layer = FNetBasicFourierTransform(FNetConfig(hidden_size=WIDTH))
    return layer, lambda x: layer(x)[0]


def mixtral(length: int) -> Made:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_local_experts=8, num_experts_per_tok=2, num_hidden_layers=1
    )
    config._experts_implementation = "grouped_mm"
    layer = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.02)
    return layer, layer


def our_moe(length: int) -> Made:
    cls = ffn_class("moe")
    options = {"name": "moe", "num_experts": 8, "top_k": 2, "hidden_size": WIDTH, "activation": "silu"}
    layer = cls(cls.Config.parse(options, "ffn"), WIDTH)
    layer.reset_parameters(0.02)
    return layer, lambda x: layer(x)[0]


def linformer(length: int) -> Made:
    from linformer.linformer import LinformerSelfAttention

    layer = LinformerSelfAttention(WIDTH, length, k=256, heads=HEADS, one_kv_head=False, share_kv=False)
    return layer, layer


def performer(causal: bool) -> Callable[[int], Made]:
    def make(length: int) -> Made:
        from performer_pytorch.performer_pytorch import SelfAttention

        layer = SelfAttention(WIDTH, causal=causal, heads=HEADS, dim_head=WIDTH // HEADS, nb_features=FEATURES)
        return layer, layer

    return make


def linformer_of_ours(length: int) -> Made:
    options = {"max_length": length, "projected_length": 256, "share": "heads", "out_bias": True}
    return ours("linformer", **SHAPE, **options)(length)


# The chunks of the peers are those at which each was fastest at 2048 steps, tried from 32 to 512 (by default
# torchscale takes 512, Mamba-2 256; yet-another-retnet leaves it to the caller).
FEATURES = 266  # performer-pytorch's default for heads of 64: 64 ln 64
LATENT_THEIRS = {
    "q_lora_rank": None, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip
LATENT = {"kv_rank": 128, "nope_dim": 64, "rope_dim": 32, "value_head_dim": 64, "rotary": {"theta": 10000.0}}
BIASED = {"qkv_bias": True, "out_bias": True}
SHAPE = {"num_heads": HEADS, "head_dim": WIDTH // HEADS}
CASES = [
    Case("attention", ours("attention", **SHAPE), ("attention",)),
    Case("sliding_window (256)", ours("sliding_window", **SHAPE, window=256), ("attention",)),
    Case(
        "windowed_linear (256)",
        ours("windowed_linear", **SHAPE, window=256, linear={"name": "linear_attention"}),
        ("attention",),
    ),
    Case("SDPA layer", sdpa, ("attention",), peer=True),
    Case("linear_attention", ours("linear_attention", **SHAPE), ("causal linear",)),
    Case(
        "gated_linear_attention",
        ours("gated_linear_attention", num_heads=4, head_dim=64, value_head_dim=128),
        ("causal linear",),
    ),
    Case("retention (values 1x)", ours("retention", **SHAPE), ("retention 1x",)),
    Case("torchscale retention (values 1x)", torchscale(WIDTH, 64), ("retention 1x", "causal linear"), peer=True),
    Case("yet-another-retnet (values 1x)", yet_another_retnet(256), ("retention 1x", "causal linear"), peer=True),
    Case("retention (values 2x)", ours("retention", **SHAPE, value_head_dim=128), ("retention 2x",)),
    Case("torchscale retention (values 2x)", torchscale(2 * WIDTH, 64), ("retention 2x",), peer=True),
    Case("mamba2", ours("mamba2", num_heads=16, num_groups=1, head_dim=128, value_head_dim=64), ("mamba",)),
    Case("transformers Mamba-2", mamba2(64), ("mamba", "causal linear"), peer=True),
    Case("transformers Mamba-1, mambapy", mamba1, ("mamba", "causal linear"), peer=True, longest=4096),
    Case("gated_delta_net", ours("gated_delta_net", **SHAPE), ("delta",)),
    Case("transformers Qwen3-Next delta net", qwen3_next, ("delta",), peer=True),
    Case("kimi_delta_attention", ours("kimi_delta_attention", **SHAPE), ("vector delta",)),
    Case("transformers Kimi delta attention", kimi, ("vector delta",), peer=True),
    Case("mamba", ours("mamba"), ("mamba 1",)),
    Case("transformers Mamba-1, mambapy (alone)", mamba1, ("mamba 1",), peer=True, longest=4096),
    Case("hgrn2", ours("hgrn2", num_heads=4, head_dim=128), ("causal linear",)),
    Case("mla", ours("mla", num_heads=HEADS, **LATENT), ("latent",)),
    Case("transformers DeepSeek-V3 attention", deepseek, ("latent",), peer=True),
    Case("performer, causal", ours("performer", **SHAPE, num_features=FEATURES), ("performer",)),
    Case("performer-pytorch, causal", performer(True), ("performer",), peer=True),
    Case("performer, two-sided", ours("performer", **SHAPE, num_features=FEATURES, causal=False), ("performer 2",)),
    Case("performer-pytorch, two-sided", performer(False), ("performer 2",), peer=True),
    Case("longformer (256)", ours("longformer", **SHAPE, **BIASED, window=129, causal=False), ("longformer",)),
    Case("transformers Longformer (256)", longformer, ("longformer",), peer=True),
    Case("big_bird", ours("big_bird", **SHAPE, **BIASED, max_length=8192), ("big bird",)),
    Case("transformers BigBird", big_bird, ("big bird",), peer=True),
    Case("nystromformer", ours("nystromformer", **SHAPE, **BIASED), ("nystromformer",)),
    Case("transformers Nystromformer", nystromformer, ("nystromformer",), peer=True),
    Case("linformer", linformer_of_ours, ("linformer",)),
    Case("linformer (PyPI)", linformer, ("linformer",), peer=True),
    Case("s4d", ours("s4d"), ("state space",)),
    Case("s4", ours("s4"), ("state space",)),
    Case("h3", ours("h3"), ("state space",)),
    Case("hyena", lambda length: ours("hyena", window=length)(length), ("long convolution",)),
    Case("fnet", ours("fnet"), ("fourier",)),
    Case("transformers FNet", fnet, ("fourier",), peer=True),
    Case("rwkv4", ours("rwkv4"), ("rwkv",)),
    Case("rwkv6", ours("rwkv6", **SHAPE), ("rwkv",)),
    Case("rwkv7", ours("rwkv7", **SHAPE), ("rwkv",)),
    Case(
        "lsh_attention",
        lambda length: ours("lsh_attention", **SHAPE, num_hashes=2, num_buckets=length // 32)(length),
        ("lsh",),
    ),
    Case("transformers Reformer LSH", reformer("lsh"), ("lsh",), peer=True),
    Case("local_attention", ours("local_attention", **SHAPE), ("local",)),
    Case("transformers Reformer local", reformer("local"), ("local",), peer=True),
    Case("moe (8 experts, 2 a token)", our_moe, ("experts",)),
    Case("transformers Mixtral experts", mixtral, ("experts",), peer=True),
]
