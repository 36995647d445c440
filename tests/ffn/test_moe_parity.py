"""Mixtures of experts against transformers: same weights; logits, gradients, losses, dropped tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import zoo
from zoo.ffn.moe import MoE, MoEConfig
from zoo.ffn.routing import z_loss

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "output_router_logits": True,
}  # fmt: skip


def mixtral(layers):
    config = MixtralConfig(
        **SIZES, num_hidden_layers=layers, num_key_value_heads=2, intermediate_size=64, num_local_experts=8,
        num_experts_per_tok=2, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        router_aux_loss_coef=0.02,
    )  # fmt: skip
    return MixtralForCausalLM, config, "mixtral-tiny"


def olmoe(layers):
    config = OlmoeConfig(
        **SIZES, num_hidden_layers=layers, num_key_value_heads=4, intermediate_size=24, num_experts=16,
        num_experts_per_tok=4, norm_topk_prob=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, router_aux_loss_coef=0.01,
    )  # fmt: skip
    return OlmoeForCausalLM, config, "olmoe-tiny"


def qwen2_moe(layers):
    config = Qwen2MoeConfig(
        **SIZES, num_hidden_layers=layers, num_key_value_heads=2, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=2, shared_expert_intermediate_size=64, norm_topk_prob=False, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, router_aux_loss_coef=0.001,
    )  # fmt: skip
    return Qwen2MoeForCausalLM, config, "qwen2-moe-tiny"


NAMES = {
    "self_attn": "mixer", "input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm", "gate": "router",
    "shared_expert": "shared", "shared_experts": "shared", "shared_expert_gate": "shared_gate", "mlp": "ffn",
    "e_score_correction_bias": "balance_E", "classifier": "router",
}  # fmt: skip


def to_ours(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors (weights or gradients) under our names."""
    ours = {}
    for name, t in theirs.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj").replace("mlp.", "ffn.")
            gate, up = t.transpose(1, 2).chunk(2, -1)
            ours |= {f"{stem}gate_EIO": gate, f"{stem}up_EIO": up}
        elif name.endswith("experts.down_proj"):
            ours[name.replace("mlp.", "ffn.").replace("down_proj", "down_EIO")] = t.transpose(1, 2)
        else:
            name = ".".join(NAMES.get(part, part) for part in name.split(".")).replace("router.balance_E", "balance_E")
            ours[name] = t
    return ours


def pair(kind, layers=2, **overrides):
    cls, config, name = kind(layers)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(3)
    theirs = cls(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    ours = zoo.create_model(name, layers={"num_hidden_layers": layers}, **overrides)
    ours.load_state_dict(to_ours(theirs.state_dict()))
    return theirs, ours


def close(got, expected, tolerance):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def rows():
    ids_BL, mask_BL = torch.randint(1, 256, (2, 33)), torch.ones(2, 33, dtype=torch.long)
    mask_BL[1, 21:] = 0
    return ids_BL, mask_BL, ids_BL.masked_fill(mask_BL == 0, -100)


@pytest.mark.parametrize("kind", [mixtral, olmoe, qwen2_moe])
def test_logits_and_gradients(kind):
    theirs, ours = pair(kind)
    ids_BL, mask_BL, labels_BL = rows()
    expected, got = (m(ids_BL, attention_mask=mask_BL).logits[mask_BL.bool()] for m in (theirs.eval(), ours.eval()))
    close(got, expected, 1e-5)
    for model in (theirs, ours):  # without the balancing loss: theirs pools the layers, see below
        logits = model(ids_BL, attention_mask=mask_BL).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_BL[:, 1:].flatten()).backward()
    gradients = to_ours({n: p.grad for n, p in theirs.named_parameters()})
    assert gradients.keys() == {n for n, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        close(p.grad, gradients[name], 1e-4)


@pytest.mark.parametrize("kind", [mixtral, olmoe, qwen2_moe])
def test_balancing_loss_of_each_layer(kind):
    theirs, ours = pair(kind)
    ids_BL, mask_BL, _ = rows()
    logits = theirs(ids_BL, attention_mask=mask_BL).router_logits
    ours.train()(ids_BL, attention_mask=mask_BL)
    for block, layer_NE in zip(ours.model.layers, logits, strict=True):
        c = block.ffn.config
        balance = load_balancing_loss_func((layer_NE,), c.num_experts, c.top_k, mask_BL)
        real_TE = layer_NE[mask_BL.flatten().bool()]
        z = real_TE.logsumexp(-1).square().mean()
        expected = c.balance_loss * balance + c.z_loss * z
        close(block.ffn.auxiliary_loss, expected, 1e-5)
        close(z_loss(layer_NE.view(2, 33, -1), mask_BL.bool()), z, 1e-5)


@pytest.mark.parametrize("kind", [mixtral, olmoe, qwen2_moe])
def test_loss_with_labels_is_theirs_for_one_layer(kind):
    theirs, ours = pair(kind, layers=1)
    if ours.model.layers[0].ffn.config.z_loss:
        c = ours.model.layers[0].ffn.config  # transformers has no z-loss in OLMoE
        ours.model.layers[0].ffn.config = c.model_copy(update={"z_loss": 0.0})
    ids_BL, mask_BL, labels_BL = rows()
    losses = [m.train()(ids_BL, attention_mask=mask_BL, labels=labels_BL).loss for m in (theirs, ours)]
    close(losses[1], losses[0], 1e-5)
    for loss in losses:
        loss.backward()
    gradients = to_ours({n: p.grad for n, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        close(p.grad, gradients[name], 1e-4)


def compare_layers(theirs, ours, x_BLD):
    """Outputs and gradients of two layers with the same weights."""
    leaves = [x_BLD.clone().requires_grad_() for _ in range(2)]
    expected, got = theirs(leaves[0]), ours(leaves[1])[0]
    close(got, expected, 1e-5)
    rows = torch.randn_like(got)
    (expected * rows).sum().backward()
    (got * rows).sum().backward()
    close(leaves[1].grad, leaves[0].grad, 1e-4)
    return got


def random_weights(module, std=0.2):
    with torch.no_grad():
        for t in module.state_dict().values():
            t.normal_(std=std)  # a layer by itself starts with whatever was in memory
    return module


def test_deepseek_v3_layer():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=32, moe_intermediate_size=12, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=2,
        n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = random_weights(DeepseekV3MoE(config))
    options = {
        "num_experts": 16, "hidden_size": 12, "top_k": 4, "scores": "sigmoid", "groups": 4, "top_groups": 2,
        "scale": 2.5, "shared_size": 24, "bias_rate": 0.001,
    }  # fmt: skip
    ours = MoE(MoEConfig(**options), 32)
    ours.load_state_dict(to_ours(theirs.state_dict()))
    assert theirs.gate.e_score_correction_bias.abs().min() > 0
    compare_layers(theirs, ours.eval(), torch.randn(2, 40, 32))
    gradients = to_ours({n: p.grad for n, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        close(p.grad, gradients[name], 1e-4)


def switch(capacity):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    config = SwitchTransformersConfig(
        d_model=32, d_ff=48, num_experts=4, expert_capacity=capacity, router_jitter_noise=0.0, dropout_rate=0.0
    )
    theirs = random_weights(SwitchTransformersSparseMLP(config))
    options = {"num_experts": 4, "hidden_size": 48, "top_k": 1, "normalize": False, "gated": False, "bias": False}
    ours = MoE(MoEConfig(**options, activation="relu", capacity=capacity, balance_loss=1.0), 32)
    with torch.no_grad():
        ours.router.weight.copy_(theirs.router.classifier.weight)
        for e, expert in enumerate(theirs.experts.values()):
            ours.experts.up_EIO[e] = expert.wi.weight.T
            ours.experts.down_EIO[e] = expert.wo.weight.T
    return theirs, ours


@pytest.mark.parametrize("capacity", [3, 64])
def test_switch_layer(capacity):
    theirs, ours = switch(capacity)
    got = compare_layers(theirs, ours.eval(), torch.randn(2, 20, 32))
    dropped = (got == 0).all(-1)
    assert bool(dropped.any()) == (capacity == 3)
    for e, expert in enumerate(theirs.experts.values()):
        close(ours.experts.up_EIO.grad[e], expert.wi.weight.grad.T, 1e-4)
        close(ours.experts.down_EIO.grad[e], expert.wo.weight.grad.T, 1e-4)
    close(ours.router.weight.grad, theirs.router.classifier.weight.grad, 1e-4)


def test_switch_losses():
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        load_balancing_loss_func as switch_loss,
    )
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    theirs, ours = switch(64)
    x_BLD = torch.randn(1, 20, 32)  # one sequence: theirs balances each for itself
    _, _, logits = theirs.router(x_BLD)
    ours.train()(x_BLD)
    close(ours.auxiliary_loss, switch_loss(logits.softmax(-1), logits.argmax(-1)), 1e-5)
    close(z_loss(logits, None), router_z_loss_func(logits), 1e-5)


@pytest.mark.parametrize("priority", ["choice", "score"])
@pytest.mark.parametrize("capacity", [3, 64])
def test_top2_router_with_priorities(priority, capacity):
    """Which token goes where, and with which weight, by the router of NLLB-MoE, whose rules are those of GShard."""
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    config = NllbMoeConfig(
        d_model=16, num_experts=4, expert_capacity=capacity, second_expert_policy="all", router_bias=False,
        normalize_router_prob_before_dropping=True, batch_prioritized_routing=priority == "score",
        moe_eval_capacity_token_fraction=-1.0,
    )  # fmt: skip
    theirs = NllbMoeTop2Router(config).eval()
    options = {"num_experts": 4, "hidden_size": 8, "top_k": 2, "capacity": capacity, "priority": priority}
    ours = MoE(MoEConfig(**options), 16).eval()
    ours.router.load_state_dict(random_weights(theirs.classifier, 1.0).state_dict())
    x_LD = torch.randn(20, 16)
    _, expected_LE, _ = theirs(x_LD)
    pairs, _ = ours._route(ours.logits(x_LD[None]), None, None, None)
    got_LE = torch.zeros(20, 5).index_put((pairs.token_P, pairs.expert_P), pairs.weight_P, accumulate=True)
    close(got_LE[:, :4], expected_LE, 1e-5)
    assert bool((expected_LE.sum(-1) < 0.999).any()) == (capacity == 3)


def test_gshard_loss():
    """Formula 6 of the paper times E^2: mean share of first choices times mean probability."""
    ours = MoE(MoEConfig(num_experts=4, hidden_size=8, top_k=2, balance_loss=1.0, balance_first=True), 16).train()
    x_BLD = torch.randn(2, 20, 16)
    ours(x_BLD)
    p_NE = ours.router(x_BLD).softmax(-1).flatten(0, 1)
    share_E = torch.nn.functional.one_hot(p_NE.argmax(-1), 4).float().mean(0)
    close(ours.auxiliary_loss, 16 * (share_E * p_NE.mean(0)).mean(), 1e-5)
