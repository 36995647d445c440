"""The code of one model in one file, for those who do not have this package.

The file is put together from the modules of this package: from the classes that the model has, along what they read,
every definition that is needed and no other, in the order of the imports, with its comments. Names that two modules use
for different things get the name of their module behind them. What needs another package or a GPU is left out, and what
leads back into this package raises an ImportError that says so.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zoo.config import ZooConfig
from zoo.errors import ConfigError
from zoo.hub.contents import CODE
from zoo.hub.scopes import Uses, defined, place, uses

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "sentence-embedding": None,
    "image-classification": "AutoModelForImageClassification",
}
FLOORS = {"errors", "options", "config", "patterns", "registry", "linear", "ops", "mixers", "ffn", "models"}
THERE = {"torch", "transformers", "pydantic", "numpy", "huggingface_hub", "safetensors", "yaml"}
# What looks names up by importing all of the package: in the file everything is imported already.
INSTEAD = {
    ("zoo.registry", "_load_all"): 'def _load_all() -> None:\n    """All that the model needs is in this file."""'
}
WITHOUT = 'raise ImportError("this needs the package zoo")'

Key = tuple[str, str]  # module and name


def auto_map(config: ZooConfig) -> dict[str, str]:
    """What config.json says of the file to transformers' Auto classes."""
    from zoo.models.heads import TASK_CLASSES

    stem, head = Path(CODE).stem, TASK_CLASSES[config.task].__name__
    found = {"AutoConfig": f"{stem}.ZooConfig", "AutoModel": f"{stem}.ZooModel"}
    if config.task == "sentence-embedding":
        return {**found, "AutoModel": f"{stem}.{head}"}
    return {**found, str(TASKS[config.task]): f"{stem}.{head}"}


def modeling_code(config: ZooConfig) -> str:
    """Python source that defines the config and the model of `config`, and needs torch, transformers and pydantic.

    Raises ConfigError where a mixer comes from another package, whose source is not this one's to publish.
    """
    from zoo.models.costs import empty_model

    model = empty_model(config)
    classes = {type(module) for module in model.modules()} | {type(model), ZooConfig}
    classes |= {type(m).Config for m in model.modules() if hasattr(type(m), "Config")}
    ours = {(cls.__module__, cls.__qualname__.split(".")[0]) for cls in classes if not _others(cls.__module__)}
    strange = sorted({cls.__module__ for cls in classes if _others(cls.__module__)} - {"torch", "transformers"})
    if foreign := [name for name in strange if name.split(".")[0] not in THERE]:
        raise ConfigError(f"{foreign[0]}: a part of this model comes from outside the package; its code is not shipped")
    ours.add(("zoo.models.backbone", "ZooModel"))
    return _Merge(classes).source(ours, config)


def _others(module: str) -> bool:
    return module.split(".")[0] != "zoo"


@dataclass
class _Statement:
    """A top-level statement: its lines in the file, with the comment above it, and what it reads."""

    module: str
    node: ast.stmt
    first: int  # of the comment or the decorators above, counted from 1
    names: list[str]

    @functools.cached_property
    def uses(self) -> Uses:
        return uses(self.node)


@dataclass
class _Module:
    """The source of a module, cut into statements."""

    name: str
    lines: list[bytes] = field(default_factory=list)
    statements: list[_Statement] = field(default_factory=list)
    defines: dict[str, _Statement] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # name -> module, name in it
    about: str = ""

    @classmethod
    @functools.cache
    def read(cls, name: str) -> _Module:
        file = importlib.import_module(name).__file__
        text = Path(str(file)).read_bytes()
        self, tree = cls(name, text.splitlines()), ast.parse(text)
        self.about = (ast.get_docstring(tree) or "").split("\n\n")[0]
        body = tree.body[1:] if self.about else tree.body
        for node in body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports[alias.asname or alias.name.split(".")[0]] = (alias.name, None if alias.asname else "")
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (str(node.module), alias.name)
            elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
                self.add(node)
        return self

    def add(self, node: ast.stmt) -> None:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        while first > 1 and self.lines[first - 2].startswith(b"#"):
            first -= 1
        statement = _Statement(self.name, node, first, defined(node))
        self.statements.append(statement)
        self.defines |= dict.fromkeys(statement.names, statement)

    def below(self) -> Iterator[str]:
        """The modules of this package that it imports when it is imported."""
        for module, name in self.imports.values():
            if module.split(".")[0] == "zoo":
                yield f"{module}.{name}" if name and _is_module(f"{module}.{name}") else module


@functools.cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _registers(node: ast.stmt) -> bool:
    """Whether a statement adds to a table when it runs, in a way that works on any machine."""
    if isinstance(node, ast.Expr | ast.For):
        return not re.match(r"Auto\w+\.register\(", ast.unparse(node))
    if isinstance(node, ast.Assign) and not defined(node):  # TABLE[name] = ...
        return True
    for decorator in getattr(node, "decorator_list", ()):
        text = ast.unparse(decorator)
        if text.startswith("register_backend("):
            return "package=" not in text and "needs_gpu=" not in text
        if text.startswith(("torch.library.impl(", "torch.library.register_")):
            return True
    return False


class _Merge:
    """Definitions of several modules in one file. `classes`: those of the model, which lazy imports may lead to."""

    def __init__(self, classes: set[type]) -> None:
        self.classes = classes
        self.modules: dict[str, _Module] = {}
        self.wanted: dict[int, _Statement] = {}
        self.outside: dict[Key, str] = {}  # imports of other packages: module and name -> name here

    def module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _Module.read(name)
        return self.modules[name]

    # ---- what is needed

    def find(self, module: str, name: str) -> Key | None:
        """Where a name that a module uses is defined: in this package, or ("outside X", name)."""
        source = self.module(module)
        if name in source.defines:
            return module, name
        if name not in source.imports:
            return None
        other, inside = source.imports[name]
        if other.split(".")[0] != "zoo":
            return f"outside {other}", "" if inside == "" else f"{inside or ''} as {name}"
        if inside and _is_module(f"{other}.{inside}"):
            return f"module {other}.{inside}", name
        return self.find(other, str(inside))

    def lazy(self, node: ast.Import | ast.ImportFrom) -> bool:
        """Whether what a function imports comes into the file too."""
        if isinstance(node, ast.Import) or str(node.module).split(".")[0] != "zoo":
            return False
        if str(node.module).split(".")[1:2][0] not in FLOORS:
            return False
        import torch

        for alias in node.names:
            target = getattr(importlib.import_module(str(node.module)), alias.name)
            if isinstance(target, type) and issubclass(target, torch.nn.Module) and target not in self.classes:
                return False
        return True

    def reads(self, statement: _Statement) -> Iterator[Key]:
        """What a statement needs."""
        found = statement.uses
        for name, _ in found.names:
            if (key := self.find(statement.module, name)) is not None:
                yield key
        for name, attribute, _ in found.attributes:
            key = self.find(statement.module, name)
            if key is not None and key[0].startswith("module "):
                yield from filter(None, [self.find(key[0].removeprefix("module "), attribute)])
        for node in found.imports:
            if self.lazy(node):
                yield from filter(None, (self.find(str(node.module), alias.name) for alias in node.names))  # type: ignore[union-attr]

    def collect(self, keys: set[Key]) -> None:
        """Everything that is read, and what the modules it stands in add to tables."""
        todo = list(keys)
        while todo:
            module, name = todo.pop()
            if module.startswith(("outside ", "module ")):
                if module.startswith("outside "):
                    self.outside[module.removeprefix("outside "), name] = ""
                continue
            statements = [self.module(module).defines[name]]
            statements += [s for s in self.module(module).statements if _registers(s.node)]
            for statement in statements:
                if id(statement) not in self.wanted:
                    self.wanted[id(statement)] = statement
                    if (module, statement.names[0] if statement.names else "") not in INSTEAD:
                        todo += self.reads(statement)

    def order(self) -> list[str]:
        """The modules that are in the file, each behind those it imports."""
        used, done = {s.module for s in self.wanted.values()}, []

        def visit(name: str, above: tuple[str, ...] = ()) -> None:
            if name in done or name in above or name.split(".")[1:2] == []:
                return
            for other in self.module(name).below():
                visit(other, (*above, name))
            done.append(name)

        for name in sorted(used):
            visit(name)
        return [name for name in done if name in used]

    # ---- what it is called

    def names(self, order: list[str]) -> dict[Key, str]:
        """A name in the file for everything that is needed; the plain one where only one thing has it."""
        keys: list[Key] = []
        for module in order:
            for statement in self.module(module).statements:
                if id(statement) in self.wanted:
                    keys += [(module, name) for name in statement.names]
        keys = list(dict.fromkeys(keys))
        plain: dict[str, list[Key]] = {}
        for key in keys:
            plain.setdefault(key[1], []).append(key)
        taken = {self.local_name(key) for key in self.outside}
        given = {}
        for name, sharing in plain.items():
            for key in sharing:
                alone = len(sharing) == 1 and name not in taken
                given[key] = name if alone else f"{name}_{key[0].rsplit('.', 1)[-1]}"
        return given

    @staticmethod
    def local_name(key: Key) -> str:
        """The name under which something of another package was imported."""
        return key[1].rpartition(" as ")[2] or key[0].split(".")[0]

    def outside_names(self) -> None:
        """Names for what comes from other packages: those it has, unless two things share one."""
        taken: dict[str, Key] = {}
        for key in sorted(self.outside):
            name = self.local_name(key)
            same = (
                name in taken
                and taken[name][0].split(".")[0] == key[0].split(".")[0]
                and key[1] == taken[name][1] == ""
            )
            if name in taken and not same:
                name = f"{name}_{key[0].replace('.', '_')}"
            taken.setdefault(name, key)
            self.outside[key] = name

    # ---- the file

    def source(self, roots: set[Key], config: ZooConfig) -> str:
        self.collect(roots)
        self.outside_names()
        order = self.order()
        names = self.names(order)
        parts = [_heading(config), "from __future__ import annotations", self.import_block()]
        for module in order:
            about = "\n".join(f"# {line}".rstrip() for line in self.module(module).about.splitlines())
            parts.append(f"# {'-' * 100}\n# {module}\n#\n{about}")
            for statement in self.module(module).statements:
                if id(statement) in self.wanted:
                    parts.append(self.text(statement, names))
        merged = "\n\n\n".join(parts) + "\n"
        merged = _own_namespace(merged)
        _check(merged, self.left_out())
        return merged

    def left_out(self) -> set[str]:
        """Names that stand behind an import that raises, and are never reached."""
        nodes = [node for s in self.wanted.values() for node in s.uses.imports if not self.lazy(node)]
        return {alias.asname or alias.name for node in nodes for alias in node.names}

    def import_block(self) -> str:
        lines = set()
        for (module, name), local in self.outside.items():
            original = name.partition(" as ")[0]
            if name == "":
                lines.add(f"import {module}")
            elif original == "":
                lines.add(f"import {module} as {local}")
            else:
                lines.add(f"from {module} import {original}" + ("" if original == local else f" as {local}"))
        return "\n".join(
            sorted(lines, key=lambda line: (line.split()[1].split(".")[0] not in sys.stdlib_module_names, line))
        )

    def text(self, statement: _Statement, names: dict[Key, str]) -> str:
        """A statement as it stands in the file."""
        module = self.module(statement.module)
        if statement.names and (key := (statement.module, statement.names[0])) in INSTEAD:
            return INSTEAD[key].replace(key[1], names[key], 1)
        lines = list(module.lines)
        for (line, start, last, end), new in sorted(self.edits(statement, names), reverse=True):
            lines[line - 1] = lines[line - 1][:start] + new.encode() + lines[last - 1][end:]
            del lines[line:last]
        removed = len(module.lines) - len(lines)
        return b"\n".join(lines[statement.first - 1 : int(statement.node.end_lineno or 0) - removed]).decode()

    def edits(self, statement: _Statement, names: dict[Key, str]) -> Iterator[tuple[tuple, str]]:
        """What changes in a statement: places and new text, none inside another."""

        def named(key: Key | None) -> str | None:
            if key is None:
                return None
            if key[0].startswith("outside "):
                return self.outside[key[0].removeprefix("outside "), key[1]]
            return names.get(key)

        found, whole = statement.uses, set()
        for name, attribute, where in found.attributes:
            key = self.find(statement.module, name)
            if key is not None and key[0].startswith("module "):
                new = named(self.find(key[0].removeprefix("module "), attribute))
                whole.add(where[:2])
                yield where, new or attribute
        for name, where in found.names:
            new = named(self.find(statement.module, name))
            if new is not None and new != name and where[:2] not in whole:
                yield where, new
        for node, name, where in found.local:
            alias = next(a for a in node.names if (a.asname or a.name) == name)
            new = named(self.find(str(node.module), alias.name)) if self.lazy(node) else None
            if new is not None and new != name:
                yield where, new
        for lazy in found.imports:
            root = str(lazy.module if isinstance(lazy, ast.ImportFrom) else lazy.names[0].name).split(".")[0]
            if self.lazy(lazy):
                yield place(lazy), f"pass  # {ast.unparse(lazy)}"
            elif root not in THERE | set(sys.stdlib_module_names):
                yield place(lazy), WITHOUT
        if isinstance(statement.node, ast.FunctionDef | ast.ClassDef):
            own = statement.names[0]
            new = names[statement.module, own]
            if new != own:
                line = statement.node.lineno
                start = self.module(statement.module).lines[line - 1].index(own.encode())
                yield (line, start, line, start + len(own.encode())), new


def _heading(config: ZooConfig) -> str:
    import zoo

    mixers = ", ".join(dict.fromkeys(config.mixer_names))
    return (
        f'"""A {config.task} model whose layers are {mixers}, in one file.\n\n'
        f"Put together from the sources of zoo {zoo.__version__} (Apache-2.0) by `zoo push --with-code`; do not edit.\n"
        "With the package installed it is not needed: `import zoo.models`, and the Auto classes know the model.\n"
        '"""'
    )


def _own_namespace(text: str) -> str:
    """Operators of torch have one name in a process: those of this file must not meet those of the package."""
    if 'Library("zoo"' not in text:
        return text
    text = text.replace('Library("zoo"', "Library(_NAMESPACE").replace(
        "torch.ops.zoo.", "getattr(torch.ops, _NAMESPACE)."
    )
    text = re.sub(r'f?"zoo::', 'f"{_NAMESPACE}::', text)
    name = '_NAMESPACE = "zoo_" + "".join(c if c.isalnum() else "_" for c in __name__)'
    return re.sub(r"\n\n\n# -{100}\n", lambda found: f"\n\n\n{name}{found[0]}", text, count=1)


def _check(text: str, left_out: set[str]) -> None:
    """Raise where the file would use a name that it does not have."""
    import builtins

    tree = ast.parse(text)
    there = set(dir(builtins)) | left_out | {"__name__", "__file__"}
    for node in tree.body:
        there |= set(defined(node))
        if isinstance(node, ast.Import | ast.ImportFrom):
            there |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.For):
            there |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
    annotations = {id(n) for a in _annotations(tree) for n in ast.walk(a)}
    seen = {place(n) for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) in annotations}
    for node in tree.body:
        for name, where in uses(node).names:
            assert name in there or where in seen, f"the code would lack {name} (line {where[0]})"


def _annotations(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.AST):
                yield part
