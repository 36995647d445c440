"""One strict, typed description of any model.

`ModelSpec` is the description itself: a pydantic model in which every size is bounded and every key is known.
`ZooConfig` is the same description as a transformers `PreTrainedConfig`, so that Auto classes, `save_pretrained` and
`generate` work on it. Layers are a list; a hybrid is written as a pattern and expanded once:

    layers:
      pattern: "sliding_window*4 attention"       # repeated until num_hidden_layers are filled
      num_hidden_layers: 30
      mixers: {sliding_window: {window: 64}}      # options by mixer name
      defaults: {num_heads: 9, num_kv_heads: 3, head_dim: 64}    # options every mixer of the pattern gets
      ffn: {name: gated_mlp, hidden_size: 1536}       # or ffn_pattern: "gated_mlp moe*29", ffns: {moe: {...}, ...}

A label after a name, "attention@a", makes all layers with that label share one set of weights (`same_as` in a list).

Unknown keys, wrong types and impossible sizes raise `ConfigError` with the path, the value and the nearest valid name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import PreTrainedConfig

from zoo.errors import ConfigError, UnknownNameError, did_you_mean
from zoo.options import FFNOptions as FFNOptions
from zoo.options import MixerOptions as MixerOptions
from zoo.options import Options as Options
from zoo.options import explain as explain
from zoo.transformers_keys import NAMES, TransformersKeys

MAX_LAYERS = 1024
Size = Field(ge=1, le=1 << 20)
Task = Literal["causal-lm", "masked-lm", "sequence-classification", "sentence-embedding", "image-classification"]


class DepthOptions(Options):
    """Options of a block that only some tokens take (`zoo.models.depth`).

    capacity: the share of the tokens of a sequence. predictor: inner size of what decides in decoding; None: the
    router itself. loss_weight: of its loss. bias: whether the router's weights have a learned constant.
    """

    capacity: float = Field(0.125, gt=0, le=1)
    predictor: int | None = Field(64, ge=1, le=1 << 16)
    loss_weight: float = Field(0.01, gt=0, le=100)
    bias: bool = False

    @model_validator(mode="after")
    def _decides(self) -> Self:
        if self.predictor is None and not self.bias:
            raise ValueError("predictor: null decides by the sign of the router's weights, which needs bias: true")
        return self


class MemoryOptions(Options):
    """Options of a transformer that several layers share and read (`zoo.models.memory`).

    attention, ffn: of its mixers, `attention` and `gated_mlp`. rank: of the maps that each use adds to those of the
    MLP, and with `adapt_attention` to those of queries, keys and values; None: no use has any. same_as: the index of
    the earlier layer whose memory this layer reads.
    """

    attention: Any
    ffn: Any
    rank: int | None = Field(None, ge=1, le=1 << 16)
    adapt_attention: bool = False
    same_as: int | None = Field(None, ge=0, lt=MAX_LAYERS)

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        from zoo.registry import parse_ffn, parse_mixer

        for key, parse, name in (("attention", parse_mixer, "attention"), ("ffn", parse_ffn, "gated_mlp")):
            value = getattr(self, key)
            parsed: Any = parse({"name": name, **value} if isinstance(value, dict) else value, key)
            if parsed.name != name:
                raise ConfigError(f"{key}.name: a memory block has {name!r} here, got {parsed.name!r}")
            object.__setattr__(self, key, parsed)
        if not self.attention.causal or self.attention.conv or self.attention.gate or self.attention.head_norm:
            raise ValueError("attention: of a memory block is causal, without conv, gate and head_norm")
        return self

    def plain(self) -> dict[str, Any]:
        """The options as JSON types."""
        mixers = {"attention": self.attention.plain(), "ffn": self.ffn.plain()}
        return {**self.model_dump(mode="json", exclude=set(mixers)), **mixers}


class LayerSpec(BaseModel):
    """One block: a sequence mixer and, unless None, a channel mixer.

    With `same_as`, the index of an earlier layer, the block of that layer runs again, with the same weights. With
    `depth` only some tokens take the block. With `memory` its mixer also reads a transformer that layers share. `block`
    is the order of its norms and residuals, where it is another than the model's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    mixer: Any
    ffn: Any = None
    same_as: int | None = None
    depth: DepthOptions | None = None
    memory: MemoryOptions | None = None
    block: Literal["pre_norm", "output_norm"] | None = None

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        from zoo.registry import parse_ffn, parse_mixer

        for key, parse in (("mixer", parse_mixer), ("ffn", parse_ffn)):
            value = getattr(self, key)
            try:
                object.__setattr__(self, key, None if key == "ffn" and value is None else parse(value, key))
            except UnknownNameError as error:
                raise ConfigError(f"{key}: {error}") from None
        return self

    def plain(self) -> dict[str, Any]:
        """The layer as JSON types."""
        plain = {"mixer": self.mixer.plain(), "ffn": None if self.ffn is None else self.ffn.plain()}
        if self.depth is not None:
            plain["depth"] = self.depth.plain()
        if self.memory is not None:
            plain["memory"] = self.memory.plain()
        if self.block is not None:
            plain["block"] = self.block
        return plain if self.same_as is None else {**plain, "same_as": self.same_as}


def _layer(value: Any, i: int, before: list[LayerSpec]) -> LayerSpec:
    """Layer i of a model; one with `same_as` has the options of that layer and need not repeat them."""
    same = value.get("same_as") if isinstance(value, dict) else getattr(value, "same_as", None)
    if same is None:
        return value if isinstance(value, LayerSpec) else LayerSpec(**value)
    if isinstance(same, bool) or not isinstance(same, int) or not 0 <= same < i:
        raise ValueError(f"layers.{i}.same_as: must be the index of an earlier layer, got {same!r}")
    first = before[same]
    keys = ("mixer", "ffn", "depth", "memory", "block")
    layer = LayerSpec(**{**{k: getattr(first, k) for k in keys}, **value}) if isinstance(value, dict) else value
    for key in keys:
        if getattr(layer, key) != getattr(first, key):
            raise ValueError(f"layers.{i}.{key}: differs from that of layer {same}, whose weights it uses (same_as)")
    return layer.model_copy(update={"same_as": same if first.same_as is None else first.same_as})


def _check_memory(layers: list[LayerSpec], i: int) -> None:
    """Raise ValueError where layer i reads the memory of a layer that has none, or another one than it says."""
    memory = layers[i].memory
    if memory is None or memory.same_as is None or layers[i].same_as is not None:
        return
    first = layers[memory.same_as].memory if memory.same_as < i else None
    if first is None or first.same_as is not None:
        raise ValueError(f"layers.{i}.memory.same_as: layer {memory.same_as} has no memory block of its own")
    if (memory.attention, memory.ffn) != (first.attention, first.ffn):
        raise ValueError(f"layers.{i}.memory: differs from that of layer {memory.same_as}, which it reads (same_as)")


class ExitOptions(Options):
    """Options of early exits (`zoo.models.early_exit`).

    layers: after which a token may leave. confidence: the largest probability ("max"), the difference of the two
    largest ("margin"), or the entropy in nats. threshold: from where on (for the entropy: up to where) a token leaves;
    None: never. own_norms: whether each exit has a norm, or all use the model's last one.
    """

    layers: list[int] = Field(min_length=1, max_length=MAX_LAYERS)
    confidence: Literal["max", "margin", "entropy"] = "max"
    threshold: float | None = Field(None, ge=0, le=100)
    own_norms: bool = True

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if sorted(set(self.layers)) != self.layers or self.layers[0] < 0:
            raise ValueError(f"layers: must be indices of layers in rising order, got {self.layers}")
        return self


class ImageOptions(Options):
    """How an image becomes a sequence: patches row by row, behind the special tokens. Sizes in pixels.

    stages: layers of each stage of a hierarchical model. Between stages 2 x 2 patches become one that is twice as wide;
    `hidden_size` is the width of the first stage.
    interpolation: how learned positions are resized for other images than `image_size`: as transformers does it, with
    antialiasing as timm does it, or None: other sizes are refused.
    stem: channels between convolutions that stand for the one projection of patches, each halving the sides (CCT).
    mean, std: of each channel's values between 0 and 1: the model reads (x - mean) / std. Empty: it reads x.
    """

    image_size: int = Field(224, ge=1, le=1 << 14)
    patch_size: int = Field(16, ge=1, le=1 << 12)
    channels: int = Field(3, ge=1, le=4096)
    class_token: bool = True
    distillation_token: bool = False  # DeiT's second token
    distillation_head: bool = False  # and the classifier that reads it
    positions: bool = True
    interpolation: Literal["bicubic", "bicubic_antialias"] | None = "bicubic"
    stages: list[Annotated[int, Field(ge=1, le=MAX_LAYERS)]] | None = Field(None, min_length=1, max_length=8)
    stem: list[Annotated[int, Field(ge=1, le=1 << 14)]] | None = Field(None, max_length=8)
    mean: list[float] = Field(default_factory=list)
    std: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.stem is not None and self.patch_size != 2 << len(self.stem):
            halved = f"{len(self.stem) + 1} convolutions make patches of {2 << len(self.stem)} pixels"
            raise ValueError(f"stem: {halved}, so patch_size cannot be {self.patch_size}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != (self.channels if self.mean or self.std else 0):
                raise ValueError(f"{name}: give mean and std together, {self.channels} numbers each (one a channel)")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) is not a multiple of patch_size ({self.patch_size})")
        if self.grid % self.merged:
            raise ValueError(f"stages: a side of {self.grid} patches does not divide by {self.merged}")
        if self.stages and self.prefix:
            raise ValueError("stages merge all tokens, so there can be no class token: set class_token to False")
        if self.distillation_token and not self.class_token:
            raise ValueError("distillation_token stands beside a class token: set class_token")
        if self.distillation_head and not self.distillation_token:
            raise ValueError("distillation_head reads the distillation token: set distillation_token")
        return self

    @property
    def prefix(self) -> int:
        """How many special tokens stand before the patches."""
        return self.class_token + self.distillation_token

    @property
    def merged(self) -> int:
        """How many patches along a side become one by the last stage."""
        return 1 if self.stages is None else 1 << (len(self.stages) - 1)

    @property
    def grid(self) -> int:
        """Patches along one side of an image of `image_size`."""
        return self.image_size // self.patch_size


def _default_layers() -> list[dict]:
    return [
        {"mixer": {"name": "attention", "num_heads": 4, "head_dim": 16}, "ffn": {"name": "mlp", "hidden_size": 256}}
    ]


class ModelSpec(Options):
    """Every field of a model. Sizes are in numbers, not bytes; see the comments for what is not obvious."""

    task: Task = "causal-lm"
    vocab_size: int = Field(256, ge=2, le=1 << 22)
    hidden_size: int = Field(64, ge=1, le=1 << 17)
    max_position_embeddings: int = Field(2048, ge=1, le=1 << 27)
    layers: list[Any] = Field(default_factory=_default_layers, min_length=1, max_length=MAX_LAYERS)
    block: Literal["pre_norm", "post_norm", "output_norm", "parallel", "reversible"] = "pre_norm"
    # no_norm: a scale and a shift a channel
    norm: Literal["rms_norm", "layer_norm", "no_norm", "zero_centered_rms_norm"] = "rms_norm"
    norm_eps: float = Field(1e-5, gt=0, le=1)
    final_norm: bool = True
    positions: Literal["none", "learned"] = "none"  # rotary positions are an option of the mixers
    axial_shape: list[int] = Field(default_factory=list)  # learned positions from one table per axis (models/axial.py)
    axial_dims: list[int] = Field(default_factory=list)
    position_offset: int = Field(0, ge=0, le=1024)  # RoBERTa's learned positions start at 2
    token_types: int = Field(0, ge=0, le=1024)
    meta_tokens: int = Field(0, ge=0, le=4096)  # learned vectors before every sequence (`zoo.models.meta`)
    embedding_size: int | None = Field(None, ge=1, le=1 << 17)  # of word vectors; a linear map leads to hidden_size
    embedding_projection: Literal["words", "sum"] = "words"  # maps word vectors, or their normed sum with positions
    embedding_projection_bias: bool = True
    embedding_context: int = Field(1, ge=1, le=15)  # word vectors of so many neighbours are mapped together
    embedding_output: Literal["transform", "project", "extend"] = "transform"  # how a head gets back to word vectors
    embedding_norm: bool = False
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    image: ImageOptions | None = None  # of the task image-classification, and only there
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    mlm_transform: bool = False  # BERT's dense + activation + norm before the vocabulary
    mlm_activation: str = "gelu"
    pooling: Literal["mean", "cls", "last"] = "mean"
    pooler: Literal["tanh", "relu", "gelu", "gelu_new"] | None = None  # activation of a dense layer on the pooled state
    normalize_embeddings: bool = True
    classifier_dropout: float = Field(0.0, ge=0, lt=1)
    initializer_range: float = Field(0.02, gt=0, le=10)
    embedding_initializer_range: float | None = Field(None, gt=0, le=10)  # None: as initializer_range
    exits: ExitOptions | None = None
    origin: dict[str, Any] = Field(default_factory=dict)  # teacher, layout and original config of a converted model

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("layers"), dict):
            from zoo.patterns import expand_pattern

            values = {**values, "layers": expand_pattern(values["layers"])}
        return values

    @field_validator("mlm_activation")
    @classmethod
    def _known_activation(cls, value: str) -> str:
        from transformers.activations import ACT2FN

        if value not in ACT2FN:
            raise ValueError(f"unknown activation {value!r}{did_you_mean(value, ACT2FN)}")
        return value

    @model_validator(mode="after")
    def _embedding_fits(self) -> Self:
        fields = type(self).model_fields
        keys = ("embedding_projection", "embedding_projection_bias", "embedding_context", "embedding_output")
        if self.embedding_size is None:
            for key in keys:
                if getattr(self, key) != fields[key].default:
                    raise ValueError(f"{key}: says nothing without embedding_size")
            return self
        if self.exits is not None and self.embedding_output == "project":
            raise ValueError("exits: a model whose states are mapped to word vectors ('project') has no early exits")
        if self.embedding_context % 2 == 0 or (self.embedding_context > 1 and self.embedding_projection == "sum"):
            raise ValueError(
                f"embedding_context: {self.embedding_context} neighbours: must be odd, and 1 with projection 'sum'"
            )
        if self.embedding_output == "extend" and self.embedding_size >= self.hidden_size:
            raise ValueError(f"embedding_size: 'extend' needs fewer than hidden_size, got {self.embedding_size}")
        ends_in_words = self.mlm_transform if self.task == "masked-lm" else self.task != "causal-lm"
        same = self.embedding_size == self.hidden_size
        if self.embedding_output == "transform" and not (ends_in_words or same):
            raise ValueError(f"embedding_output: a {self.task} without mlm_transform needs 'project' or 'extend'")
        return self

    @property
    def word_size(self) -> int:
        """Size of the word vectors."""
        return self.embedding_size or self.hidden_size

    @property
    def sum_size(self) -> int:
        """Size of positions and token types, and of the norm on their sum with the word vectors."""
        return self.word_size if self.embedding_projection == "sum" else self.hidden_size

    @property
    def stack_size(self) -> int:
        """Size of what leaves the blocks for the final norm: `hidden_size`, or more with two streams or stages."""
        return self.hidden_size * (2 if self.block == "reversible" else 1 if self.image is None else self.image.merged)

    @property
    def state_size(self) -> int:
        """Size of the final hidden states, which a head reads."""
        return self.word_size if self.embedding_output == "project" else self.stack_size

    @property
    def output_size(self) -> int:
        """Size of the states that meet the vocabulary."""
        whole = self.embedding_output == "extend" or self.block == "reversible"
        return self.stack_size if whole else self.word_size

    @model_validator(mode="after")
    def _image_fits(self) -> Self:
        if (self.task == "image-classification") != (self.image is not None):
            raise ValueError(f"image: belongs to the task image-classification, and to no other; task is {self.task!r}")
        if self.image is not None and self.embedding_size is not None:
            raise ValueError("embedding_size: belongs to word vectors, of which a model of images has none")
        if self.image is not None and self.pooling == "cls" and not self.image.class_token:
            raise ValueError("pooling: 'cls' reads the class token, but image.class_token is False; use 'mean'")
        if self.image and self.image.stages and sum(self.image.stages) != len(self.layers):
            raise ValueError(f"image.stages: {self.image.stages} are not the {len(self.layers)} layers there are")
        return self

    @model_validator(mode="after")
    def _resolve_layers(self) -> Self:
        layers: list[LayerSpec] = []
        for i, layer in enumerate(self.layers):
            try:
                layers.append(_layer(layer, i, layers))
                _check_memory(layers, i)
            except ValidationError as error:
                raise ValueError(explain(error, LayerSpec, f"layers.{i}")) from None
            except TypeError:
                raise ValueError(f"layers.{i}: expected {{mixer: ..., ffn: ...}}, got {layer!r}") from None
        object.__setattr__(self, "layers", layers)
        if self.exits is not None and self.exits.layers[-1] >= len(layers):
            raise ValueError(f"exits.layers: the last layer is {len(layers) - 1}, got {self.exits.layers[-1]}")
        if self.exits is not None and self.task != "causal-lm":
            raise ValueError(f"exits: only a causal-lm predicts token by token, got task {self.task!r}")
        return self

    def plain(self) -> dict[str, Any]:
        """The whole description as JSON types; `ModelSpec.parse` of it gives an equal description."""
        return {**self.model_dump(mode="json", exclude={"layers"}), "layers": [layer.plain() for layer in self.layers]}


class ZooConfig(PreTrainedConfig):
    """`ModelSpec` as a transformers config. Fields of the spec are attributes; `spec` gives them back typed."""

    model_type = "zoo"

    def __init__(self, **kwargs: Any) -> None:
        fields = set(ModelSpec.model_fields)
        for key in kwargs:
            if key not in fields and key not in NAMES:
                raise ConfigError(f"{key}: unknown key{did_you_mean(key, sorted(fields | NAMES))}")
        TransformersKeys.parse({k: v for k, v in kwargs.items() if k in NAMES})
        spec = ModelSpec.parse({k: v for k, v in kwargs.items() if k in fields})
        for key, value in spec.plain().items():
            object.__setattr__(self, key, value)
        rest = {k: v for k, v in kwargs.items() if k not in fields and k != "model_type"}
        self._init_transformers(rest)

    def _init_transformers(self, values: dict[str, Any]) -> None:
        from dataclasses import MISSING
        from dataclasses import fields as dataclass_fields

        known = {f.name: f for f in dataclass_fields(PreTrainedConfig)}
        for name, field in known.items():
            if name in values:
                setattr(self, name, values[name])
            else:
                made = field.default is MISSING and field.default_factory is not MISSING
                setattr(self, name, field.default_factory() if made else field.default)  # type: ignore[operator]
        self.use_cache = bool(values.get("use_cache", True))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self, name, values.get(name))
        skip = {*known, "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}
        PreTrainedConfig.__post_init__(self, **{k: v for k, v in values.items() if k not in skip})

    @property
    def spec(self) -> ModelSpec:
        """The typed description, made from the attributes as they are now."""
        return ModelSpec.parse({name: getattr(self, name) for name in ModelSpec.model_fields})

    @property
    def num_hidden_layers(self) -> int:
        """How many blocks there are."""
        return len(self.layers)

    @property
    def mixer_names(self) -> list[str]:
        """The mixer of each layer, by name."""
        return [layer["mixer"]["name"] for layer in self.layers]
