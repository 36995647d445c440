"""Encoders of transformers whose mixer replaced BERT's attention: Longformer, BigBird, Nystromformer, FNet.

Around the mixer all four are BERT, under BERT's names: embeddings with a norm, post-norm blocks, a head with a dense
layer. Each is read and written as a masked LM, a classifier and a bare encoder.

Longformer        which tokens are global is an input there (`global_attention_mask`) and an option here: their config
                  gets `num_global_tokens`, which their class ignores; without it, it is 1, the first token, as their
                  classifier does it by itself. `attention_window` counts both sides.
BigBird           outside training their class takes the first block for every random one, and so does an import
                  (`random_pattern`); a model with drawn blocks cannot be expressed.
Nystromformer     where `num_landmarks` equals `segment_means_seq_len`, which is the default and so published, their
                  class attends to all; otherwise it needs rows of exactly that length. The pseudo-inverse starts there
                  from one number for the whole batch, here from one for each matrix: both arrive at the same inverse.
FNet              padding is mixed in there and is not here; without padding the two agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, one_layer, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, flat, pairs, same
from zoo.convert.layouts.names import LAYER_NORM, class_of
from zoo.errors import CheckpointError, ExportError
from zoo.transformers_keys import TOKEN_IDS, present

_BOTH = ("weight", "bias")
_TOKENS = (*TOKEN_IDS, "sep_token_id")
_LABELS = ("id2label", "label2id", "problem_type")
_DEFAULTS = {
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072,
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "tie_word_embeddings": True,
    "add_cross_attention": False, "is_decoder": False, "chunk_size_feed_forward": 0,
    "position_embedding_type": "absolute",
}  # fmt: skip
_ONLY = {"add_cross_attention": False, "is_decoder": False, "position_embedding_type": "absolute"}


class Encoder(Family):
    """What the four have in common. prefix: of their classes' names. defaults, only: of their config's options."""

    layout = "transformers"
    inert: ClassVar[tuple[str, ...]] = ("classifier_dropout",)  # which is `hidden_dropout_prob` there
    older = LAYER_NORM
    prefix: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]
    only: ClassVar[dict[str, Any]] = {}
    offset = 0
    roberta = False  # whether the masked LM's head is named as RoBERTa's, or as BERT's
    extra: ClassVar[dict[str, str]] = {}  # further modules: theirs below the root -> ours below the model
    layer: ClassVar[dict[str, str]] = {
        "attention.self.query": "mixer.q_proj",
        "attention.self.key": "mixer.k_proj",
        "attention.self.value": "mixer.v_proj",
        "attention.output.dense": "mixer.o_proj",
        "attention.output.LayerNorm": "mixer_norm",
    }
    pooler: ClassVar[str | None] = None  # a dense layer on the first token, by its name below the root

    @property
    def classes(self) -> dict[str, str]:
        """Their classes, with the task of each."""
        return {
            f"{self.prefix}ForMaskedLM": "masked-lm",
            f"{self.prefix}ForSequenceClassification": "sequence-classification",
            f"{self.prefix}Model": "sentence-embedding",
        }

    @property
    def about(self) -> str:  # type: ignore[override]
        """The classes, for the list of layouts."""
        return ", ".join(self.classes)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == self.name

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        return (".position_ids", ".token_type_ids")

    # --- their config ---------------------------------------------------------------------------------------------

    def mixers_of(self, c: dict[str, Any]) -> list[dict[str, Any]]:
        """The mixer of each layer, from their config."""
        raise NotImplementedError

    def mixer_options(self, config: ZooConfig) -> dict[str, Any]:
        """Their options of our mixers. Raises ExportError where there are none."""
        raise NotImplementedError

    def classifier(self, c: dict[str, Any]) -> str:
        """The activation behind the dense layer of a classifier."""
        return c["hidden_act"]

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**_DEFAULTS, **self.defaults, **checkpoint.config}
        for key, value in {**_ONLY, **self.only}.items():
            if c[key] != value:
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {value!r} can be expressed")
        task = self.classes[
            class_of(checkpoint, self.classes, {f"{self.prefix}ForPreTraining": next(iter(self.classes))})
        ]
        ffn = {"name": "mlp", "hidden_size": c["intermediate_size"], "activation": c["hidden_act"]}
        heads = {
            "masked-lm": {
                "mlm_transform": True,
                "mlm_activation": "gelu" if self.roberta else c["hidden_act"],
                "lm_head_bias": True,
            },
            "sequence-classification": {
                "pooling": "cls",
                "pooler": self.classifier(c),
                "classifier_dropout": c["hidden_dropout_prob"],
            },
        }
        return {
            "task": task,
            "vocab_size": c["vocab_size"],
            "hidden_size": c["hidden_size"],
            "max_position_embeddings": self.positions(c),
            "positions": "learned",
            "position_offset": self.offset,
            "token_types": c["type_vocab_size"],
            "layers": [{"mixer": mixer, "ffn": ffn} for mixer in self.mixers_of(c)],
            "block": "post_norm",
            "norm": "layer_norm",
            "norm_eps": c["layer_norm_eps"],
            "final_norm": False,
            "embedding_norm": True,
            "embedding_dropout": c["hidden_dropout_prob"],
            "tie_word_embeddings": c["tie_word_embeddings"],
            "initializer_range": c["initializer_range"],
            **heads.get(task, {}),
            **present(c, *_TOKENS, *_LABELS),
        }

    def positions(self, c: dict[str, Any]) -> int:
        """How many positions a model has, from their config."""
        return c["max_position_embeddings"]

    def config(self, config: ZooConfig) -> dict[str, Any]:
        spec = config.spec
        named = {task: name for name, task in self.classes.items()}
        if spec.task not in named:
            raise ExportError(f"has no class for the task {spec.task!r}")
        ffns = [layer.ffn for layer in spec.layers]
        if any(f is None or f.name != "mlp" or f != ffns[0] for f in ffns):
            raise ExportError("its channel mixers are not one mlp in all layers")
        carried = {key: getattr(config, key, None) for key in _TOKENS}
        labels = {key: getattr(config, key, None) for key in _LABELS if spec.task == "sequence-classification"}
        return {
            "architectures": [named[spec.task]],
            "model_type": self.name,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "num_hidden_layers": len(spec.layers),
            "intermediate_size": ffns[0].hidden_size,
            "hidden_act": ffns[0].activation,
            "hidden_dropout_prob": spec.embedding_dropout,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": spec.max_position_embeddings,
            "type_vocab_size": spec.token_types,
            "layer_norm_eps": spec.norm_eps,
            "initializer_range": spec.initializer_range,
            "tie_word_embeddings": spec.tie_word_embeddings,
            **{key: value for key, value in {**carried, **labels}.items() if value is not None},
            **self.mixer_options(config),
        }

    # --- tensors --------------------------------------------------------------------------------------------------

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        root = "" if config.task == "sentence-embedding" else self.root
        for table in ("word", "position", "token_type"):
            ours = {"word": "tokens", "position": "positions", "token_type": "token_types"}[table]
            yield same(f"{root}embeddings.{table}_embeddings.weight", f"model.embed_{ours}.weight")
        yield from pairs(root, "model.", {"embeddings.LayerNorm": "embed_norm", **self.extra}, _BOTH)
        for i, layer in enumerate(config.spec.layers):
            theirs, ours = f"{root}encoder.layer.{i}.", f"model.layers.{i}."
            yield from self.mixer_entries(layer.mixer, theirs, ours)
            modules = {"intermediate.dense": "ffn.up_proj", "output.dense": "ffn.down_proj"}
            yield from pairs(theirs, ours, {**modules, "output.LayerNorm": "ffn_norm"}, _BOTH)
        yield from self.head_entries(config)

    def mixer_entries(self, mixer: Any, theirs: str, ours: str) -> Iterator[Entry]:
        """The tensors of one layer's mixer and the norm behind it."""
        for name, mine in self.layer.items():
            biased = mixer.qkv_bias if mine.endswith(("q_proj", "k_proj", "v_proj")) else True
            yield from pairs(theirs, ours, {name: mine}, _BOTH if biased else ("weight",))

    def head_entries(self, config: ZooConfig) -> Iterator[Entry]:
        """The tensors of the task's head."""
        if config.task == "sequence-classification":
            yield from pairs("classifier.", "", {"dense": "pooler", "out_proj": "classifier"}, _BOTH)
        if config.task != "masked-lm":
            return
        names = {"dense": "dense", "layer_norm": "norm"} if self.roberta else {"dense": "dense", "LayerNorm": "norm"}
        yield from pairs(self._head + ("" if self.roberta else "transform."), "transform.", names, _BOTH)
        if not config.tie_word_embeddings:
            yield same(f"{self._head}decoder.weight", "lm_head.weight")
        yield same(f"{self._head}{'bias' if config.tie_word_embeddings else 'decoder.bias'}", "lm_head.bias")

    @property
    def _head(self) -> str:
        return "lm_head." if self.roberta else "cls.predictions."

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        if config.task != "masked-lm" or not config.tie_word_embeddings:
            return {}
        words = f"{self.root}embeddings.word_embeddings.weight"
        return {f"{self._head}decoder.weight": words, f"{self._head}decoder.bias": f"{self._head}bias"}

    def is_dropped(self, name: str) -> bool:
        untied = name in (f"{self._head}bias", "lm_head.bias")  # has no part in an untied head
        return untied or super().is_dropped(name)

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        D, found = config.hidden_size, {}
        if self.pooler is not None:
            root = "" if config.task == "sentence-embedding" else self.root
            found = {f"{root}{self.pooler}.weight": (D, D), f"{root}{self.pooler}.bias": (D,)}
        if config.task == "masked-lm" and not config.tie_word_embeddings:
            found[f"{self._head}bias"] = (config.vocab_size,)
        return found


def heads(c: dict[str, Any], bias: bool = True) -> dict[str, Any]:
    """The options that every mixer with queries, keys and values has."""
    return {
        "num_heads": c["num_attention_heads"],
        "head_dim": c["hidden_size"] // c["num_attention_heads"],
        "qkv_bias": bias,
        "out_bias": True,
        "causal": False,
    }


@register_family
class Longformer(Encoder):
    """arXiv:2004.05150; allenai/longformer-*-4096."""

    name = "longformer"
    mixers = ("longformer",)
    prefix, root = "Longformer", "longformer."
    spare = ("longformer.pooler",)
    roberta, offset = True, 2
    defaults: ClassVar = {
        "attention_window": 512, "vocab_size": 30522, "hidden_act": "gelu", "max_position_embeddings": 512,
        "type_vocab_size": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2,
        "num_global_tokens": 1, "attention_dilation": None, "autoregressive": False,
    }  # fmt: skip
    layer: ClassVar = {
        **Encoder.layer,
        "attention.self.query_global": "mixer.q_global_proj",
        "attention.self.key_global": "mixer.k_global_proj",
        "attention.self.value_global": "mixer.v_global_proj",
    }
    pooler = "pooler.dense"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**self.defaults, **checkpoint.config}
        if c["autoregressive"] or set(c["attention_dilation"] or [1]) != {1}:
            raise CheckpointError(
                f"{checkpoint.path}: autoregressive and attention_dilation are not those of the class"
            )
        return super().fields(checkpoint)

    def mixers_of(self, c: dict[str, Any]) -> list[dict[str, Any]]:
        windows = c["attention_window"]
        windows = windows if isinstance(windows, list) else [windows] * c["num_hidden_layers"]
        if len(windows) != c["num_hidden_layers"] or any(w % 2 for w in windows):
            raise CheckpointError(f"attention_window is {windows}; expected an even number for each layer")
        options = {"name": "longformer", **heads(c), "global_tokens": c["num_global_tokens"]}
        return [{**options, "window": w // 2 + 1} for w in windows]

    def positions(self, c: dict[str, Any]) -> int:
        if c["pad_token_id"] != self.offset - 1:
            raise CheckpointError(f"pad_token_id is {c['pad_token_id']}; positions are counted from 1 + 1 here")
        return c["max_position_embeddings"] - self.offset

    def classifier(self, c: dict[str, Any]) -> str:
        return "tanh"

    def mixer_options(self, config: ZooConfig) -> dict[str, Any]:
        mixers = [layer.mixer for layer in config.spec.layers]
        if not mixers[0].global_tokens:
            raise ExportError(
                "its layers have no global tokens, and so not the projections that the class has for them"
            )
        return {
            "num_attention_heads": mixers[0].num_heads,
            "attention_window": [2 * (m.window - 1) for m in mixers],
            "num_global_tokens": mixers[0].global_tokens,
            "max_position_embeddings": config.max_position_embeddings + self.offset,
            "pad_token_id": 1,
        }

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        found = super().fillers(config)  # only the bare class makes its pooler
        return found if config.task == "sentence-embedding" else {k: v for k, v in found.items() if "pooler" not in k}


@register_family
class BigBird(Encoder):
    """arXiv:2007.14062; google/bigbird-roberta-*."""

    name = "big_bird"
    mixers = ("big_bird",)
    inert = (*Encoder.inert, "seed")  # of random blocks, which a read model has none of
    prefix, root = "BigBird", "bert."
    spare = ("bert.pooler", "cls.seq_relationship")
    pooler = "pooler"
    defaults: ClassVar = {
        "vocab_size": 50358, "hidden_act": "gelu_new", "max_position_embeddings": 4096, "type_vocab_size": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 66, "use_bias": True,
        "attention_type": "block_sparse", "rescale_embeddings": False, "block_size": 64, "num_random_blocks": 3,
    }  # fmt: skip
    only: ClassVar = {"attention_type": "block_sparse", "rescale_embeddings": False}

    def mixers_of(self, c: dict[str, Any]) -> list[dict[str, Any]]:
        options = {
            "name": "big_bird",
            **heads(c, c["use_bias"]),
            "block_size": c["block_size"],
            "num_random_blocks": c["num_random_blocks"],
            "max_length": c["max_position_embeddings"],
            "random_pattern": "first_block",
        }
        return [options] * c["num_hidden_layers"]

    def mixer_options(self, config: ZooConfig) -> dict[str, Any]:
        mixer = config.spec.layers[0].mixer
        return {
            "num_attention_heads": mixer.num_heads,
            "use_bias": mixer.qkv_bias,
            "attention_type": "block_sparse",
            "block_size": mixer.block_size,
            "num_random_blocks": mixer.num_random_blocks,
        }


@register_family
class Nystromformer(Encoder):
    """arXiv:2102.03902; uw-madison/nystromformer-*."""

    name = "nystromformer"
    mixers = ("nystromformer",)
    prefix, root = "Nystromformer", "nystromformer."
    offset = 2
    defaults: ClassVar = {
        "vocab_size": 30000, "hidden_act": "gelu_new", "max_position_embeddings": 510, "type_vocab_size": 2,
        "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "num_landmarks": 64,
        "segment_means_seq_len": 64, "conv_kernel_size": 65, "inv_coeff_init_option": False,
    }  # fmt: skip
    only: ClassVar = {"inv_coeff_init_option": False}  # their code for it cannot run

    def mixers_of(self, c: dict[str, Any]) -> list[dict[str, Any]]:
        everything = c["num_landmarks"] == c["segment_means_seq_len"]
        options = {
            "name": "nystromformer",
            **heads(c),
            "landmarks": c["max_position_embeddings"] if everything else c["num_landmarks"],
            "skip_taps": c["conv_kernel_size"],
        }
        return [options] * c["num_hidden_layers"]

    def mixer_options(self, config: ZooConfig) -> dict[str, Any]:
        mixer, longest = one_layer(config).mixer, config.max_position_embeddings
        if mixer.skip_taps is None:
            raise ExportError("its layers have no convolution of the values, which the class always has")
        everything = mixer.landmarks >= longest
        if not everything and longest % mixer.landmarks:
            raise ExportError(f"{longest} positions do not divide into {mixer.landmarks} landmarks of equal length")
        return {
            "num_attention_heads": mixer.num_heads,
            "num_landmarks": mixer.landmarks,
            "segment_means_seq_len": mixer.landmarks if everything else longest,
            "conv_kernel_size": mixer.skip_taps,
            "inv_coeff_init_option": False,
        }

    def mixer_entries(self, mixer: Any, theirs: str, ours: str) -> Iterator[Entry]:
        yield from super().mixer_entries(mixer, theirs, ours)
        shape = (mixer.num_heads, 1, mixer.skip_taps, 1)
        taps = flat(f"{theirs}attention.self.conv.weight", f"{ours}mixer.skip_HT", shape)
        yield Entry(taps.theirs, taps.ours, lambda t: [t[0].reshape(shape[0], shape[2])], taps.write)


@register_family
class FNet(Encoder):
    """arXiv:2105.03824; google/fnet-*."""

    name = "fnet"
    mixers = ("fnet",)
    prefix, root = "FNet", "fnet."
    spare = ("fnet.pooler", "cls.seq_relationship")
    pooler = "pooler.dense"
    extra: ClassVar = {"embeddings.projection": "project_in"}
    layer: ClassVar = {"fourier.output.LayerNorm": "mixer_norm"}
    defaults: ClassVar = {
        "vocab_size": 32000, "hidden_act": "gelu_new", "max_position_embeddings": 512, "type_vocab_size": 4,
        "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "use_tpu_fourier_optimizations": False,
    }  # fmt: skip

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        found = super().fields(checkpoint)
        return {**found, "embedding_size": found["hidden_size"], "embedding_projection": "sum"}

    def mixers_of(self, c: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"name": "fnet"}] * c["num_hidden_layers"]

    def classifier(self, c: dict[str, Any]) -> str:
        return "tanh"

    def mixer_options(self, config: ZooConfig) -> dict[str, Any]:
        return {}

    def head_entries(self, config: ZooConfig) -> Iterator[Entry]:
        if config.task == "sequence-classification":
            yield from pairs("", "", {"fnet.pooler.dense": "pooler", "classifier": "classifier"}, _BOTH)
        else:
            yield from super().head_entries(config)

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        return {} if config.task == "sequence-classification" else super().fillers(config)
