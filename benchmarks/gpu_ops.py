"""Milliseconds of the ops on a GPU: as the dispatch chooses, in the portable form, and kernels called directly.

    python benchmarks/gpu_ops.py                                      # ops, into benchmarks/results/gpu_ops.csv
    python benchmarks/gpu_ops.py --only "scalar decay" --widths 1024 --lengths 2048
    python benchmarks/gpu_ops.py --models                             # training steps and decoding of whole models

Heads of 64 (delta rules 128), `--tokens` in a batch whatever the length. Inputs lie as mixers make them: (B, L, H, K).
Times are of CUDA events around runs of at least two milliseconds; the candidates take turns, and the median of
`--rounds` counts. Softmax attention (torch's flash kernel) is the yardstick. float32 is measured with tf32 allowed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import backends
from zoo.ops.attention import attention
from zoo.ops.conv import short_conv
from zoo.ops.delta import delta_rule
from zoo.ops.diagonal import selective_scan
from zoo.ops.generalized_delta import generalized_delta_rule
from zoo.ops.recurrence import linear_recurrence
from zoo.ops.vector_delta import vector_delta_rule
from zoo.ops.window import window_attention
from zoo.ops.wkv import wkv

KERNELS = ("fla", "triton", "flash_attn", "causal_conv1d", "flex")
WINDOW = 512
Candidate = Callable[[], Tensor]


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def build(op: str, B: int, L: int, width: int, dtype: torch.dtype) -> tuple[dict[str, Candidate], list[Tensor]]:
    """Implementations of an op by name, each giving its output, and the leaves that want gradients."""
    K = 128 if op in ("delta", "delta, decay", "vector delta") else 64
    H = width // K

    def leaf(*shape: int, kind: torch.dtype = dtype, make: Callable[..., Tensor] = torch.randn) -> Tensor:
        return make(*shape, device="cuda").to(kind).requires_grad_()

    def fla(name: str, *args: Tensor, **options) -> Candidate | None:
        if not backends._importable("fla"):
            return None
        module, function = name.split(".")
        kernel = getattr(__import__(f"fla.ops.{module}", fromlist=[function]), function)
        return lambda: kernel(*args, output_final_state=True, **options)[0]

    if op in ("short conv", "selective scan", "wkv"):
        return build_channelwise(op, B, L, width, dtype, leaf)
    q, v = leaf(B, L, H, K), leaf(B, L, H, K)
    k = F.normalize(leaf(B, L, H, K).detach().float(), dim=-1).to(dtype).requires_grad_()
    gate = (-torch.rand(B, L, H, device="cuda")).requires_grad_()
    gates = (-0.6 * torch.rand(B, L, H, K, device="cuda")).requires_grad_()
    beta = torch.rand(B, L, H, device="cuda").requires_grad_()
    removal = F.normalize(leaf(B, L, H, K).detach().float(), dim=-1).to(dtype).requires_grad_()
    along = (removal.detach() * torch.rand_like(removal)).requires_grad_()
    constant = torch.log1p(-(2.0 ** (-5.0 - torch.arange(H, device="cuda"))))

    def ours(function: Callable, *rest: Tensor, **options) -> Candidate:
        return lambda: function(*heads_first(q, k, v, *rest), **options)[0]

    one = {"scale": 1.0}
    candidates: dict[str, tuple[Candidate, Candidate | None, list[Tensor]]] = {
        "no decay": (ours(linear_recurrence), fla("simple_gla.chunk_simple_gla", q, k, v, **one), []),
        "no decay, normalized": (
            lambda: linear_recurrence(*heads_first(q.sigmoid(), k.sigmoid(), v), normalize=True)[0], None, [],
        ),
        "constant decay": (
            ours(linear_recurrence, log_decay=constant),
            fla("simple_gla.chunk_simple_gla", q, k, v, None, constant, **one), [],
        ),
        "scalar decay": (
            ours(linear_recurrence, gate), fla("simple_gla.chunk_simple_gla", q, k, v, gate, **one), [gate],
        ),
        "vector decay": (ours(linear_recurrence, gates), fla("gla.chunk_gla", q, k, v, gates, **one), [gates]),
        "delta": (
            ours(delta_rule, beta),
            None if dtype == torch.float32 else fla("delta_rule.chunk_delta_rule", q, k, v, beta, **one), [beta],
        ),
        "delta, decay": (
            ours(delta_rule, beta, gate),
            fla("gated_delta_rule.chunk_gated_delta_rule", q, k, v, gate, beta, **one), [beta, gate],
        ),
        "vector delta": (
            ours(vector_delta_rule, beta, gates), fla("kda.chunk_kda", q, k, v, gates, beta, **one), [beta, gates],
        ),
        "generalized delta": (
            ours(generalized_delta_rule, removal, along, gates),
            fla("generalized_delta_rule.chunk_dplr_delta_rule", q, k, v, removal, along, gates, **one),
            [removal, along, gates],
        ),
        "softmax attention": (lambda: attention(*heads_first(q, k, v)), None, []),
        f"window of {WINDOW}": (lambda: window_attention(*heads_first(q, k, v), window=WINDOW), None, []),
    }  # fmt: skip
    run, direct, gradients = candidates[op]
    out = {"zoo": run, "portable": without_kernels(run)} | ({"kernel alone": direct} if direct else {})
    if op.startswith(("softmax", "window")):
        out["sdpa, all keys"] = lambda: F.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True)
    if op.startswith("window"):
        out["flex, compiled"] = flex_window(q, k, v)
    return out, [q, k, v, *gradients]


def flex_window(q: Tensor, k: Tensor, v: Tensor) -> Candidate:
    """The window by torch's FlexAttention, whose block mask is made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b, h, i, j):
        return (i >= j) & (i - j < WINDOW)

    blocks = create_block_mask(near, None, None, q.shape[1], q.shape[1], device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda: attend(*heads_first(q, k, v), block_mask=blocks)


def build_channelwise(op, B: int, L: int, width: int, dtype: torch.dtype, leaf):
    """Ops on channels: the same as `build`. The scan has 16 states, on twice the width, as Mamba-1 has."""
    if op == "wkv":
        k, v, rate, bonus = leaf(B, L, width), leaf(B, L, width), leaf(width, make=torch.rand), leaf(width)
        run, leaves = lambda: wkv(k, v, rate, bonus)[0], [k, v, rate, bonus]
    elif op == "short conv":
        x, weight = leaf(B, L, width), leaf(width, 4, kind=torch.float32)
        run, leaves = lambda: short_conv(x, weight, activation="silu")[0], [x, weight]
    else:
        x, dt = leaf(B, L, 2 * width), leaf(B, L, 2 * width, kind=torch.float32, make=torch.rand)
        inputs, outputs = leaf(B, L, 16), leaf(B, L, 16)
        A = (-torch.arange(1.0, 17.0, device="cuda").expand(2 * width, 16)).contiguous().requires_grad_()
        run, leaves = lambda: selective_scan(x, dt, A, inputs, outputs)[0], [x, dt, A, inputs, outputs]
    return {"zoo": run, "portable": without_kernels(run)}, leaves


OPS = (
    "softmax attention", f"window of {WINDOW}", "no decay", "no decay, normalized", "constant decay", "scalar decay",
    "vector decay", "delta", "delta, decay", "vector delta", "generalized delta", "wkv", "short conv", "selective scan",
)  # fmt: skip


SOME = ("softmax attention", "scalar decay", "delta, decay")


def without_kernels(run: Candidate) -> Candidate:
    def portable() -> Tensor:
        with backends.without(*KERNELS):
            return run()

    return portable


def forward(run: Candidate, leaves: list[Tensor], gradient: Tensor) -> None:
    with torch.no_grad():
        run()


def forward_backward(run: Candidate, leaves: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(run(), leaves, gradient)


def milliseconds(work: Callable[[], None], times: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / times


def measure(candidates: dict[str, Candidate], leaves: list[Tensor], rounds: int) -> dict[str, dict[str, float]]:
    """name -> median milliseconds forward, and forward + backward. What cannot run is left out."""
    out: dict[str, dict[str, float]] = {}
    for column, how in (("forward_ms", forward), ("forward_backward_ms", forward_backward)):
        taken: dict[str, list[float]] = {}
        works, times = {}, {}
        for name, run in candidates.items():
            try:
                gradient = torch.randn_like(run())
                works[name] = lambda run=run, gradient=gradient, how=how: how(run, leaves, gradient)
                for _ in range(3):
                    once = milliseconds(works[name], 1)
                times[name] = max(1, int(2 / once))
            except RuntimeError as error:  # out of memory, or refused by the package
                print(f"  {name}: {str(error).splitlines()[0][:150]}")
                works.pop(name, None)
                torch.cuda.empty_cache()
        for _ in range(rounds):
            for name, work in works.items():
                taken.setdefault(name, []).append(milliseconds(work, times[name]))
        for name, ms in taken.items():
            out.setdefault(name, {})[column] = round(statistics.median(ms), 3)
    return out


def machine() -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    packages = {"triton": version("triton"), "fla": version("fla-core")}
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **packages}


def measure_ops(args: argparse.Namespace) -> list[dict]:
    rows = []
    print(f"{'op':<22}{'':<16}{'dtype':<10}{'width':>6}{'length':>8}{'forward':>10}{'fwd+bwd':>10}   ms")
    for op in (o for o in OPS if not args.only or o in args.only):
        for dtype in args.dtypes:
            for width, length in settings(op, dtype, args):
                batch = max(1, args.tokens // length)
                torch.manual_seed(0)
                candidates, leaves = build(op, batch, length, width, getattr(torch, dtype))
                for name, ms in measure(candidates, leaves, args.rounds).items():
                    setting = {"dtype": dtype, "width": width, "length": length, "batch": batch}
                    rows.append({"op": op, "implementation": name, **setting, **ms, **machine()})
                    times = "".join(f"{ms.get(c, float('nan')):>10.3f}" for c in COLUMNS)
                    print(f"{op:<22}{name:<16}{dtype:<10}{width:>6}{length:>8}{times}", flush=True)
                del candidates, leaves
                torch.cuda.empty_cache()
    return rows


def settings(op: str, dtype: str, args: argparse.Namespace) -> list[tuple[int, int]]:
    """All lengths at one width; all widths, and float32, at one length and for some of the ops."""
    width, length = args.widths[len(args.widths) // 2], args.lengths[len(args.lengths) // 2]
    if dtype == "float32":
        return [(width, length)] if op in SOME else []
    others = [(w, length) for w in args.widths if w != width] if op in SOME else []
    return [(width, n) for n in args.lengths] + others


COLUMNS = ("forward_ms", "forward_backward_ms")

HYBRID = {
    "hidden_size": 768, "tie_word_embeddings": True,
    "layers": {
        "num_hidden_layers": 12, "ffn": {"hidden_size": 2048},
        "mixers": {
            "gated_delta_net": {"num_heads": 6, "head_dim": 128, "value_head_dim": 256},
            "sliding_window": {"num_heads": 12, "head_dim": 64, "window": 512},
        },
    },
}  # fmt: skip
MODELS = {
    "mamba2-130m": ("mamba2-130m", {}),
    "gated-deltanet-h, 130m": ("gated-deltanet-h-1.3b", HYBRID),
    "rwkv7-191m": ("rwkv7-191m", {}),
}


def measure_models(args: argparse.Namespace) -> list[dict]:
    """A training step (bfloat16 autocast, AdamW) and a decoding step of whole models, with and without the kernels."""
    import zoo

    rows = []
    for label, (name, overrides) in MODELS.items():
        if args.only and label not in args.only:
            continue
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = zoo.create_model(name, **overrides)
        for kernels in (True, False):
            context = nullcontext() if kernels else backends.without(*KERNELS)
            row = {"model": label, "parameters": model.num_parameters(), "kernels": kernels}
            try:
                with context:
                    row |= training_step(model, args) | decoding_step(model, args)
            except RuntimeError as error:
                print(f"  {label}: {str(error).splitlines()[0][:150]}")
                continue
            rows.append({**row, **machine()})
            print(row, flush=True)
        del model
        torch.cuda.empty_cache()
    return rows


def training_step(model, args: argparse.Namespace) -> dict[str, float]:
    batch, length = min(8, args.tokens // 2048), 2048
    ids_BL = torch.randint(0, model.config.vocab_size, (batch, length), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.train()(ids_BL, labels=ids_BL, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    ms = statistics.median(milliseconds(step, 1) for _ in range(args.rounds))
    memory = torch.cuda.max_memory_allocated() / 2**30
    if args.profile:
        profile(step)
    return {"step_ms": round(ms, 1), "tokens_per_s": round(1e3 * batch * length / ms), "memory_gib": round(memory, 1)}


def profile(step: Callable[[], None]) -> None:
    """The kernels that a training step spends most time in."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        step()
    kernels = sorted(record.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    print(f"  on the GPU: {total / 1e3:.1f} ms in {sum(e.count for e in kernels)} kernels")
    for e in kernels[:14]:
        print(f"  {e.self_device_time_total / 1e3:8.2f} ms {e.count:6d} x {e.key[:100]}")


@torch.inference_mode()
def decoding_step(model, args: argparse.Namespace) -> dict[str, float]:
    batch, prompt = 8, 4096
    ids_BL = torch.randint(0, model.config.vocab_size, (batch, prompt), device="cuda")
    model.eval()

    def read(cache, ids_BL):
        return model(ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    with torch.autocast("cuda", torch.bfloat16):
        prompts = [milliseconds(lambda: read(None, ids_BL), 1) for _ in range(6)]
        cache = read(None, ids_BL)
        steps = [milliseconds(lambda: read(cache, ids_BL[:, :1]), 1) for _ in range(24)]
    return {"prompt_ms": round(statistics.median(prompts[2:]), 1), "decode_ms": round(statistics.median(steps[4:]), 2)}


def tune_less(most: int) -> None:
    """Searching all configurations of all kernels for all shapes takes hours: some, evenly spread, must do."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def fewer(self, arguments):
        configs = prune(self, arguments)
        return configs[:: -(-len(configs) // most)]

    Autotuner.prune_configs = fewer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="names of ops or models")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--configs", type=int, help="let Triton's tuner choose among so many configurations of a kernel"
    )
    parser.add_argument("--profile", action="store_true", help="of the models: where the time goes")
    parser.add_argument("--out", type=Path, help="by default results/gpu_ops.csv or gpu_models.csv beside this file")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if args.configs:
        tune_less(args.configs)
    rows = measure_models(args) if args.models else measure_ops(args)
    name = "gpu_models.csv" if args.models else "gpu_ops.csv"
    out = args.out or Path(__file__).with_name("results") / name
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
