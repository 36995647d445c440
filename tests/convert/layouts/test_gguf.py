"""Our GGUF files in llama.cpp (the package xllamacpp): the same tokens, and the same likeliest ones at each step."""

from __future__ import annotations

import math

import pytest
import torch

import zoo
from zoo.convert.layouts import export_model, import_checkpoint
from zoo.errors import CheckpointError, ExportError

TINY = {
    "llama-tiny": {},
    "mamba-tiny": {},
    "mamba2-tiny": {},
}


def written(name, folder, dtype=torch.float32):
    model = zoo.create_model(name, max_position_embeddings=256, **TINY[name]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = model.to(dtype)
    export_model(model, "gguf", folder, tokenizer=plain_tokenizer())
    return model


def plain_tokenizer():
    """256 tokens of two letters, so that no answer ends within a character; the first one ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(97 + i // 16) + chr(65 + i % 16): i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="aA")


@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_gives_the_same_tokens(name, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp comes with the package xllamacpp")
    model = written(name, tmp_path / "out")
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "out" / "model.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 256, 1, False, 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which rounds to half
    server = xllamacpp.Server(params)
    prompt = torch.randint(1, 256, (1, 24))
    with torch.no_grad():
        whole = model.generate(prompt, max_new_tokens=12, suppress_tokens=[0], pad_token_id=0)
        expected = model(whole).logits.log_softmax(-1)[0, prompt.shape[1] - 1 : -1]
    asked = {"prompt": prompt[0].tolist(), "n_predict": 12, "temperature": 0.0, "n_probs": 5, "ignore_eos": True}
    answer = server.handle_completions({**asked, "return_tokens": True, "cache_prompt": False})
    steps = answer["choices"][0]["logprobs"]["content"] if "choices" in answer else answer["completion_probabilities"]
    assert len(steps) == 12
    for step, row, token in zip(steps, expected, whole[0, prompt.shape[1] :].tolist(), strict=True):
        assert step["id"] == token
        for told in step["top_logprobs"]:
            assert math.isclose(told["logprob"], row[told["id"]].item(), abs_tol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back(dtype, tmp_path):
    model = written("llama-tiny", tmp_path / "out", dtype)
    again = import_checkpoint(tmp_path / "out" / "model.gguf")
    assert again.layout == "gguf"
    ours = {name: t for name, t in model.state_dict().items() if t.dim() == 2}
    theirs = again.model.state_dict()
    assert all(torch.equal(tensor.float(), theirs[name].float()) for name, tensor in ours.items())


def test_what_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(ExportError, match="gguf"):
        export_model(zoo.create_model("retnet-tiny"), "gguf", tmp_path / "a")
    windows = zoo.create_model("llama-tiny", layers={"num_hidden_layers": 2, "defaults": {"window": 8}})
    with pytest.raises(ExportError, match="window"):
        export_model(windows, "gguf", tmp_path / "b")
    written("mamba-tiny", tmp_path / "c")
    whole = (tmp_path / "c" / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        import_checkpoint(tmp_path / "cut.gguf")


def test_the_vocabulary_inside_is_found(tmp_path):
    """Of a file as llama.cpp's own converter writes it, here with a byte-level BPE of a few merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator(["the cat sat on the mat, then the dog sat"] * 9, trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")
    model = zoo.create_model("llama-tiny", vocab_size=len(words))
    export_model(model, "gguf", tmp_path / "out", tokenizer=words)
    found = import_checkpoint(tmp_path / "out" / "model.gguf")
    for text in ("the cat sat", "on ünknown mats\n\n1999"):
        assert found.tokenizer(text).input_ids == words(text).input_ids
    assert found.model.config.eos_token_id == words.eos_token_id
