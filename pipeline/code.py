"""What a stage is made of: a digest of the code that it imports, on which it depends in dvc.yaml.

The digest is over the syntax of the stage's module and of all that it imports of ours, but for `PLUMBING`. No comment,
docstring or layout is in it, so whoever improves one of these runs nothing again. It is the same under Python 3.11,
3.12 and 3.13: their tokens of f-strings differ, their syntax trees do not.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("weights", "shard", "reference", "train", "prompts", "sample", "evaluate", "report")
# No result depends on these: they check, find, store, tell, and share out work. What they read is a parameter or an
# input that counts by itself. They are not followed into what they import.
PLUMBING = {
    "pixelgen", "pixelgen.config", "pixelgen.errors", "pixelgen.estimate", "pixelgen.files", "pixelgen.manifest",
    "pixelgen.progress", "pixelgen.recipe", "pixelgen.recorders", "pixelgen.saving", "pixelgen.store",
    "pixelgen.threads", "pixelgen.data.executors",
    "pipeline", "pipeline.checkout", "pipeline.cluster", "pipeline.download", "pipeline.loopback", "pipeline.older",
    "pipeline.params", "pipeline.parts", "pipeline.rank", "pipeline.readers", "pipeline.runs", "pipeline.session",
    "pipeline.storage", "pipeline.store", "pipeline.stages",
}


def digests() -> dict[str, str]:
    """The digest of each stage."""
    return {stage: digest(stage) for stage in STAGES}


@functools.cache
def digest(stage: str) -> str:
    """16 hexadecimal digits that stand for the code of a stage."""
    text = "\n".join(f"{module} {canonical(parsed(module))}" for module in sorted(closure(f"pipeline.stages.{stage}")))
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


def canonical(node: object) -> str:
    """A syntax tree as text, without docstrings, and without the empty fields, of which each Python has others."""
    if isinstance(node, list):
        return f"[{','.join(map(canonical, node))}]"
    if not isinstance(node, ast.AST) or isinstance(node, ast.Constant):
        return repr(node.value if isinstance(node, ast.Constant) else node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields = [(name, value[1:] if name == "body" else value) for name, value in fields]
    return f"{type(node).__name__}({','.join(f'{name}={canonical(value)}' for name, value in fields)})"
