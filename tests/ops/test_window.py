"""Window attention in blocks against the loop, the dense op and transformers."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LongformerConfig, MistralConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.mistral.modeling_mistral import MistralModel

from zoo.errors import ConfigError
from zoo.ops.attention import attention
from zoo.ops.reference import window_attention_reference
from zoo.ops.rotary import RotaryConfig, apply_rotary, rotary_tables
from zoo.ops.window import window_attention

D = torch.float64
POISON = float("nan")


def qkv(b=2, h=4, g=2, length=40, s=40, k=4, v=3, dtype=D):
    return [torch.randn(b, n, t, d, dtype=dtype) for n, t, d in ((h, length, k), (g, s, k), (g, s, v))]


def some_mask(kind, b, s):
    mask = torch.ones(b, s, dtype=torch.bool)
    if kind == "left":
        mask[0, : s // 3] = False
    elif kind == "right":
        mask[0, -(s // 3) :] = False
    elif kind == "interior":
        mask = torch.rand(b, s) < 0.6
    elif kind == "nothing":
        mask[0] = False
    return mask


def some_ids(b, s):
    return (torch.rand(b, s) < 0.15).long().cumsum(-1) % 3


def poisoned(q, k, v, mask):
    pad = ~mask[:, None, :, None]
    return q.masked_fill(pad[:, :, -q.shape[2] :], POISON), k.masked_fill(pad, POISON), v.masked_fill(pad, POISON)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 17, 33, 64])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize(("length", "old"), [(40, 0), (40, 5), (21, 30), (3, 37), (1, 39), (1, 0)])
def test_agrees_with_the_loop(causal, window, sinks, length, old):
    torch.manual_seed(window + length)
    tensors = qkv(length=length, s=length + old)
    options = {"causal": causal, "window": window, "sinks": sinks}
    torch.testing.assert_close(window_attention(*tensors, **options), window_attention_reference(*tensors, **options))


@pytest.mark.parametrize("seed", range(80))
def test_everything_together(seed):
    """Random combinations of all options, with poison in the padding, against the loop."""
    torch.manual_seed(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), ()))]  # noqa: E731
    length, old, g = pick(1, 7, 20, 45), pick(0, 0, 4, 11), pick(1, 2)
    s = length + old
    q, k, v = qkv(h=g * pick(1, 3), g=g, length=length, s=s)
    mask = pick(None, some_mask(pick("left", "right", "interior", "nothing"), 2, s))
    options = {
        "window": pick(1, 3, 8, 19),
        "sinks": pick(0, 1, 4, 50),
        "causal": pick(True, True, False),
        "scale": pick(None, 0.7),
        "mask_BS": mask,
        "segments_BS": pick(None, some_ids(2, s)),
    }
    if options["segments_BS"] is not None and not options["causal"]:
        options["sinks"] = min(options["sinks"], options["window"])
    if pick(True, False):
        options["globals_BS"] = torch.rand(2, s) < 0.1
    elif pick(True, False):
        options["sink_kv"] = (torch.randn(2, g, 3, 4, dtype=D), torch.randn(2, g, 3, 3, dtype=D))
        options["positions_BL"] = pick(None, torch.randint(0, 9, (2, 1)) + torch.arange(length))
    expected = window_attention_reference(q, k, v, **options)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    y = window_attention(*(tensors if mask is None else poisoned(*tensors, mask)), **options)
    torch.testing.assert_close(y, expected)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.square().sum(), tensors))
    if mask is not None:
        assert (y.masked_select(~mask[:, None, old:, None]) == 0).all()


@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(kind, causal):
    torch.manual_seed(0)
    q, k, v = qkv()
    mask = some_mask(kind, 2, 40)
    options = {"window": 5, "sinks": 2, "causal": causal}
    y = window_attention(*poisoned(q, k, v, mask), mask_BS=mask, **options)
    for b in range(2):
        alone = window_attention(*(x[b : b + 1, :, mask[b]] for x in (q, k, v)), **options)
        torch.testing.assert_close(y[b : b + 1, :, mask[b]], alone)


def test_packed_sequences_equal_separate_ones():
    torch.manual_seed(0)
    tensors = qkv(b=1)
    ends = (0, 3, 4, 25, 40)
    ids = torch.cat([torch.full((1, b - a), i % 2) for i, (a, b) in enumerate(itertools.pairwise(ends))], 1)
    options = {"window": 6, "sinks": 2}
    packed = window_attention(*tensors, segments_BS=ids, **options)
    separate = [window_attention(*(x[:, :, a:b] for x in tensors), **options) for a, b in itertools.pairwise(ends)]
    torch.testing.assert_close(packed, torch.cat(separate, 2))


@pytest.mark.parametrize("cuts", [(1, 2, 3), (10,), (5, 25), tuple(range(1, 40))])
def test_a_state_of_window_and_sinks_is_enough(cuts):
    """Any split, with window - 1 keys and the first tokens carried, equals the whole."""
    torch.manual_seed(0)
    window, sinks = 8, 3
    q, k, v = qkv()
    whole = window_attention(q, k, v, window=window, sinks=sinks)
    parts = []
    for a, b in itertools.pairwise((0, *cuts, 40)):
        old = max(0, a - (window - 1))
        parts.append(
            window_attention(
                q[:, :, a:b],
                k[:, :, old:b],
                v[:, :, old:b],
                window=window,
                sinks=sinks,
                sink_kv=(k[:, :, :sinks], v[:, :, :sinks]),
                positions_BL=torch.arange(a, b)[None],
            )
        )
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_nothing_depends_on_later_tokens():
    torch.manual_seed(0)
    q, k, v = qkv()
    marks = torch.rand(2, 40) < 0.1
    early = window_attention(q, k, v, window=5, sinks=30, globals_BS=marks)[:, :, :20]
    q[:, :, 20:], k[:, :, 20:], v[:, :, 20:] = 9.0, 9.0, 9.0
    late = window_attention(q, k, v, window=5, sinks=30, globals_BS=marks)[:, :, :20]
    torch.testing.assert_close(late, early, rtol=0, atol=1e-15)


def test_a_wide_window_is_plain_attention():
    torch.manual_seed(0)
    q, k, v = qkv()
    torch.testing.assert_close(window_attention(q, k, v, window=40, sinks=4), attention(q, k, v))
    # 39 leaves out one key, for the last query alone.
    almost = window_attention(q, k, v, window=39)
    torch.testing.assert_close(almost[:, :, :-1], attention(q, k, v)[:, :, :-1])
    assert not torch.allclose(almost[:, :, -1], attention(q, k, v)[:, :, -1])


def test_bounded_globals():
    torch.manual_seed(0)
    q, k, v = qkv()
    marks = torch.zeros(2, 40, dtype=torch.bool)
    marks[0, [3, 17, 30]] = True
    marks[1, 5] = True
    exact = window_attention(q, k, v, window=4, globals_BS=marks)
    torch.testing.assert_close(window_attention(q, k, v, window=4, globals_BS=marks, max_globals=9), exact)
    first_two = marks.clone()
    first_two[0, 30] = False
    torch.testing.assert_close(
        window_attention(q, k, v, window=4, globals_BS=marks, max_globals=2),
        window_attention_reference(q, k, v, window=4, globals_BS=first_two),
    )


def test_gradients():
    torch.manual_seed(0)
    tensors = [x.requires_grad_() for x in qkv(b=1, h=2, g=1, length=19, s=20, k=2, v=2)]
    mask, ids = torch.rand(1, 20) < 0.7, some_ids(1, 20)
    sink_kv = tuple(torch.randn(1, 1, 2, 2, dtype=D, requires_grad=True) for _ in range(2))
    check = torch.autograd.gradcheck
    assert check(lambda *x: window_attention(*x, window=3, sinks=2), tensors, fast_mode=True)
    assert check(
        lambda *x: window_attention(*x, window=3, sinks=2, mask_BS=mask, segments_BS=ids),
        tensors,
        fast_mode=True,
    )
    assert check(
        lambda q, k, v, *s: window_attention(q, k, v, window=3, sink_kv=s), [*tensors, *sink_kv], fast_mode=True
    )
    marks = torch.arange(20)[None] % 7 == 2
    assert check(lambda *x: window_attention(*x, window=3, globals_BS=marks), tensors, fast_mode=True)


def test_bfloat16_is_as_good_as_plain_torch():
    torch.manual_seed(0)
    q, k, v = qkv(h=2, g=2, length=96, s=96, k=32, v=32, dtype=torch.float32)
    exact = attention(q, k, v, window=16)
    low = [x.bfloat16() for x in (q, k, v)]
    distance = torch.arange(96)[:, None] - torch.arange(96)
    scores = (low[0] @ low[1].mT * 32**-0.5).masked_fill((distance < 0) | (distance >= 16), float("-inf"))
    plain = (scores.softmax(-1) @ low[2] - exact).abs().max()
    y = window_attention(*low, window=16)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 2 * plain
    with torch.autocast("cpu", torch.bfloat16):
        y = window_attention(q, k, v, window=16, sinks=1)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("extra", [{}, {"sinks": 4}, {"sinks": 4, "segments": True}, {"causal": False}])
def test_cost_grows_with_the_length_not_its_square(extra):
    extra = dict(extra)
    packed = extra.pop("segments", False)

    def flops(length):
        tensors = [x.requires_grad_() for x in qkv(b=1, length=length, s=length, k=8, v=8, dtype=torch.float32)]
        ids = torch.arange(length)[None] // 50 if packed else None
        with FlopCounterMode(display=False) as counter:
            window_attention(*tensors, window=32, segments_BS=ids, **extra).sum().backward()
        return counter.get_total_flops()

    assert flops(4096) == 4 * flops(1024)
    # Forward and backward are 2 + 4 products; a query meets at most twice its window, on each side, and the sinks.
    keys = (2 if extra.get("causal", True) else 3) * 32 + 4
    assert flops(1024) <= 6 * 2 * 4 * 1024 * keys * 8


def test_agrees_with_mistral():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=11,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        attn_implementation="eager",
    )
    layer = MistralModel(config).double().eval().layers[0].self_attn
    caught = {}
    model = MistralModel(config).double().eval()
    layer = model.layers[0].self_attn
    layer.register_forward_hook(lambda m, a, o, **_: caught.update(y=o[0]))
    layer.register_forward_pre_hook(lambda m, a, kw: caught.update(x=kw["hidden_states"]), with_kwargs=True)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        model(torch.randint(11, (2, 30)), attention_mask=mask, position_ids=torch.arange(30)[None], use_cache=False)
        heads = [
            p(caught["x"]).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        ]
        tables = rotary_tables(RotaryConfig.from_transformers(config, 8), 8, torch.arange(30)[None])
        q, k = (apply_rotary(x, *tables) for x in heads[:2])
        y = window_attention(q, k, heads[2], window=config.sliding_window, mask_BS=mask.bool())
        y = layer.o_proj(y.transpose(1, 2).flatten(-2))
    real = mask.bool()
    torch.testing.assert_close(y[real], caught["y"][real], atol=1e-7, rtol=0)  # its rotary tables are float32


def test_agrees_with_longformer():
    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=32, num_attention_heads=4, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0).double().eval()
    for name in ("query", "key", "value"):  # one projection for local and global queries, as ours
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    x = torch.randn(2, 40, 32, dtype=D)  # a multiple of the window, as it requires
    mask, marks = some_mask("right", 2, 40), torch.zeros(2, 40, dtype=torch.bool)
    marks[:, 0], marks[1, 20] = True, True
    code = torch.where(mask, torch.where(marks, 10000.0, 0.0), -10000.0).double()
    with torch.no_grad():
        expected = theirs(x, code, is_index_masked=code < 0, is_index_global_attn=code > 0, is_global_attn=True)[0]
        heads = [p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (theirs.query, theirs.key, theirs.value)]
        y = window_attention(*heads, window=8 // 2 + 1, causal=False, mask_BS=mask, globals_BS=marks)
    torch.testing.assert_close(y.transpose(1, 2).flatten(-2)[mask], expected[mask])


def test_refuses_what_does_not_fit():
    q, k, v = qkv()
    with pytest.raises(ConfigError, match="window is 0"):
        window_attention(q, k, v, window=0)
    with pytest.raises(ConfigError, match="sinks is -1"):
        window_attention(q, k, v, window=4, sinks=-1)
    with pytest.raises(ConfigError, match="5 sinks but a window of 4"):
        window_attention(q, k, v, window=4, sinks=5, causal=False, segments_BS=some_ids(2, 40))
    marks = torch.zeros(2, 40, dtype=torch.bool)
    with pytest.raises(ConfigError, match="exclude each other"):
        window_attention(q, k, v, window=4, globals_BS=marks, sink_kv=(k[:, :, :2], v[:, :, :2]))
    with pytest.raises(ConfigError, match="sink_kv"):
        window_attention(q, k, v, window=4, sink_kv=(k[:, :1, :2], v[:, :1, :2]))
    with pytest.raises(ConfigError, match="positions_BL has shape"):
        window_attention(q, k, v, window=4, sink_kv=(k[:, :, :2], v[:, :, :2]), positions_BL=torch.arange(39)[None])


@pytest.mark.slow
def test_compiles_without_breaks():
    torch.manual_seed(0)
    tensors = qkv()
    mask, ids = some_mask("interior", 2, 40), some_ids(2, 40)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    for options in (
        {"sinks": 2},
        {"sinks": 2, "mask_BS": mask, "segments_BS": ids},
        {"globals_BS": ids == 2, "max_globals": 40, "causal": False},
        {"sink_kv": (tensors[1][:, :, :2], tensors[2][:, :, :2]), "mask_BS": mask},
    ):
        expected = window_attention(*tensors, window=6, **options)
        torch.testing.assert_close(compiled(*tensors, window=6, **options), expected)
