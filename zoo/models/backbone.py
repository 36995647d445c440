"""The one backbone of all families: embedding, a stack of blocks, final norm.

pre_norm:   x = x + mixer(norm(x));  x = x + ffn(norm(x))              Llama, GPT-2, Mamba
post_norm:  x = norm(x + mixer(x));  x = norm(x + ffn(x))              BERT
output_norm: x = x + norm(mixer(x)); x = x + norm(ffn(x))              OLMo
parallel:   x = x + mixer(norm_1(x)) + ffn(norm_2(x))                  GPT-NeoX
reversible: a = a + mixer(norm(b));  b = b + ffn(norm(a))              Reformer; x is both streams beside each other
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from zoo.config import LayerSpec, ModelSpec, ZooConfig
from zoo.errors import ConfigError, TraitError
from zoo.ffn.base import ChannelMixer
from zoo.linear import Linear, NoNorm, ZeroCenteredRMSNorm
from zoo.mixers.base import SequenceMixer, State
from zoo.models.axial import axial_positions
from zoo.models.images import PatchEmbedding
from zoo.models.meta import MetaTokens, behind_meta, check_meta
from zoo.models.reversible import can_recompute, check_reversible, reversible_stack
from zoo.models.saving import Saving
from zoo.models.shared import add_earlier_runs, join_mixers, make_layers
from zoo.models.state import StateLayer, as_state_cache, state_cache
from zoo.ops.backends import autocast_dtype
from zoo.ops.neighbours import neighbours
from zoo.ops.positions import token_positions
from zoo.registry import ffn_class, mixer_class


def make_norm(spec: ModelSpec, size: int | None = None) -> nn.Module:
    """The norm a model's config names, of `hidden_size` channels unless told."""
    norms: dict[str, Any] = {"rms_norm": nn.RMSNorm, "layer_norm": nn.LayerNorm, "no_norm": NoNorm}
    cls = {**norms, "zero_centered_rms_norm": ZeroCenteredRMSNorm}[spec.norm]
    return cls(size or spec.hidden_size, eps=spec.norm_eps)


class Block(GradientCheckpointingLayer):
    """A sequence mixer and a channel mixer with their norms and residuals."""

    runs_as: str | None = None  # a name, where the block runs more than once in a pass
    auxiliary_loss: Tensor | None = None  # what the block itself added to the loss in the last forward

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "auxiliary_loss": None}  # copies and pickles: not of a graph

    def __init__(self, spec: ModelSpec, layer: LayerSpec, width: int | None = None) -> None:
        super().__init__()
        width = width or spec.hidden_size
        self.order = layer.block or spec.block
        self.mixer_norm = make_norm(spec, width)
        self.mixer: Any = mixer_class(layer.mixer.name)(layer.mixer, width)
        self.ffn_norm: nn.Module | None = None
        self.ffn: nn.Module | None = None
        if layer.ffn is not None:
            self.ffn_norm = make_norm(spec, width)
            self.ffn = ffn_class(layer.ffn.name)(layer.ffn, width)

    def forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None,
        segments_BL: Tensor | None,
        state: State | None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        """One block. The state that comes back is None where none was given; `shared` is for mixers that ask for it."""
        if shared and "meta.0" in shared and (state is None or state.length == 0):
            return behind_meta(self, self.mixer.place[0], x_BLD, mask_BL, segments_BL, state, shared)
        return self.run(x_BLD, mask_BL, segments_BL, state, shared)

    def run(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None,
        segments_BL: Tensor | None,
        state: State | None,
        shared: dict[str, Tensor] | None = None,
        added_BLD: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """As `forward`; `added_BLD` is what the mixer of a `pre_norm` block reads beside its input."""
        context = {"mask_BL": mask_BL, "segments_BL": segments_BL}
        extra = {"shared": shared} if self.mixer.shares else {}
        mine, theirs = state, None
        if state is not None and isinstance(self.ffn, ChannelMixer):
            mine, theirs = state.split("ffn.")

        def mix(u_BLD: Tensor) -> tuple[Tensor, State | None]:
            return self.mixer(u_BLD, **context, state=mine, **extra)

        def feed(u_BLD: Tensor, mixed: State | None) -> tuple[Tensor, State | None]:
            if not isinstance(self.ffn, ChannelMixer):
                return self.ffn(u_BLD), mixed  # type: ignore[misc]
            y_BLD, fed = self.ffn(u_BLD, **context, state=theirs)
            if self.runs_as is not None and shared is not None:
                add_earlier_runs(self.ffn, self.runs_as, shared)
            return y_BLD, mixed if mixed is None or fed is None else mixed.joined("ffn.", fed)

        if self.order in ("post_norm", "output_norm"):
            y_BLD, state = mix(x_BLD)
            x_BLD = self.mixer_norm(x_BLD + y_BLD) if self.order == "post_norm" else x_BLD + self.mixer_norm(y_BLD)
            if self.ffn is None or self.ffn_norm is None:
                return x_BLD, state
            y_BLD, state = feed(x_BLD, state)
            return (self.ffn_norm(x_BLD + y_BLD) if self.order == "post_norm" else x_BLD + self.ffn_norm(y_BLD)), state
        if self.order == "reversible":
            a_BLD, b_BLD = x_BLD.chunk(2, -1)
            y_BLD, state = mix(self.mixer_norm(b_BLD))
            a_BLD = a_BLD + y_BLD
            z_BLD, state = feed(self.ffn_norm(a_BLD), state)  # type: ignore[misc]
            return torch.cat([a_BLD, b_BLD + z_BLD], -1), state
        y_BLD, state = mix(self.mixer_norm(x_BLD if added_BLD is None else x_BLD + added_BLD))
        if self.ffn is None or self.ffn_norm is None:
            return x_BLD + y_BLD, state
        mixed_BLD = x_BLD + y_BLD
        z_BLD, state = feed(self.ffn_norm(mixed_BLD if self.order == "pre_norm" else x_BLD), state)
        return mixed_BLD + z_BLD, state

    def parts(self) -> list[tuple[Any, int]]:
        """What computes products, each with the width of its input."""
        return [(part, self.mixer.width) for part in (self.mixer, self.ffn) if part is not None]

    def sees(self, shared: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """What of `shared` a mixer in this block gets, when it is called by itself."""
        return dict(shared or {})

    def init_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state of the sequence mixer, and of the channel mixer where it has one, before the first position."""
        state = self.mixer.init_state(batch_size, device=device, dtype=dtype)
        if not isinstance(self.ffn, ChannelMixer):
            return state
        return state.joined("ffn.", self.ffn.init_state(batch_size, device=device, dtype=dtype))


def make_block(spec: ModelSpec, layer: LayerSpec) -> Block:
    """The block of a layer."""
    if layer.memory is not None:
        from zoo.models.memory import MemoryBlock

        return MemoryBlock(spec, layer)
    if layer.depth is None:
        return Block(spec, layer)
    from zoo.models.depth import RoutedBlock

    return RoutedBlock(spec, layer)


class ZooPreTrainedModel(Saving, PreTrainedModel):  # type: ignore[misc]
    """Base of the backbone and of every head."""

    config_class = ZooConfig
    config: ZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers adds to it)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    if TYPE_CHECKING:
        generate: Callable[..., Any]  # of the heads that have it

    _supports_sdpa = True
    _supports_flash_attn = True
    _can_compile_fullgraph = True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # A module whose tensors all sit in modules below counts as loaded there, and would never be asked.
        owns = any(True for m in (module.parameters(recurse=False), module.buffers(recurse=False)) for _ in m)
        super()._initialize_weights(module, is_custom_code and owns)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.RMSNorm | nn.LayerNorm) and not isinstance(module, ZeroCenteredRMSNorm):
            if module.weight is not None:
                init.ones_(module.weight)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                init.zeros_(bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SequenceMixer | ChannelMixer) or (
            hasattr(module, "reset_parameters") and _is_ours(module)
        ):
            module.reset_parameters(std)  # type: ignore[operator]
        elif isinstance(module, nn.Embedding):
            small = self.config.embedding_initializer_range
            init.normal_(module.weight, std=std if small is None else small)

    def with_auxiliary(self, loss: Tensor) -> Tensor:
        """`loss` of a head plus what channel mixers add in training."""
        extra = self.base_model.auxiliary_loss() if self.training else None  # type: ignore[operator]
        return loss if extra is None else loss + extra


def _layers(spec: ModelSpec) -> nn.ModuleList:
    if spec.image is None or spec.image.stages is None:
        return make_layers(spec, make_block)
    if spec.block == "reversible" or any(x.same_as is not None or x.depth is not None for x in spec.layers):
        raise ConfigError("image.stages: a hierarchical model has no reversible blocks, no same_as and no depth")
    from zoo.models.stages import StageBlock

    return nn.ModuleList(StageBlock(spec, layer, i) for i, layer in enumerate(spec.layers))


def float32_patterns(model: nn.Module) -> set[str]:
    """What transformers shall keep in float32 under any dtype: patterns of the whole last name of a parameter."""
    mixers = [m for m in model.modules() if isinstance(m, SequenceMixer | ChannelMixer)]
    return {rf"\.{name}$" for m in mixers for name in m.keep_float32}


def _is_ours(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.")


class ZooModel(ZooPreTrainedModel):
    """Token ids or images to hidden states, for every architecture in the registry."""

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        spec = config.spec
        check_reversible(spec)
        check_meta(spec)
        self.meta_tokens = MetaTokens(spec.meta_tokens, spec.hidden_size) if spec.meta_tokens else None
        self.patches = None if spec.image is None else PatchEmbedding(spec.image, spec.hidden_size)
        self.embed_tokens: Any = None if spec.image else nn.Embedding(spec.vocab_size, spec.word_size)
        if spec.axial_shape or spec.axial_dims:
            self.embed_positions: nn.Module = axial_positions(spec)
        elif spec.positions == "learned":
            self.embed_positions = nn.Embedding(spec.max_position_embeddings + spec.position_offset, spec.sum_size)
        if spec.token_types:
            self.embed_token_types = nn.Embedding(spec.token_types, spec.sum_size)
        self.embed_norm = make_norm(spec, spec.sum_size) if spec.embedding_norm else None
        self.project_in: nn.Module | None = None
        if spec.embedding_size is not None:
            read = spec.embedding_context * spec.embedding_size
            self.project_in = Linear(read, spec.hidden_size, bias=spec.embedding_projection_bias)
        self.dropout = nn.Dropout(spec.embedding_dropout)
        self.layers: Any = _layers(spec)  # whose type forgets the Blocks
        for i in reversed(range(len(self.layers))):  # a block that comes more than once has its first place
            for part in self.layers[i].modules():
                if isinstance(part, SequenceMixer | ChannelMixer):
                    part.place = (i, len(self.layers))
        join_mixers(self.layers)
        self.reads_embedding = any(layer.memory is not None for layer in spec.layers)
        self.norm = make_norm(spec, spec.stack_size) if spec.final_norm else None
        narrows = spec.embedding_output == "project"
        self.project_out = Linear(spec.hidden_size, spec.word_size, bias=False) if narrows else None
        if spec.embedding_context > 1 and self.is_causal:
            raise TraitError("embedding_context: a token's neighbours are partly later ones; causal layers need 1")
        self.gradient_checkpointing = False
        self._keep_in_fp32_modules_strict = float32_patterns(self)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        run_block: Callable[..., tuple[Tensor, State | None]] | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D), (B, L, 2 D) with reversible blocks, after the final norm.

        Args:
            input_ids: (B, L) token ids; or `inputs_embeds` (B, L, D).
            pixel_values: (B, channels, rows, columns), in place of token ids where the model is one of images.
            attention_mask: (B, L) or, with a cache, (B, past + L); 0 marks padding, anywhere in a row.
            token_type_ids: (B, L), for models with token types.
            segment_ids: (B, L) ids of packed sequences, which do not see each other. Not with a cache.
            past_key_values: a cache of earlier calls, or an empty one to fill.
            use_cache: whether to return one; the default is the config's, and False in training.
            output_hidden_states: whether to return the input of every block and the final state.
            run_block: called as ``run_block(i, block, *arguments of the block)`` in place of each block.

        Raises ValueError for a mask that is not two-dimensional, and for positions beyond the learned ones.
        """
        inputs = input_ids if pixel_values is None else pixel_values
        if (inputs is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds (of pixel_values, for images)")
        shared: dict[str, Tensor] = {}
        x_BLD: Any = inputs_embeds
        if inputs is not None:
            x_BLD, shared = self.embed(inputs)
        cache = self._cache(past_key_values, use_cache, segment_ids)
        mask_BL = self._mask(attention_mask, x_BLD.shape[1])
        x_BLD = self._embed(x_BLD, mask_BL, token_type_ids, segment_ids, cache)
        shared |= self.first_shared(x_BLD)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, layers = [], self.layers
        recompute = self.training and torch.is_grad_enabled() and cache is None and not keep and run_block is None
        if recompute and not torch.compiler.is_compiling() and can_recompute(self.layers):
            layers, x_BLD = [], reversible_stack(self.layers, x_BLD, mask_BL, segment_ids)
        for i, block in enumerate(layers):
            if keep:
                hidden.append(x_BLD)
            state = None if cache is None else self._state(cache, i, x_BLD)
            arguments = (x_BLD, mask_BL, segment_ids, state, shared)
            x_BLD, state = block(*arguments) if run_block is None else run_block(i, block, *arguments)
            if cache is not None:
                cache.layers[i].set(state)
        x_BLD = self.finish(x_BLD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BLD, past_key_values=cache, hidden_states=(*hidden, x_BLD) if keep else None
        )

    def first_shared(self, x_BLD: Tensor) -> dict[str, Tensor]:
        """What later layers read of the input of the first one."""
        if self.meta_tokens is not None:
            return {"meta.0": self.meta_tokens.weight}
        return {"embedding": x_BLD} if self.reads_embedding else {}

    def finish(self, x_BLD: Tensor) -> Tensor:
        """From the last block's output to the final hidden states."""
        if self.norm is not None:
            x_BLD = self.norm(x_BLD)
        return x_BLD if self.project_out is None else self.project_out(x_BLD)

    def embed(self, inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """The sequence (B, L, D) of token ids or pixel values, and what all layers may share in this pass.

        Of images that is `grid_RC`, (rows, columns): where in the sequence each patch stands; `grid_RC.1` in stage 1.
        """
        if self.patches is None:
            return self.embed_tokens(inputs), {}
        return self.patches(inputs), self.patches.grids(inputs)

    def _cache(self, cache: Cache | None, use_cache: bool | None, segment_ids: Tensor | None) -> Any:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and segment_ids is None and self.is_causal
        learned = self.config.positions == "learned"
        layers = len(self.layers) + learned  # one more layer counts the tokens seen, for learned positions
        if cache is not None:
            return as_state_cache(cache, layers, self.config.meta_tokens)
        return state_cache(layers, self.config.meta_tokens) if use_cache else None

    def auxiliary_loss(self) -> Tensor | None:
        """The sum of what blocks and channel mixers added to the loss in the last forward; None without any."""
        parts = [m.auxiliary_loss for m in self.modules() if isinstance(m, Block | ChannelMixer)]
        losses = [part for part in parts if part is not None]
        return torch.stack(losses).sum() if losses else None

    def after_step(self) -> None:
        """To be called after each step of the optimizer: channel mixers learn what has no gradient."""
        for module in self.modules():
            if isinstance(module, ChannelMixer):
                module.after_step()

    @property
    def is_causal(self) -> bool:
        """Whether every layer is causal, so that a state can be carried."""
        return self.why_not_causal is None

    @property
    def why_not_causal(self) -> str | None:
        """The first layer's option that lets it see later positions; None where every layer is causal."""
        for i, block in enumerate(self.layers):
            if not getattr(block.mixer.config, "causal", True):
                return f"layers.{i}.mixer has causal: false"
            if not getattr(block.ffn, "causal", True):
                return f"layers.{i}.ffn looks at the whole sequence ({block.ffn.not_causal})"
        return None

    @staticmethod
    def _mask(attention_mask: Tensor | None, L: int) -> Tensor | None:
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, length), got shape {tuple(attention_mask.shape)}")
        mask_BL = attention_mask[:, -L:].bool()
        # Most batches are not padded: then every op takes its fast path. Not under compile, where it would be a break.
        if not torch.compiler.is_compiling() and bool(mask_BL.all()):
            return None
        return mask_BL

    def _embed(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None,
        token_type_ids: Tensor | None,
        segments_BL: Tensor | None,
        cache: Any,
    ) -> Tensor:
        B, L = x_BLD.shape[:2]
        if self.project_in is not None and self.config.embedding_projection == "words":
            x_BLD = self.project_in(neighbours(x_BLD, self.config.embedding_context, mask_BL, segments_BL))
        if self.config.positions == "learned":
            seen = cache.layers[-1] if cache is not None else None
            seen_B = seen.state["seen"] if seen is not None and seen.state is not None else None
            positions_BL = token_positions(x_BLD, mask_BL, segments_BL, seen_B)
            limit = self.config.max_position_embeddings
            if not torch.compiler.is_compiling() and int(positions_BL.max()) >= limit:
                raise ValueError(f"position {int(positions_BL.max())} is beyond the {limit} learned positions")
            x_BLD = x_BLD + self.embed_positions(positions_BL + self.config.position_offset)
            if seen is not None:
                new_B = mask_BL.sum(1) if mask_BL is not None else torch.full((B,), L, device=x_BLD.device)
                length = L + seen.get_seq_length()
                seen.set(State({"seen": new_B if seen_B is None else seen_B + new_B}, length))
        if self.config.token_types:
            if token_type_ids is None:
                x_BLD = x_BLD + self.embed_token_types.weight[0]
            else:
                x_BLD = x_BLD + self.embed_token_types(token_type_ids)
        if self.embed_norm is not None:
            x_BLD = self.embed_norm(x_BLD)
        if self.project_in is not None and self.config.embedding_projection == "sum":
            x_BLD = self.project_in(x_BLD)
        x_BLD = self.dropout(x_BLD)
        return torch.cat([x_BLD, x_BLD], -1) if self.config.block == "reversible" else x_BLD

    def _state(self, cache: Any, i: int, x_BLD: Tensor) -> State:
        layer: StateLayer = cache.layers[i]
        if layer.state is not None:
            return layer.state
        return self.layers[i].init_state(len(x_BLD), device=x_BLD.device, dtype=autocast_dtype(x_BLD) or x_BLD.dtype)
