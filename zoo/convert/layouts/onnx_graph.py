"""ONNX graphs of modules: traced, written with one file of weights, and run before they are handed over."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.convert.layouts.onnx_ops import translations
from zoo.errors import ExportError
from zoo.ops.backends import without

WEIGHTS = "weights.onnx_data"
SMALL = 1 << 10  # bytes; smaller tensors stay in the graphs
TOLERANCE = 1e-3  # of the largest number of an output


def need_packages() -> None:
    """Raise ExportError where a package is missing that makes or tries graphs."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise ExportError(f"writing ONNX needs the package {package}: pip install 'zoo[onnx]'") from None


def trace(module: nn.Module, arguments: tuple, axes: Any, inputs: list[str], outputs: list[str]) -> Any:
    """The graph of a module. Raises ExportError where torch cannot make one."""
    try:
        with _quiet(), without("fla", "causal_conv1d", "flash_attn"):  # kernels of other packages are no graph
            # Not by torch.onnx itself, which turns some guards on sizes into assertions that are false for good sizes.
            program = torch.export.export(module.eval(), arguments, dynamic_shapes=axes)
            return torch.onnx.export(
                program, input_names=inputs, output_names=outputs, custom_translation_table=translations(),
                dynamo=True, verbose=False, optimize=False,
            )  # fmt: skip
    except Exception as error:  # the exporter's own kinds: a graph that cannot be made is the model's fault here
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ExportError(
            f"torch {torch.__version__} cannot make a graph of this model ({lines[0]}); keep it in torch, or convert "
            "it to a mixer that has a graph (docs/weights.md, ONNX)"
        ) from error


def save(programs: dict[str, Any], folder: Path) -> None:
    """Write graphs by name. What weighs something goes into one file beside them, once for all graphs."""
    import onnx_ir as ir
    from onnx_ir.external_data import convert_tensors_to_external

    places: dict[bytes, list[Any]] = {}
    tensors: dict[bytes, Any] = {}
    for program in programs.values():
        for value in program.model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < SMALL:
                continue
            key = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.tobytes()).digest()
            tensors.setdefault(key, tensor)
            places.setdefault(key, []).append(value)
    outside = convert_tensors_to_external(list(tensors.values()), folder, WEIGHTS)
    for values, tensor in zip((places[key] for key in tensors), outside, strict=True):
        for value in values:
            value.const_value = tensor
    for name, program in programs.items():
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # the lines of torch that each came from, most of the file
        ir.save(program.model, folder / name)


def check(path: Path, module: nn.Module, names: list[str], examples: list[tuple[Tensor, ...]]) -> None:
    """Raise ExportError where a graph in onnxruntime gives other numbers than its module, or cannot run at all.

    The examples are of other sizes than the trace, so that one that has been built in is found. float32 only:
    onnxruntime lacks kernels of the other dtypes on a CPU.
    """
    import onnxruntime

    if next(module.parameters()).dtype != torch.float32:
        return
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    grows = getattr(module, "grows", {})
    for example in examples:
        feed = {name: t.cpu().numpy() for name, t in zip(names, example, strict=True)}
        expected = module(*(t.clone() for t in example))
        expected = (expected,) if isinstance(expected, Tensor) else expected
        shape = tuple(example[0].shape)
        try:
            got = session.run(None, feed)
        except Exception as error:  # onnxruntime's own kinds
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"{path.name} cannot run on inputs of {shape}: the model has no graph yet; keep it in torch ({reason})"
            ) from None
        for node, one, other in zip(session.get_outputs(), got, expected, strict=True):
            if grows.get(node.name.removeprefix("new.")):
                continue  # torch keeps room behind what grows; the logits of other states show whether it is right
            if not _same(torch.from_numpy(one), other.cpu()):
                raise ExportError(f"{path.name} gives other numbers than torch for {node.name} on inputs of {shape}")


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    size = other.double().abs().max().item() if other.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=TOLERANCE, atol=TOLERANCE * max(size, 1e-3))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
