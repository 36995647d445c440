"""The house rules that a reader relies on: imports run one way, files stay short, public things are described."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from zoo import ops

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "zoo").rglob("*.py"), *(ROOT / "train").rglob("*.py")])
# Low to high. A file may import its own level and those below; inside a function it may reach up, which is how the
# registry finds mixers and how a command loads what it needs.
LEVELS = [
    {"errors"},
    {"yaml_files", "options", "transformers_keys"},
    {"config", "patterns", "registry", "text", "images", "linear"},
    {"ops"},
    {"mixers", "ffn"},
    {"models"},
    {"testing", "_testing"},
    {"convert", "hub"},
    {"train"},
    {"cli", "__main__"},
]


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "zoo" else ("zoo", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(name: str) -> int | None:
    """The floor a module is on; None for `zoo` itself, which is only a list of names, and for data."""
    part = name.split(".")[1] if "." in name else None
    return next((i for i, names in enumerate(LEVELS) if part in names), None)


def imports_at_import_time(tree: ast.Module) -> list[tuple[int, str]]:
    """What a module imports when it is imported: not inside functions, not for type checkers."""
    found, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)
    return found


def test_every_file_has_a_floor():
    unknown = [str(p.relative_to(ROOT)) for p in SOURCES if module(p) != "zoo" and level(module(p)) is None]
    assert unknown == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = level(module(path))
    if own is None:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, name in imports_at_import_time(tree):
        if name.split(".")[0] == "zoo":
            other = level(name)
            assert other is None or other <= own, f"{path.name}:{line} imports {name} from a higher floor"
        assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), "relative import"


EXTRAS = {
    "gguf", "timm", "flash_attn", "mamba_ssm", "causal_conv1d", "fla", "lm_eval", "torchao", "peft", "matplotlib",
    "tensorboard", "pytest", "hypothesis",
}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_extras_are_imported_inside_functions(path):
    tops = {name.split(".")[0] for _, name in imports_at_import_time(ast.parse(path.read_text(encoding="utf-8")))}
    assert not tops & EXTRAS


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = len((ast.get_docstring(node) or "").splitlines())
            arguments = node.body[0].lineno - node.lineno
            lines = node.end_lineno - node.lineno + 1 - documented - arguments
            assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_things_are_described(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    if path.name.startswith("_") and path.name != "__init__.py":
        return
    missing = []

    def visit(owner: ast.Module | ast.ClassDef, inherits: bool) -> None:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            described = ast.get_docstring(node) is not None
            overrides = inherits and isinstance(node, ast.FunctionDef)  # described where it is introduced
            setter = isinstance(node, ast.FunctionDef) and "setter" in ast.dump(ast.Module(node.decorator_list, []))
            if not described and not overrides and not setter:
                missing.append(node.name)
            if isinstance(node, ast.ClassDef):
                visit(node, bool(node.bases))

    visit(tree, False)
    assert missing == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_have_types(path):
    missing = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for owner in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef) or (node.name.startswith("_") and node.name != "__init__"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if untyped or node.returns is None:
                missing.append((node.name, untyped))
    if path.parts[-2] == "ops":  # what is public there is the list in its __init__
        missing = [item for item in missing if item[0] in ops.__all__]
    assert path.name.startswith("_testing") or missing == []


def test_no_leftovers():
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    for path in SOURCES:
        assert not words.search(path.read_text(encoding="utf-8")), path


def test_loops_over_time_are_in_the_references_only():
    pattern = re.compile(r"for \w+ in range\((0, )?(L|S|T|length|seq_len)\)")
    for path in [p for p in SOURCES if p.parts[-2] in ("ops", "mixers") and p.name != "reference.py"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{path}:{number}"
    assert pattern.search((ROOT / "zoo" / "ops" / "reference.py").read_text(encoding="utf-8"))
