"""What is installed, and what importing it costs."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def installed_paths() -> set[str]:
    """Where every module and data file of the checkout belongs inside the wheel; published cards stay outside."""
    folders = {"zoo": "zoo", "train": "zoo/train", "configs": "zoo/configs", "model_cards": "zoo/model_cards"}
    suffixes = {"zoo": {".py", ".typed"}, "train": {".py"}, "configs": {".py", ".yaml"}, "model_cards": {".py", ".md"}}
    return {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes[folder] and "__pycache__" not in path.parts
        if folder != "model_cards" or path.parent == ROOT / folder
    }


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(tmp_path):
    import shutil

    skip = shutil.ignore_patterns(".git", ".venv", "build", "runs", "demo", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "source", ignore=skip)  # a build leaves files behind
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        "dist",
        "./source",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("zoo-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == installed_paths()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    # It works where there is no checkout: the wheel first on the path, from another folder, without site's finder.
    code = (
        f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(wheel)!r})\n"
        "import zoo, zoo.train.recipe\n"
        f"assert zoo.__file__.startswith({str(wheel)!r}), zoo.__file__\n"
        "print(zoo.__version__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == zoo.__version__


def test_the_packages_listed_are_those_there_are():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    there = {str(Path(name).parent).replace("/", ".") for name in installed_paths() if name.endswith(".py")}
    assert listed == there


def test_the_version_is_stated_once_in_effect():
    assert PROJECT["project"]["version"] == zoo.__version__
    assert f"## {zoo.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_third_party_import_is_declared():
    declared = {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "accelerate", "datasets"}
    declared |= {"pydantic", "yaml", "typer", "rich", "numpy"}  # core
    declared |= {"gguf", "matplotlib", "timm", "PIL", "flash_attn", "causal_conv1d", "fla"}  # extras
    declared |= {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}
    declared |= {"pyarrow", "pandas", "triton"}  # come with datasets and torch
    found = set()
    for path in [*(ROOT / "zoo").rglob("*.py"), *(ROOT / "train").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) - {"zoo"} <= declared


def test_the_public_names_exist():
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
    assert dir(zoo) == sorted(zoo.__all__)
    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'convrt'"):
        _ = zoo.convrt


def test_import_is_cheap():
    """At most 1.5 s of CPU beyond `import torch`; in fact next to nothing. The median of three."""
    code = "import time, torch; start = time.process_time(); import zoo; print(time.process_time() - start)"
    assert statistics.median(float(python(code)) for _ in range(3)) < 1.5
    extras = {"gguf", "timm", "flash_attn", "mamba_ssm", "fla", "lm_eval", "torchao", "peft", "matplotlib", "datasets"}
    extras |= {"onnx", "onnx_ir", "onnxscript", "onnxruntime"}
    code = "import sys, zoo; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    assert not extras & set(python(code).split())


def test_using_it_imports_no_extra():
    code = (
        "import sys, torch, zoo; model = zoo.create_model('retnet-tiny'); model.generate(torch.ones(1, 3).long());"
        "zoo.backends(); print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    names = set(python(code).split())
    assert not {"gguf", "timm", "flash_attn", "mamba_ssm", "fla", "lm_eval", "torchao", "peft", "matplotlib"} & names
