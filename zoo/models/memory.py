"""Memory blocks: a transformer shared by several layers, whose output is added to what their own mixers read.

    m = T([x ; e], A_i),   T: h = o(attention(norm([x ; e]))),  m = down(act(gate(norm(h))) * up(norm(h)))
    x = x + mixer_i(norm(x + W_i m))                               x = x + ffn_i(norm(x)), where layer i has an ffn

x is the input of layer i, e that of the first layer (the word vectors), so the attention is twice as wide as the model.
T has no residuals of its own. Of each use i are W_i and A_i: maps of low rank added to those of the MLP, and if wanted
to those of queries, keys and values. Zamba2 (Glorioso et al. 2024, arXiv 2411.15242) reads one or two such blocks in
turn between runs of Mamba-2; Zamba (arXiv 2405.16712) is the same without A. The state is that of the layer's own mixer
and the keys and values of this use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import LayerSpec, MemoryOptions, ModelSpec
from zoo.errors import ConfigError
from zoo.linear import Linear
from zoo.mixers.attention import Attention
from zoo.mixers.base import State
from zoo.mixers.qkv import Inputs
from zoo.models.backbone import Block, make_norm
from zoo.registry import ffn_class


class LowRank(nn.Module):
    """x -> up(down(x))."""

    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.down = Linear(inputs, rank, bias=False)
        self.up = Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class MemoryAttention(Attention):
    """Attention from (B, L, 2 D) to (B, L, D), with the maps of a use added to its own."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__(config, 2 * width)
        self.o_proj = Linear(config.num_heads * config.value_dim, width, bias=config.out_bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        added, heads = inputs.shared or {}, []
        for name, size in (("q", self.config.head_dim), ("k", self.config.head_dim), ("v", self.config.value_dim)):
            y_BLE = getattr(self, f"{name}_proj")(inputs.x_BLD)
            y_BLE = y_BLE + added[name] if name in added else y_BLE
            heads.append(y_BLE.unflatten(-1, (-1, size)).transpose(1, 2))
        return *self.norm_and_rotate(heads[0], heads[1], inputs), heads[2], {}


class Memory(nn.Module):
    """The shared transformer T of the module docstring."""

    def __init__(self, spec: ModelSpec, options: MemoryOptions) -> None:
        super().__init__()
        D = spec.hidden_size
        self.norm = make_norm(spec, 2 * D)
        self.attention = MemoryAttention(options.attention, D)
        self.ffn_norm = make_norm(spec, D)
        self.ffn: Any = ffn_class("gated_mlp")(options.ffn, D)

    def forward(
        self, both_BLE: Tensor, adapters: nn.ModuleDict, context: dict[str, Any], state: State | None
    ) -> tuple[Tensor, State | None]:
        """m (B, L, D) of x and e beside each other (B, L, 2 D), and the new state."""
        both_BLE = self.norm(both_BLE)
        added = {name: adapters[name](both_BLE) for name in ("q", "k", "v") if name in adapters}
        h_BLD, state = self.attention(both_BLE, **context, state=state, shared=added)
        h_BLD = self.ffn_norm(h_BLD)
        gate_BLF, up_BLF = self.ffn.gate_proj(h_BLD), self.ffn.up_proj(h_BLD)
        if "ffn" in adapters:
            more_gate_BLF, more_up_BLF = adapters["ffn"](h_BLD).chunk(2, -1)
            gate_BLF, up_BLF = gate_BLF + more_gate_BLF, up_BLF + more_up_BLF
        return self.ffn.down_proj(self.ffn.act(gate_BLF) * up_BLF), state


class MemoryBlock(Block):
    """A block whose mixer also reads a memory block; the first layer that uses one holds it (`memory`).

    Without `shared` it behaves as the first layer does. Raises ValueError where `shared` has no "embedding".
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__(spec, layer)
        options, D = layer.memory, spec.hidden_size
        assert options is not None
        if self.order != "pre_norm" or spec.image is not None or layer.depth is not None:
            raise ConfigError("memory: belongs to block: pre_norm of a model of text, and not to layers with depth")
        self.memory = Memory(spec, options) if options.same_as is None else None
        self.held_by: tuple[Memory, ...] = ()  # in a tuple, so that it is registered in one place
        sizes: dict[str, tuple[int, int]] = {}
        if options.rank is not None:
            a = options.attention
            sizes["ffn"] = (D, 2 * options.ffn.hidden_size)
            if options.adapt_attention:
                heads = (
                    ("q", a.num_heads * a.head_dim),
                    ("k", a.kv_heads * a.head_dim),
                    ("v", a.kv_heads * a.value_dim),
                )
                sizes |= {name: (2 * D, size) for name, size in heads}
        self.adapters = nn.ModuleDict({n: LowRank(i, options.rank or 0, o) for n, (i, o) in sizes.items()})
        self.memory_out = Linear(D, D, bias=False)

    @property
    def read(self) -> Memory:
        """The memory block that this layer reads."""
        return self.memory if self.memory is not None else self.held_by[0]

    def forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None,
        segments_BL: Tensor | None,
        state: State | None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        if shared is not None and "embedding" not in shared:
            raise ValueError("a layer with memory reads the input of the first layer too: shared needs 'embedding'")
        mine, theirs = (None, None) if state is None else state.split("memory.")
        both_BLE = torch.cat([x_BLD, x_BLD if shared is None else shared["embedding"]], -1)
        if mask_BL is not None:
            both_BLE = both_BLE.masked_fill(~mask_BL[..., None], 0)
        context = {"mask_BL": mask_BL, "segments_BL": segments_BL}
        m_BLD, remembered = self.read(both_BLE, self.adapters, context, theirs)
        x_BLD, after = self.run(x_BLD, mask_BL, segments_BL, mine, shared, self.memory_out(m_BLD))
        return x_BLD, after if after is None or remembered is None else after.joined("memory.", remembered)

    def init_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The states of the layer's own mixers, and no keys and values."""
        state = super().init_state(batch_size, device=device, dtype=dtype)
        return state.joined("memory.", self.read.attention.init_state(batch_size, device=device, dtype=dtype))

    def parts(self) -> list[tuple[nn.Module, int]]:
        maps = [m for part in (self.read.ffn, self.adapters, self.memory_out) for m in part.modules()]
        linear = [(m, m.in_features) for m in maps if isinstance(m, nn.Linear)]
        return [*super().parts(), (self.read.attention, self.read.attention.width), *linear]
