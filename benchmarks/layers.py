"""CPU time of whole layers beside those of other packages: forward, and forward with the gradients of all inputs.

    python benchmarks/layers.py                                    # the table at 512 and 2048 steps
    python benchmarks/layers.py --lengths 8192 --only retention mamba2 --out benchmarks/results/layers.csv

One layer, width 512, batch 1, float32. Times are of one thread's CPU clock, so other programs disturb them less. All
layers of a length take turns, round after round, after one round to warm up; what is printed are medians. Every layer
of ours is compared with the fastest peer of its family; the families, and which shapes are equal, are in
benchmarks/README.md. Peers that are not installed are named and left out (`make bench` installs them).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it tells of every CUDA kernel that it misses
warnings.simplefilter("ignore", FutureWarning)  # a peer's torch.jit
PEERS = Path(__file__).parent.parent / ".venv" / "peers"
if PEERS.is_dir():
    sys.path.append(str(PEERS))  # behind everything else: nothing is shadowed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from zoo.registry import mixer_class  # noqa: E402

WIDTH, HEADS = 512, 8
COLUMNS = ("forward_ms", "forward_backward_ms")
Layer = Callable[[Tensor], Tensor]
Made = tuple[nn.Module, Layer]


@dataclass(frozen=True)
class Case:
    """One row. Ours has the one family that it is compared within; a peer has all those it belongs to."""

    name: str
    make: Callable[[int], Made]
    families: tuple[str, ...]
    peer: bool = False
    longest: int = 1 << 20


def ours(name: str, **options) -> Callable[[int], Made]:
    """A registered mixer of this package."""

    def make(length: int) -> Made:
        cls = mixer_class(name)
        mixer = cls(cls.Config.parse({"name": name, **options}, "mixer"), WIDTH)
        return mixer, lambda x: mixer(x)[0]

    return make


class SdpaLayer(nn.Module):
    """Causal attention as anyone writes it: four projections around `F.scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


def sdpa(length: int) -> Made:
    layer = SdpaLayer()
    return layer, layer


def torchscale(value_width: int, chunk: int) -> Callable[[int], Made]:
    """The official retention layer in its chunked form. The maps that depend on the length alone are made once."""

    def make(length: int) -> Made:
        from torchscale.component.multiscale_retention import MultiScaleRetention

        layer = MultiScaleRetention(SimpleNamespace(layernorm_eps=1e-6, multiway=False), WIDTH, value_width, HEADS)
        positions = torchscale_positions(length, min(chunk, length))
        return layer, lambda x: layer(x, positions, chunkwise_recurrent=True)

    return make


def torchscale_positions(length: int, chunk: int):
    """What torchscale's RetNetRelPos gives its layers (that class itself cannot be imported without fairscale)."""
    log_decay_H11 = torch.log1p(-(2.0 ** (-5.0 - torch.arange(HEADS))))[:, None, None]
    steps = torch.arange(chunk)
    distance = steps[:, None] - steps
    map_HCC = torch.exp(distance.clamp(min=0) * log_decay_H11).tril()
    last_H1C = map_HCC[:, -1:]
    root_HC1 = map_HCC.sum(-1, keepdim=True).sqrt()
    from_start_HC1 = torch.exp(log_decay_H11 * (steps[:, None] + 1)) / (root_HC1 / last_H1C.sum(-1, keepdim=True))
    to_end_HC1 = (last_H1C / last_H1C.sum(-1, keepdim=True)).mT
    angles = torch.arange(length)[:, None] * (1e4 ** -torch.linspace(0, 1, WIDTH // HEADS // 2)).repeat_interleave(2)
    maps = (map_HCC / root_HC1, torch.exp(log_decay_H11 * chunk), from_start_HC1, to_end_HC1)
    return (angles.sin(), angles.cos()), maps


def yet_another_retnet(chunk: int) -> Callable[[int], Made]:
    """Its chunked form carries the state from call to call: the loop over chunks is the caller's."""

    def make(length: int) -> Made:
        from yet_another_retnet.retention import MultiScaleRetention

        layer = MultiScaleRetention(WIDTH, HEADS, bias=False)

        def run(x: Tensor) -> Tensor:
            parts, state = [], None
            for start in range(0, length, chunk):
                part = x[:, start : start + chunk]
                y, state = layer.forward_chunkwise(part, part, part, start, state)
                parts.append(y)
            return torch.cat(parts, 1)

        return layer, run

    return make


def mamba2(chunk: int) -> Callable[[int], Made]:
    def make(length: int) -> Made:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = Mamba2Config(
            hidden_size=WIDTH, num_heads=16, head_dim=64, state_size=128, n_groups=1, expand=2, conv_kernel=4,
            num_hidden_layers=1, chunk_size=chunk,
        )  # fmt: skip
        layer = Mamba2Mixer(config, 0)
        return layer, layer

    return make


def mamba1(length: int) -> Made:
    import mambapy  # noqa: F401 (without it transformers would fall back to a loop over time)
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    layer = MambaMixer(MambaConfig(hidden_size=WIDTH, num_hidden_layers=1, use_mambapy=True), 0)
    layer.train()  # it takes the parallel scan in training only
    return layer, layer


def qwen3_next(length: int) -> Made:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=WIDTH, linear_num_value_heads=8, linear_num_key_heads=8, linear_key_head_dim=64,
        linear_value_head_dim=64, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, 0)
    return layer, layer


# The chunks of the peers are those at which each was fastest at 2048 steps, tried from 32 to 512 (by default
# torchscale takes 512, Mamba-2 256; yet-another-retnet leaves it to the caller).
SHAPE = {"num_heads": HEADS, "head_dim": WIDTH // HEADS}
CASES = [
    Case("attention", ours("attention", **SHAPE), ("attention",)),
    Case("sliding_window (256)", ours("sliding_window", **SHAPE, window=256), ("attention",)),
    Case(
        "windowed_linear (256)",
        ours("windowed_linear", **SHAPE, window=256, linear={"name": "linear_attention"}),
        ("attention",),
    ),
    Case("SDPA layer", sdpa, ("attention",), peer=True),
    Case("linear_attention", ours("linear_attention", **SHAPE), ("causal linear",)),
    Case(
        "gated_linear_attention",
        ours("gated_linear_attention", num_heads=4, head_dim=64, value_head_dim=128),
        ("causal linear",),
    ),
    Case("retention (values 1x)", ours("retention", **SHAPE), ("retention 1x",)),
    Case("torchscale retention (values 1x)", torchscale(WIDTH, 64), ("retention 1x", "causal linear"), peer=True),
    Case("yet-another-retnet (values 1x)", yet_another_retnet(256), ("retention 1x", "causal linear"), peer=True),
    Case("retention (values 2x)", ours("retention", **SHAPE, value_head_dim=128), ("retention 2x",)),
    Case("torchscale retention (values 2x)", torchscale(2 * WIDTH, 64), ("retention 2x",), peer=True),
    Case("mamba2", ours("mamba2", num_heads=16, num_groups=1, head_dim=128, value_head_dim=64), ("mamba",)),
    Case("transformers Mamba-2", mamba2(64), ("mamba", "causal linear"), peer=True),
    Case("transformers Mamba-1, mambapy", mamba1, ("mamba", "causal linear"), peer=True, longest=4096),
    Case("gated_delta_net", ours("gated_delta_net", **SHAPE), ("delta",)),
    Case("transformers Qwen3-Next delta net", qwen3_next, ("delta",), peer=True),
]


def build(cases: list[Case], length: int) -> dict[str, Made]:
    """name -> (module, function of x); peers that cannot be had are named and left out."""
    made = {}
    for case in cases:
        if length > case.longest:
            print(f"left out: {case.name} at {length}, which would need too much memory", file=sys.stderr)
            continue
        try:
            made[case.name] = case.make(length)
        except ImportError as error:
            if not case.peer:
                raise
            print(f"left out: {case.name} ({error}); pip install --no-deps -r benchmarks/peers.txt", file=sys.stderr)
    return made


def forward(layer: Layer, x: Tensor, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: Layer, x: Tensor, inputs: list[Tensor]) -> None:
    y = layer(x)
    torch.autograd.grad(y, inputs, torch.ones_like(y))


def measure(made: dict[str, Made], length: int, rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Median milliseconds per layer; the layers take turns, and every round begins with another one."""
    x = torch.randn(1, length, WIDTH, requires_grad=True)
    times: dict[tuple[str, str], list[float]] = {}
    names = list(made)
    for turn in range(rounds + 1):
        for i in range(len(names)):
            module, layer = made[names[(i + turn) % len(names)]]
            inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
            for column, work in zip(COLUMNS, (forward, forward_backward), strict=True):
                start = clock()
                work(layer, x, inputs)
                taken = 1e3 * (clock() - start)
                if turn:  # the first round warms up
                    times.setdefault((names[(i + turn) % len(names)], column), []).append(taken)
    return {name: {column: statistics.median(times[name, column]) for column in COLUMNS} for name in names}


def table(cases: list[Case], made: dict[str, Made], found: dict[str, dict[str, float]], length: int) -> list[dict]:
    """One row per layer; ours with the fastest peer of the family, and the ratio to it, for either column."""
    rows = []
    for case in (c for c in cases if c.name in made):
        parameters = sum(p.numel() for p in made[case.name][0].parameters())
        row = {"layer": case.name, "peer": case.peer, "length": length, "parameters": parameters}
        row |= {column: round(found[case.name][column], 2) for column in COLUMNS}
        rivals = [c.name for c in cases if c.name in made and c.peer and case.families[0] in c.families]
        for column in COLUMNS:
            best = min(rivals, key=lambda name: found[name][column], default=None) if not case.peer else None
            ratio = None if best is None else round(found[case.name][column] / found[best][column], 3)
            row |= {column.replace("ms", "peer"): best, column.replace("ms", "ratio"): ratio}
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    head = f"{'layer':<35}{'L':>6}{'parameters':>12}{'forward':>10}{'ratio':>7}{'fwd+bwd':>10}{'ratio':>7}"
    print(f"\n{head}  best peer (fwd+bwd); CPU ms")
    for r in rows:
        ratios = ["" if r[c] is None else f"{r[c]:.2f}" for c in ("forward_ratio", "forward_backward_ratio")]
        times = f"{r['forward_ms']:>10.1f}{ratios[0]:>7}{r['forward_backward_ms']:>10.1f}{ratios[1]:>7}"
        name, best = ("  " if r["peer"] else "") + r["layer"], r["forward_backward_peer"] or ""
        print(f"{name:<35}{r['length']:>6}{r['parameters']:>12,}{times}  {best}", flush=True)


def surroundings(threads: int) -> dict[str, str | int]:
    """Machine, versions and date, as they go into every row of the CSV."""

    def version(package: str) -> str:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} absent"

    packages = ("torch", "transformers", "torchscale", "yet-another-retnet", "mambapy")
    return {
        "width": WIDTH,
        "threads": threads,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "versions": "; ".join([f"python {platform.python_version()}", *map(version, packages)]),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="8192 takes minutes")
    parser.add_argument("--rounds", type=int, default=7, help="at most 3 from 8192 steps on")
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of ours; their peers come along")
    parser.add_argument("--out", type=Path, help="also write a CSV, such as benchmarks/results/layers.csv")
    parser.add_argument("--threads", type=int, default=1, help="wall-clock times where more than one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    wanted = [c for c in CASES if not c.peer and (not args.only or any(part in c.name for part in args.only))]
    families = {family for c in wanted for family in c.families}
    cases = [c for c in CASES if c in wanted or (c.peer and families & set(c.families))]
    rows = []
    for length in args.lengths:
        made, rounds = build(cases, length), args.rounds if length < 8192 else min(args.rounds, 3)
        rows += (new := table(cases, made, measure(made, length, rounds, clock), length))
        show(new)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("w", newline="") as file:
                extra = surroundings(args.threads)
                writer = csv.DictWriter(file, [*rows[0], *extra])
                writer.writeheader()
                writer.writerows({**row, **extra} for row in rows)


if __name__ == "__main__":
    main()
