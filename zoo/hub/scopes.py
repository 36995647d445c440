"""Which names in a piece of Python source mean something outside it, and where they stand.

For each top-level statement of a module: the places at which it reads a name of the module, and the imports inside its
functions. That is what one needs to put statements of several modules into one file under other names.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

Place = tuple[int, int, int, int]  # line, column, line and column of the end, as ast counts them


@dataclass
class Uses:
    """What a statement reads. names: (name, where). attributes: (name, attribute, where) for ``name.attribute``.

    imports: import statements inside functions. local: at a place, what an import inside the function bound there.
    """

    names: list[tuple[str, Place]] = field(default_factory=list)
    attributes: list[tuple[str, str, Place]] = field(default_factory=list)
    imports: list[ast.Import | ast.ImportFrom] = field(default_factory=list)
    local: list[tuple[ast.ImportFrom, str, Place]] = field(default_factory=list)


def uses(statement: ast.stmt) -> Uses:
    """What a top-level statement reads of its module."""
    walker = _Walker()
    walker.visit(statement)
    return walker.found


def defined(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return _stored(statement)
    return []


def place(node: ast.expr | ast.stmt) -> Place:
    """Where a node stands."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _stored(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def _bound(node: ast.AST) -> dict[str, ast.ImportFrom | None]:
    """Names local to a function, with the import that binds each, if one does; inner functions keep theirs."""
    found: dict[str, ast.ImportFrom | None] = {}
    outer: set[str] = set()
    todo: list[ast.AST] = list(node.body) if isinstance(node.body, list) else [node.body]  # type: ignore[attr-defined]
    args = node.args  # type: ignore[attr-defined]
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            found[arg.arg] = None
    while todo:
        part = todo.pop()
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[part.name] = None
            todo += part.decorator_list
            continue
        if isinstance(part, ast.Lambda | _COMPREHENSIONS):
            todo += [n.target for n in ast.walk(part) if isinstance(n, ast.NamedExpr)]
            continue
        if isinstance(part, ast.Import | ast.ImportFrom):
            for alias in part.names:
                of = part if isinstance(part, ast.ImportFrom) else None
                found[alias.asname or alias.name.split(".")[0]] = of
        elif isinstance(part, ast.Global):
            outer |= set(part.names)
        elif isinstance(part, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and part.name:
            found[part.name] = None
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store | ast.Del):
            found[part.id] = None
        todo += ast.iter_child_nodes(part)
    return {name: by for name, by in found.items() if name not in outer}


class _Walker(ast.NodeVisitor):
    """Follows scopes as Python does: functions see those around them, class bodies are seen by nobody."""

    def __init__(self) -> None:
        self.found = Uses()
        self.scopes: list[tuple[dict[str, ast.ImportFrom | None], bool]] = []  # and whether it is of a class

    def local(self, name: str) -> tuple[bool, ast.ImportFrom | None]:
        """Whether a name is one of a function, and the import that bound it there."""
        for i, (names, of_class) in enumerate(reversed(self.scopes)):
            if name in names and (not of_class or i == 0):
                return True, names[name]
        return False, None

    def visit_Name(self, node: ast.Name) -> None:
        inside, by = self.local(node.id)
        if by is not None:
            self.found.local.append((by, node.id, place(node)))
        elif not inside:
            self.found.names.append((node.id, place(node)))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and not self.local(node.value.id)[0]:
            self.found.attributes.append((node.value.id, node.attr, place(node)))
        self.visit(node.value)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.imports.append(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.found.imports.append(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.around(node)
        self.scopes.append((_bound(node), False))
        for part in node.body:
            self.visit(part)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.around(node)
        self.scopes.append((_bound(node), False))
        self.visit(node.body)
        self.scopes.pop()

    def around(self, node: ast.FunctionDef | ast.Lambda) -> None:
        """Decorators, defaults and annotations, which belong to the scope outside."""
        for part in (*getattr(node, "decorator_list", ()), getattr(node, "returns", None)):
            if part is not None:
                self.visit(part)
        self.visit(node.args)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        inner = {part.name for part in node.body if isinstance(part, functions)}
        inner |= {name for part in node.body if not isinstance(part, functions) for name in _stored(part)}
        self.scopes.append((dict.fromkeys(inner), True))
        for part in node.body:
            self.visit(part)
        self.scopes.pop()

    def comprehension(self, node: ast.expr) -> None:
        generators = node.generators  # type: ignore[attr-defined]
        names: dict[str, ast.ImportFrom | None] = {n: None for g in generators for n in _stored(g.target)}
        self.visit(generators[0].iter)
        self.scopes.append((names, False))
        for i, generator in enumerate(generators):
            if i:
                self.visit(generator.iter)
            self.visit(generator.target)
            for condition in generator.ifs:
                self.visit(condition)
        for part in ("elt", "key", "value"):
            if hasattr(node, part):
                self.visit(getattr(node, part))
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension  # type: ignore[assignment]
