"""GGUF files of transformers' models and of RWKV's, as llama.cpp's converter (conversion/*.py) writes them.

Names are from the package gguf and its map of everybody's names; keys and the order of rows are done here by hand.
What llama.cpp itself makes of our files is in tests/convert/layouts/test_gguf.py.
"""

from __future__ import annotations

import torch

from peers import Peer, peer, random_weights, tokens
from peers.rwkv import LAYERS, channel_mix_6, channel_mix_7, draw, run, shapes_6, shapes_7, time_mix_6, time_mix_7

V = 96
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
KEYS = {
    "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0, "vocab_size": V,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2}


def write(folder, architecture, keys, tensors, blocks=2):
    """A file of tensors under somebody's names."""
    import gguf

    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, blocks)
    made = gguf.GGUFWriter(folder / "model.gguf", architecture)
    for key, value in keys.items():
        add = {bool: made.add_bool, float: made.add_float32, str: made.add_string, list: made.add_array}
        add.get(type(value), made.add_uint32)(f"{architecture}.{key}", value)
    made.add_tokenizer_model("no_vocab")
    for theirs, tensor in tensors.items():
        name = theirs if theirs.startswith(("blk.", "rope_")) else names.get_name(theirs, (".weight", ".bias"))
        assert name is not None, theirs
        if not name.endswith((".weight", ".bias", ".ssm_a", ".ssm_d", ".ffn_norm")):
            name += ".weight"
        made.add_tensor(name, tensor.detach().float().contiguous().numpy())
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def turned(t, heads):
    """Halves of each head's rows interleaved."""
    return t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def changed(name, t, turn, groups):
    """What the converter does to a tensor; several where experts are stacked with gates and ups in one."""
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj": t.chunk(2, 1)[0], f"{stem}up_proj": t.chunk(2, 1)[1]}
    if turn and "self_attn.q_proj" in name:
        t = turned(t, 4)
    elif turn and "self_attn.k_proj" in name:
        t = turned(t, 2)
    elif name.endswith("conv1d.weight"):
        t = t.squeeze(1)
    elif name.endswith(".A_log"):
        t = -t.exp()
    elif "query_key_value" in name:  # head by head there
        t = t.unflatten(0, (4, 3, -1)).transpose(0, 1).flatten(0, 2)
    elif name.endswith("shared_expert_gate.weight"):
        t = t.squeeze(0)
    elif name.endswith((".c_attn.weight", ".c_fc.weight", ".c_proj.weight")):  # transposed in GPT-2
        t = t.T
    if groups and name.endswith((".A_log", ".D")):
        t = t[:, None]
    if groups and name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
        t = t.view(groups, -1)
    return {name.replace(".dt_bias", ".dt_proj.bias"): t}


def saver(
    kind, architecture, keys, *, model_class="ForCausalLM", turn=False, groups=0, extra=None, options=None, **sizes
):
    def save(folder):
        import transformers

        config = getattr(transformers, f"{kind}Config")(**sizes)
        model = random_weights(getattr(transformers, kind + model_class)(config, **(options or {})))
        found = {}
        for name, t in model.state_dict().items():
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                found |= changed(name, t, turn, groups)
        write(folder, architecture, keys, {**found, **(extra() if extra else {})}, keys["block_count"])
        return model

    return save


def factors():
    """As of Llama 3.2: heads of 8 with wavelengths of 6, 2e3, 9e4 and more positions."""
    return {"rope_freqs.weight": torch.tensor([1.0, 1.0, 8.0, 8.0])}


def odd_factors():
    return {"rope_freqs.weight": torch.tensor([1.0, 1.5, 2.0, 3.0])}


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e6, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
ODD = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0], "factor": 1.0,
    "long_factor": [1.0, 1.5, 2.0, 3.0], "original_max_position_embeddings": 128,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
MOE = {**SIZES, "moe_intermediate_size": 20}
SSM = {"vocab_size": V, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
SSM_KEYS = {
    "context_length": 128, "embedding_length": 32, "block_count": 2, "vocab_size": V, "ssm.conv_kernel": 4,
    "ssm.inner_size": 64, "ssm.state_size": 8, "ssm.time_step_rank": 2, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
SSM2_KEYS = {**SSM_KEYS, "ssm.time_step_rank": 8, "ssm.group_count": 2}
HYBRID = {
    **SIZES, "num_hidden_layers": 3, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2,
}  # fmt: skip
HYBRID_KEYS = {**KEYS, **SSM2_KEYS, "block_count": 3}

for _family, _save in {
    "llama": saver("Llama", "llama", KEYS, turn=True, **SIZES),
    "llama-biases": saver("Llama", "llama", KEYS, turn=True, **SIZES, attention_bias=True, tie_word_embeddings=True),
    "llama-3.1": saver(
        "Llama", "llama", {**KEYS, "rope.freq_base": 5e6}, turn=True, extra=factors, **SIZES, rope_parameters=LLAMA3
    ),
    "llama-odd": saver("Llama", "llama", KEYS, turn=True, extra=odd_factors, **SIZES, rope_parameters=ODD),
    "llama-linear": saver(
        "Llama", "llama", {**KEYS, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, turn=True, **SIZES,
        rope_parameters=LINEAR,
    ),
    "qwen2": saver("Qwen2", "qwen2", KEYS, **SIZES),
    "qwen3": saver(
        "Qwen3", "qwen3", {**KEYS, "attention.key_length": 12, "attention.value_length": 12}, **SIZES, head_dim=12
    ),
    "gpt2": saver(
        "GPT2", "gpt2", {**KEYS, "attention.layer_norm_epsilon": 1e-5}, model_class="LMHeadModel", vocab_size=V,
        n_embd=32, n_layer=2, n_head=4, n_positions=128, n_inner=48, bos_token_id=1, eos_token_id=2,
    ),
    "gpt_neox": saver(
        "GPTNeoX", "gptneox",
        {**KEYS, "attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 4, "use_parallel_residual": True},
        **{key: size for key, size in SIZES.items() if key not in ("num_key_value_heads", "rms_norm_eps")},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "mixtral": saver(
        "Mixtral", "llama", {**KEYS, **EXPERT_KEYS, "rope.freq_base": 1e6}, turn=True, **SIZES, num_local_experts=4
    ),
    "olmoe": saver("Olmoe", "olmoe", {**KEYS, **EXPERT_KEYS}, **SIZES, **EXPERTS),
    "qwen2_moe": saver(
        "Qwen2Moe", "qwen2moe",
        {**KEYS, **EXPERT_KEYS, "expert_feed_forward_length": 20, "expert_shared_feed_forward_length": 40}, **MOE,
        **EXPERTS, shared_expert_intermediate_size=40,
    ),
    "qwen3_moe": saver(
        "Qwen3Moe", "qwen3moe", {**KEYS, **EXPERT_KEYS, "expert_feed_forward_length": 20}, **MOE, **EXPERTS, head_dim=8,
        norm_topk_prob=True,
    ),
    "mamba": saver("Mamba", "mamba", SSM_KEYS, **SSM, tie_word_embeddings=True),
    "falcon_mamba": saver(
        "FalconMamba", "mamba", {**SSM_KEYS, "ssm.dt_b_c_rms": True}, **SSM, mixer_rms_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "mamba2": saver(
        "Mamba2", "mamba2", SSM2_KEYS, groups=2, **SSM, num_heads=8, head_dim=8, n_groups=2, chunk_size=8,
        tie_word_embeddings=True,
    ),
    "bamba": saver(
        "Bamba", "granitehybrid",
        {**HYBRID_KEYS, "attention.head_count_kv": [0, 2, 0], "rope.scaling.finetuned": True}, turn=True, groups=2,
        **HYBRID, attn_layer_indices=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    ),
    "falcon_h1": saver(
        "FalconH1", "falcon-h1", {**HYBRID_KEYS, "rope.freq_base": 1e11}, groups=2, **HYBRID, mamba_d_ssm=64,
        mamba_rms_norm=True, mamba_norm_before_gate=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e11},
    ),
}.items():  # fmt: skip
    _name, _, _label = _family.partition("-")
    _options = {"file": "model.gguf", "package": "gguf", "label": _label}
    peer(Peer("gguf", _name, _save, lambda m, given: m(**given).logits, tokens(V), **_options))

BERT_KEYS = {
    "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "vocab_size": V,
    "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-12, "attention.causal": False, "pooling_type": 1,
}  # fmt: skip


_bert = {key: size for key, size in SIZES.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
_save = saver("Bert", "bert", BERT_KEYS, model_class="Model", options={"add_pooling_layer": False}, **_bert)
peer(
    Peer(
        "gguf", "bert", _save, lambda m, given: m(**given).last_hidden_state, tokens(V), greedy=False,
        file="model.gguf", package="gguf",
    )
)  # fmt: skip

# --- RWKV, from the tensors of the authors' files ---------------------------------------------------------------------

RWKV_KEYS = {
    "context_length": 1048576, "embedding_length": 32, "block_count": LAYERS, "feed_forward_length": 80,
    "attention.head_count": 0, "attention.layer_norm_epsilon": 1e-5, "wkv.head_size": 8, "vocab_size": 61,
}  # fmt: skip


def save_rwkv6(rescale, single=False):
    def save(folder):
        tensors = draw(shapes_6)
        found = {}
        for name, t in tensors.items():
            i = int(name.split(".")[1]) if name.startswith("blocks.") else 0
            t = t.squeeze() if t.dim() == 3 and t.shape[0] == 1 else t
            if name.endswith(("maa_w1", "decay_w1", "decay_w2")):
                t = t.T
            elif name.endswith("maa_w2"):
                t = t.transpose(1, 2)
            elif rescale and name.endswith(("att.output.weight", "ffn.value.weight")):
                t = t / 2 ** (i // rescale)
            stem = name.replace("att.", "attention.").replace("ffn.", "feed_forward.").replace("ln0", "pre_ln")
            stem = {"emb.weight": "rwkv.embeddings.weight", "head.weight": "head.weight"}.get(name, f"rwkv.{stem}")
            found[stem] = t
        for i in range(0 if single else LAYERS):
            one = [found.pop(f"rwkv.blocks.{i}.attention.time_maa_{letter}") for letter in "wkvrg"]
            found[f"blk.{i}.time_mix_lerp_fused.weight"] = torch.stack(one)[:, None, None]
        keys = {**RWKV_KEYS, "time_mix_extra_dim": 6, "time_decay_extra_dim": 7, "rescale_every_n_layers": rescale}
        write(folder, "rwkv6", keys, found, LAYERS)
        return tensors

    return save


def save_rwkv7(folder):
    tensors = draw(shapes_7)
    found = {}
    for name, t in tensors.items():
        t = t.squeeze() if t.dim() == 3 else t
        if name.startswith("blocks.") and name.split(".")[3] in {f"{a}{n}" for a in "wavg" for n in "12"}:
            t = t.T
        elif name.endswith("r_k"):
            t = t.flatten()
        stem = name.replace("blocks.", "layers.").replace("att.", "attention.").replace("ffn.", "feed_forward.")
        stem = stem.replace("layers.0.ln0", "pre_ln")
        stem = {"emb.weight": "model.embeddings.weight", "head.weight": "head.weight"}.get(name, f"model.{stem}")
        found[stem] = t
        if name.startswith("blocks.0.att.a") and name[-1] in "012":
            found[stem.replace("attention.a", "attention.v")] = t  # which nothing uses
    for i in range(LAYERS):
        one = [found.pop(f"model.layers.{i}.attention.x_{letter}") for letter in "rwkvag"]
        found[f"blk.{i}.time_mix_lerp_fused.weight"] = torch.stack(one)[:, None, None]
    ranks = {"decay": 6, "iclr": 7, "value_residual_mix": 5, "gate": 9}
    keys = {**RWKV_KEYS, **{f"attention.{name}_lora_rank": rank for name, rank in ranks.items()}}
    write(folder, "rwkv7", keys, found, LAYERS)
    return tensors


_options = {"file": "model.gguf", "package": "gguf"}
_run_6 = run(time_mix_6, channel_mix_6)
peer(Peer("gguf", "rwkv6", save_rwkv6(0), _run_6, tokens(61, 12), **_options))
# A file whose layers are halved goes out without that.
peer(Peer("gguf", "rwkv6", save_rwkv6(1), _run_6, tokens(61, 12), label="rescaled", folds=True, **_options))
peer(Peer("gguf", "rwkv7", save_rwkv7, run(time_mix_7, channel_mix_7), tokens(61, 12), **_options))
