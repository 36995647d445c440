"""Where every mixer starts when it is made from an attention layer, and how near alignment brings it.

    python benchmarks/conversions.py                      # all mixers, 30 steps: the table of docs/architectures.md
    python benchmarks/conversions.py rwkv4 --steps 2000   # what is left after long alignment
    python benchmarks/conversions.py rwkv4 mamba2 --model MODEL --text FILE --every 5   # a real model

Errors are relative to attention's output (zeros are at 1), on rows that nothing was measured or trained on. Without a
model the cases, teachers and inputs are those of tests/mixers/test_conversions.py; of more than 100 steps the last
two thirds take a third and a tenth of the rate. MODEL is whatever `zoo convert` takes: six rows of 256 tokens of the
text, three to measure on and three to compare on, each layer by itself on the teacher's own inputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "mixers"))

from formulas import align, convert, distance, relative_error, teacher, text_like
from test_conversions import CASES, Case, alike, of_random_weights, statistics


def row(case: Case, steps: int) -> list[float]:
    """One mixer with either teacher: start, aligned, and the aligned mixer that began with random weights."""
    cells = []
    for attention in (alike(case.causal), teacher(causal=case.causal)):
        torch.manual_seed(0)
        held_out = text_like(32)
        student = convert(attention, case.name, statistics(attention, text_like(16)), **case.options)
        random = of_random_weights(student)
        cells.append(relative_error(student, attention, x_BLD=held_out))
        for mixer, rate, fast in ((student, case.rate, case.fast), (random, 5e-3, ())):
            for part in (1, 3, 10) if steps > 100 else (1,):
                count = steps // 3 if steps > 100 else steps
                align(mixer, attention, count, rate=rate / part, fast=fast, inputs=lambda: text_like(8))
            cells.append(relative_error(mixer, attention, x_BLD=held_out))
    return cells


def table_of_layers(names: list[str], options: dict[str, Any], model: str, text: Path, every: int) -> None:
    """The start in every `every`-th layer of a model."""
    from zoo.convert.layerwise import Trace, mixer_input
    from zoo.convert.surgery import attention_layers
    from zoo.convert.teachers import load_teacher

    found = load_teacher(model, check=False)
    ids_L = found.tokenizer(text.read_text(encoding="utf-8")[:20000], return_tensors="pt").input_ids[0]
    trace = Trace(found.model, ids_L[: 6 * 256].view(6, 256), fast=False, with_stats=False)
    layers = attention_layers(found.model)[::every]
    print(f"| mixer | {' | '.join(f'layer {i}' for i in layers)} |\n| --- |" + " ---: |" * len(layers))
    for name in names:
        cells = []
        for i in layers:
            block = found.model.model.layers[i]
            with torch.no_grad():
                x_NLD = mixer_input(block, trace.inputs[i])
                student = convert(block.mixer, name, statistics(block.mixer, x_NLD[:3]), **options)
                cells.append(distance(student(x_NLD[3:])[0], block.mixer(x_NLD[3:])[0]).item())
        print(f"| `{name}` | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mixers; all by default")
    parser.add_argument("--steps", type=int, default=30, help="of alignment, 8 rows of 48 tokens each")
    parser.add_argument("--model", help="whose layers to convert, instead of those of the tests")
    parser.add_argument("--text", type=Path, help="a file of text for the model")
    parser.add_argument("--every", type=int, default=1, help="only every n-th attention layer of the model")
    parser.add_argument("--options", default="{}", help="of the mixers made from the model's layers, as YAML")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.model:
        table_of_layers(options.names, yaml.safe_load(options.options), options.model, options.text, options.every)
        return
    heads = ["start", f"{options.steps} steps", "from random weights"]
    print("| mixer | form | " + " | ".join(heads + heads) + " |\n| --- | --- |" + " ---: |" * 6)
    for case in CASES:
        if not options.names or case.name in options.names:
            cells = " | ".join(f"{cell:.3f}" for cell in row(case, options.steps))
            print(f"| `{case.name}` | {'causal' if case.causal else 'two-sided'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
