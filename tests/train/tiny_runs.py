"""A tiny teacher, student and text for the tests of training."""

import random

import torch

from zoo.config import ZooConfig
from zoo.convert.surgery import replace_mixers
from zoo.models.heads import ZooForCausalLM
from zoo.text import byte_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
TOKENIZER = byte_tokenizer()


def make_texts(count=120, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(2, 30))) for _ in range(count)]


def make_teacher(layers=3, seed=0, **fields):
    torch.manual_seed(seed)
    layer = {
        "mixer": {"name": "attention", "num_heads": 2, "head_dim": 16, "rotary": {}},
        "ffn": {"name": "gated_mlp", "hidden_size": 48},
    }
    fields = {"initializer_range": 0.2, **fields}  # large enough that attention looks at something
    return ZooForCausalLM(ZooConfig(vocab_size=256, hidden_size=32, layers=[layer] * layers, **fields)).eval()


def make_student(teacher, layers=(1, 2), mixer="linear_attention"):
    torch.manual_seed(1)
    return replace_mixers(teacher, dict.fromkeys(layers, mixer))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
