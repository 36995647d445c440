"""Tiny teachers for the tests of conversion: one that has learnt something, and random ones of other families."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

PERIOD = 7


def motif_rows(count: int, length: int, seed: int) -> torch.Tensor:
    """Rows (count, length) of a random motif of `PERIOD` tokens repeated: to go on, a model must look back."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 32, (count, PERIOD), generator=generator).repeat(1, length // PERIOD + 1)[:, :length]


@pytest.fixture(scope="session")
def trained_llama():
    """A Llama with 3 layers that has learnt to repeat a motif (3 CPU-seconds); treat it as read-only."""
    from zoo.convert.teachers import load_teacher

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(250):
        rows = motif_rows(16, 32, seed=1000 + step)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return load_teacher(model)


@pytest.fixture
def llama():
    """A random transformers Llama: 2 layers, grouped heads, head size 8."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0)).eval()


@pytest.fixture
def gpt2():
    """A random transformers GPT-2: 2 layers, biases, learned positions (64 of them)."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


@pytest.fixture
def bert():
    """A random transformers BERT for masked LM: 2 layers, post-norm, two-sided."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).eval()
