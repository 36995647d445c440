"""Makes the checkpoints beside this file: the authors' own classes build, run and save them, with random weights.

For the packages that do not install or do not run where the tests run. Each folder is a checkpoint as its package saves
it; the file of the same name holds `input_ids`, the package's `logits` for them and the tokens it continues with
(`greedy`). tests/convert/layouts/test_official.py imports the folders. Afterwards ours is exported and read back by the
same class. To make them again (the compiler of mamba-ssm is not needed, only its source):

    pip install --no-deps --target peers flash-linear-attention==0.6.0 fla-core==0.6.0 einops rwkv==0.8.32 \\
        torchscale==0.3.0 fairscale==0.4.0 timm torchvision
    pip download --no-deps --no-build-isolation --no-binary :all: mamba-ssm==2.3.2.post1 && tar xf mamba_ssm-*.tar.gz
    PYTHONPATH=peers:mamba_ssm-2.3.2.post1 python tests/peers/official/make.py [NAME ...]

Triton's kernels run in its interpreter, with the first of the settings that they would choose from by speed. The one
function that is not what runs on a GPU is Mamba-1's scan, which is compiled: its package's own `selective_scan_ref`
stands in.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from safetensors.torch import save_file
from triton.runtime.autotuner import Autotuner

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
V, D, E, LAYERS = 31, 8, 12, 2

tuner = Autotuner.__init__
Autotuner.__init__ = lambda self, fn, names, configs, *args, **options: tuner(
    self, fn, names, configs[:1], *args, **options
)


def randomized(model, scale=0.4):
    """In eval mode with every parameter moved: initial zeros and ones hide mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1))
    return model.eval()


class Fla:
    """A model of flash-linear-attention."""

    def __init__(self, name, **options):
        self.name, self.options = name, {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, **options}

    @staticmethod
    def models():
        MambaSSM.package()  # whose kernels fla looks for
        return importlib.import_module("fla.models")

    def save(self, folder):
        models = self.models()
        config = getattr(models, f"{self.name}Config")(**self.options)
        randomized(getattr(models, f"{self.name}ForCausalLM")(config)).save_pretrained(folder)

    def load(self, folder):
        cls = getattr(self.models(), f"{self.name}ForCausalLM")
        model, info = cls.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        self.model = model.eval()
        return lambda ids_BL: model(ids_BL, use_cache=False).logits


class MambaSSM:
    """A `MambaLMHeadModel`. Only its compiled extension is missing, whose one function here is its own reference."""

    def __init__(self, **options):
        self.options = options

    @staticmethod
    def package():
        if "mamba_ssm" not in sys.modules:
            place = next(p for entry in sys.path if (p := Path(entry) / "mamba_ssm").is_dir())
            sys.modules["mamba_ssm"] = types.ModuleType("mamba_ssm")  # without what its __init__ imports of Mamba-3
            sys.modules["mamba_ssm"].__path__ = [str(place)]
            sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
            torch.cuda.device = lambda index: contextlib.nullcontext()
            scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
            importlib.import_module("mamba_ssm.modules.mamba_simple").selective_scan_fn = scan.selective_scan_ref
        return importlib.import_module("mamba_ssm.models.mixer_seq_simple")

    def save(self, folder):
        package = self.package()
        config = package.MambaConfig(
            d_model=D, n_layer=LAYERS, vocab_size=30, pad_vocab_size_multiple=8, **self.options
        )
        randomized(package.MambaLMHeadModel(config)).save_pretrained(folder)

    def load(self, folder):
        package = self.package()
        model = package.MambaLMHeadModel(package.MambaConfig(**json.loads((folder / "config.json").read_text())))
        model.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
        for block in model.eval().backbone.layers:
            block.mixer.use_mem_eff_path = False  # the same in more than one kernel, of which one is compiled
        return lambda ids_BL: model(ids_BL).logits


class FlaMamba2(Fla):
    """On a GPU it runs mamba_ssm's kernels; so here. (What fla runs on a CPU instead gives every second head, not every
    half of them, one of two groups, unlike its kernels and unlike its own single step: fla/layers/mamba2.py, `repeat`.)
    """

    def load(self, folder):
        run = super().load(folder)
        for module in {type(m) for m in self.model.modules() if type(m).__name__ == "Mamba2"}:
            module.torch_forward = module.cuda_kernels_forward
        return run


class Torchscale:
    """A `RetNetDecoder`, and what was given to its config, which the package does not save."""

    def __init__(self, **options):
        self.options = options

    @staticmethod
    def model(options):
        from torchscale.architecture.config import RetNetConfig
        from torchscale.architecture.retnet import RetNetDecoder

        embedding = torch.nn.Embedding(options["vocab_size"], options["decoder_embed_dim"])
        return RetNetDecoder(RetNetConfig(**options), embedding)

    def save(self, folder):
        torch.save(randomized(self.model(self.options)).state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(self.options, indent=2) + "\n")

    def load(self, folder):
        model = self.model(json.loads((folder / "config.json").read_text()))
        model.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
        model.eval()
        return lambda ids_BL: model(ids_BL)[0]


class RWKV:
    """A `.pth` with the names and shapes of the published ones, run by the authors' package."""

    def __init__(self, version):
        self.version = version

    def save(self, folder):
        from peers import rwkv

        shapes = {4: rwkv.shapes_4, 6: rwkv.shapes_6, 7: rwkv.shapes_7}[self.version]
        sizes = {rwkv.D: D, rwkv.V: V, rwkv.H: 2, rwkv.K: D // 2, 80: E}
        shapes = {name: tuple(sizes.get(n, n) for n in shape) for name, shape in shapes.items()}
        torch.save(rwkv.draw(shapes), folder / "model.pth")

    def load(self, folder):
        settings = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(self.version == 7))}
        os.environ.update(settings)
        sys.modules.pop("rwkv.model", None)
        model = importlib.import_module("rwkv.model").RWKV(model=str(folder / "model"), strategy="cpu fp32")
        return lambda ids_BL: torch.stack([model.forward(row, None, full_output=True)[0] for row in ids_BL.tolist()])


HEADS = {"num_heads": 2, "intermediate_size": E}
CASES = {
    "fla-retnet": Fla("RetNet", **HEADS),
    "fla-gla": Fla("GLA", **HEADS, use_short_conv=True, num_kv_heads=1),
    "fla-delta_net": Fla("DeltaNet", **HEADS, use_gate=True),
    "fla-gated_deltanet": Fla("GatedDeltaNet", **HEADS, head_dim=4, num_v_heads=4, allow_neg_eigval=True),
    "fla-rwkv6": Fla("RWKV6", **HEADS, expand_k=1.0, proj_low_rank_dim=3, gate_low_rank_dim=4),
    "fla-rwkv7": Fla(
        "RWKV7", intermediate_size=E, head_dim=D // 2, decay_low_rank_dim=3, gate_low_rank_dim=4, a_low_rank_dim=5,
        v_low_rank_dim=2,
    ),
    "fla-mamba": Fla("Mamba", state_size=4),
    "fla-mamba2": FlaMamba2("Mamba2", num_heads=4, head_dim=D // 2, state_size=8, n_groups=2, chunk_size=16),
    "mamba_ssm-mamba": MambaSSM(ssm_cfg={"layer": "Mamba1", "d_state": 4}),
    "mamba_ssm-mamba2": MambaSSM(ssm_cfg={"layer": "Mamba2", "d_state": 8, "headdim": D // 2, "ngroups": 2}),
    "torchscale-retnet": Torchscale(
        vocab_size=V, decoder_embed_dim=D, decoder_value_embed_dim=2 * D, decoder_retention_heads=2,
        decoder_ffn_embed_dim=E, decoder_layers=LAYERS, layernorm_eps=1e-5,
    ),
    "rwkv-rwkv4": RWKV(4),
    "rwkv-rwkv6": RWKV(6),
    "rwkv-rwkv7": RWKV(7),
}  # fmt: skip


@torch.no_grad()
def make(name):
    """A folder, and what its package computes from it. Returns the logits."""
    torch.manual_seed(list(CASES).index(name))
    case, folder = CASES[name], HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    case.save(folder)
    run = case.load(folder)
    ids_BL = torch.randint(0, 30, (2, 12))
    logits, greedy = run(ids_BL).float(), ids_BL
    for _ in range(6):
        greedy = torch.cat([greedy, run(greedy)[:, -1:].argmax(-1)], 1)
    answers = {"input_ids": ids_BL, "logits": logits.contiguous(), "greedy": greedy[:, ids_BL.shape[1] :].contiguous()}
    save_file(answers, HERE / f"{name}.safetensors")
    return ids_BL, logits


@torch.no_grad()
def again(name, ids_BL, logits):
    """What ours writes loads in the same class, with no name missing or left over, and computes the same."""
    from zoo.convert.layouts import export_model, import_checkpoint

    layout, _, family = name.partition("-")
    found = import_checkpoint(next((HERE / name).glob("*.pth"), HERE / name))
    assert (found.layout, found.family) == (layout, family)
    ours = found.model(ids_BL).logits
    with tempfile.TemporaryDirectory() as folder:
        export_model(found.model, layout, Path(folder) / "out")
        back = CASES[name].load(Path(folder) / "out")(ids_BL).float()
    error, returned = ((x - logits).abs().max() / logits.abs().max() for x in (ours, back))
    print(f"{name}: relative error {error:.1e}, of what it computes from our export {returned:.1e}", flush=True)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or CASES:
        again(chosen, *make(chosen))
