"""GGUF files of transformers' models, written here by hand: names, order of rows and keys as llama.cpp documents them.

What llama.cpp itself makes of our files is in tests/convert/layouts/test_gguf.py.
"""

from __future__ import annotations

import torch

from peers import Peer, peer, random_weights, tokens


def writer(folder, architecture, keys):
    import gguf

    made = gguf.GGUFWriter(folder / "model.gguf", architecture)
    for key, value in keys.items():
        add = made.add_float32 if isinstance(value, float) else made.add_uint32
        add(f"{architecture}.{key}", value)
    made.add_tokenizer_model("no_vocab")
    return made


def finish(made, tensors):
    for name, tensor in tensors.items():
        made.add_tensor(name, tensor.detach().float().contiguous().numpy())
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def turned(weight, heads):
    """Halves of each head's rows interleaved."""
    first, second = weight.view(heads, 2, -1, weight.shape[1]).unbind(1)
    return torch.stack([first, second], 2).reshape(weight.shape)


def save_llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = random_weights(LlamaForCausalLM(config))
    w = model.state_dict()
    tensors = {
        "token_embd.weight": w["model.embed_tokens.weight"], "output_norm.weight": w["model.norm.weight"],
        "output.weight": w["lm_head.weight"],
    }  # fmt: skip
    names = {
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    for i in range(2):
        theirs = f"model.layers.{i}."
        tensors |= {f"blk.{i}.{a}.weight": w[f"{theirs}{b}.weight"] for a, b in names.items()}
        tensors[f"blk.{i}.attn_q.weight"] = turned(w[f"{theirs}self_attn.q_proj.weight"], 4)
        tensors[f"blk.{i}.attn_k.weight"] = turned(w[f"{theirs}self_attn.k_proj.weight"], 2)
    keys = {
        "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0, "vocab_size": 96,
    }  # fmt: skip
    finish(writer(folder, "llama", keys), tensors)
    return model


def save_mamba(folder, kind="Mamba", **sizes):
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, **sizes}
    config = getattr(transformers, f"{kind}Config")(tie_word_embeddings=True, **sizes)
    model = random_weights(getattr(transformers, f"{kind}ForCausalLM")(config))
    w = model.state_dict()
    two, inner = kind == "Mamba2", 64
    tensors = {"token_embd.weight": w["backbone.embeddings.weight"], "output_norm.weight": w["backbone.norm_f.weight"]}
    for i in range(2):
        theirs, b = f"backbone.layers.{i}.", f"blk.{i}."
        m = {name.removeprefix(f"{theirs}mixer."): t for name, t in w.items() if name.startswith(f"{theirs}mixer.")}
        decay = -m["A_log"].exp()
        tensors |= {
            f"{b}attn_norm.weight": w[f"{theirs}norm.weight"], f"{b}ssm_in.weight": m["in_proj.weight"],
            f"{b}ssm_conv1d.weight": m["conv1d.weight"].squeeze(1), f"{b}ssm_conv1d.bias": m["conv1d.bias"],
            f"{b}ssm_out.weight": m["out_proj.weight"], f"{b}ssm_a": decay[:, None] if two else decay,
            f"{b}ssm_d": m["D"][:, None] if two else m["D"],
            f"{b}ssm_dt.bias": m["dt_bias"] if two else m["dt_proj.bias"],
        }  # fmt: skip
        if two:
            tensors[f"{b}ssm_norm.weight"] = m["norm.weight"].view(2, -1)
        else:
            tensors |= {f"{b}ssm_x.weight": m["x_proj.weight"], f"{b}ssm_dt.weight": m["dt_proj.weight"]}
    keys = {
        "context_length": 128, "embedding_length": 32, "block_count": 2, "ssm.conv_kernel": 4, "ssm.inner_size": inner,
        "ssm.state_size": 8, "ssm.time_step_rank": 8 if two else 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": 96, **({"ssm.group_count": 2} if two else {}),
    }  # fmt: skip
    finish(writer(folder, kind.lower(), keys), tensors)
    return model


def save_mamba2(folder):
    return save_mamba(folder, "Mamba2", num_heads=8, head_dim=8, n_groups=2, chunk_size=8)


for _name, _save in {"llama": save_llama, "mamba": save_mamba, "mamba2": save_mamba2}.items():
    # A of Mamba goes through a logarithm and back, so its last digit may differ.
    _options = {"file": "model.gguf", "package": "gguf", "folds": _name != "llama"}
    peer(Peer("gguf", _name, _save, lambda m, given: m(**given).logits, tokens(96), **_options))
