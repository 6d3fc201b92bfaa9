"""What a stage is made of: a digest of the code that it imports, on which it depends in dvc.yaml.

The digest covers the syntax of the stage's module, of the kinds that its parameters choose, and of what these import of
ours, but for `PLUMBING`. Comments, docstrings, layout and lists of kinds are not in it: who improves a comment, or adds
a kind, runs nothing again. Python 3.11, 3.12 and 3.13 give the same: their tokens of f-strings differ, their trees do
not.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ESTIMATES = ("kept", "kept_by_token", "least_weights", "example")  # methods of networks, denoisers
# No result depends on these: they check, find, store, tell, and share out work. What they read is a parameter or an
# input that counts by itself. They are not followed into what they import.
PLUMBING = {
    "pixelgen", "pixelgen.config", "pixelgen.errors", "pixelgen.estimate", "pixelgen.files", "pixelgen.manifest",
    "pixelgen.progress", "pixelgen.recipe", "pixelgen.recorders", "pixelgen.saving", "pixelgen.store",
    "pixelgen.threads", "pixelgen.data.executors",
    "pipeline", "pipeline.checkout", "pipeline.cluster", "pipeline.datasets", "pipeline.download", "pipeline.loopback",
    "pipeline.older", "pipeline.params", "pipeline.parts", "pipeline.rank", "pipeline.readers", "pipeline.runs",
    "pipeline.session", "pipeline.stage", "pipeline.stages", "pipeline.storage", "pipeline.store",
}


@functools.cache
def digest(stage: str, kinds: frozenset[str] = frozenset()) -> str:
    """16 hexadecimal digits that stand for the code of a stage with these kinds, each a "module:Class"."""
    modules = [f"pipeline.stages.{stage}", *(kind.partition(":")[0] for kind in kinds)]
    code = set[str]().union(*map(closure, modules))
    text = "\n".join([*sorted(kinds), *(f"{module} {canonical(parsed(module))}" for module in sorted(code))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def closure(module: str) -> set[str]:
    """A module and all of ours that it imports, directly or not, but for plumbing."""
    found, left = set[str](), {module}
    while left:
        found.add(name := left.pop())
        left |= {*imports(name)} - PLUMBING - found
    return found


def imports(module: str) -> Iterator[str]:
    """Our modules that a module imports, wherever in it that is, with the packages that they lie in."""
    for node in executed(parsed(module)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                if parts[0] in ("pixelgen", "pipeline") and source(part := ".".join(parts[:end])):
                    yield part


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker looks at."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from executed(node)


def source(module: str) -> Path | None:
    """The file of a module of ours; None if there is none of that name."""
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@functools.cache
def parsed(module: str) -> ast.Module:
    path = source(module)
    assert path, f"there is no module {module}"
    return ast.parse(path.read_bytes())


def without_result(node: object) -> bool:
    """Whether no result depends on a part of the code: a check, which refuses or does nothing; a list of kinds; a
    method that estimates alone call."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
        return node.value.func.id == "require"
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id == "kinds"
    return isinstance(node, ast.FunctionDef) and node.name in ESTIMATES


def canonical(node: object) -> str:
    """A syntax tree as text, without docstrings, what has no result, and empty fields, which differ between Pythons."""
    if isinstance(node, list):
        return f"[{','.join(map(canonical, node))}]"
    if without_result(node):
        return ""
    if not isinstance(node, ast.AST) or isinstance(node, ast.Constant):
        return repr(node.value if isinstance(node, ast.Constant) else node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields = [(name, value[1:] if name == "body" else value) for name, value in fields]
    return f"{type(node).__name__}({','.join(f'{name}={canonical(value)}' for name, value in fields)})"
