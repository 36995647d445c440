"""Run by test_peak_memory.py in a process of its own: anonymous memory while a checkpoint is read or written.

python peak_memory.py make FOLDER            a checkpoint of about 480 MB, as safetensors and as torch's files
python peak_memory.py read FOLDER DTYPE      prints the bytes of the weights and the peak while they were read
python peak_memory.py write FOLDER OUT       prints the bytes of the weights and the peak while they were written
"""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import time
from pathlib import Path

import accelerate.utils  # noqa: F401 (what is imported on the way does not count)
import torch

from zoo.convert.layouts import export_model, import_checkpoint

SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 704, "num_hidden_layers": 12, "num_local_experts": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64,
}  # fmt: skip
TINY = {**SIZES, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class Peak:
    """The largest growth of anonymous memory inside a `with`."""

    def __enter__(self):
        gc.collect()
        self.start = self.highest = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.is_set():
            self.highest = max(self.highest, anonymous())
            time.sleep(0.001)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.highest = max(self.highest, anonymous())
        self.bytes = self.highest - self.start


def make(folder: Path) -> None:
    """The same weights twice, in shards."""
    from transformers import MixtralConfig, MixtralForCausalLM

    for sizes, name in ((TINY, "tiny"), (SIZES, "safetensors")):
        model = MixtralForCausalLM(MixtralConfig(**sizes))
        model.save_pretrained(folder / name, max_shard_size="60MB")
    index = json.loads((folder / "safetensors" / "model.safetensors.index.json").read_text())
    from safetensors.torch import load_file

    (folder / "torch").mkdir()
    for file in sorted(set(index["weight_map"].values())):
        torch.save(load_file(folder / "safetensors" / file), folder / "torch" / file.replace(".safetensors", ".bin"))
    places = {name: file.replace(".safetensors", ".bin") for name, file in index["weight_map"].items()}
    (folder / "torch" / "pytorch_model.bin.index.json").write_text(json.dumps({**index, "weight_map": places}))
    (folder / "torch" / "config.json").write_text((folder / "safetensors" / "config.json").read_text())


def size(model: torch.nn.Module) -> int:
    """Bytes of the weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    action, folder = sys.argv[1], Path(sys.argv[2])
    if action == "make":
        make(folder)
        return
    model = import_checkpoint(folder.parent / "tiny").model  # whatever is made the first time
    if action == "read":
        with Peak() as peak:
            model = import_checkpoint(folder, dtype=getattr(torch, sys.argv[3])).model
    else:
        export_model(model, "transformers", Path(sys.argv[3]) / "tiny")
        model = import_checkpoint(folder).model
        with Peak() as peak:
            export_model(model, "transformers", Path(sys.argv[3]) / "out")
    print(json.dumps({"weights": size(model), "peak": peak.bytes}))


if __name__ == "__main__":
    main()
