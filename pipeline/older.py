"""What versions before defaults and identities have left: parameters to rewrite, outputs and runs to keep."""

import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from pipeline.storage import run_name
from pipeline.store import open_store
from pixelgen.config import RunConfig, defaults_of, load, require
from pixelgen.errors import StorageError
from pixelgen.manifest import IDENTITY, MANIFEST, identity, read_manifest
from pixelgen.recipe import check_yaml
from pixelgen.store import write_atomic

OUT = Path("out")
MOVED = [field.name for field in dataclasses.fields(RunConfig)]  # from fit, or from beside it, to run


def check_form(data: Any, path: Path) -> None:
    """ConfigError, with the remedy, for a params.yaml that had to say everything."""
    require(not any("grid_sampler" in recipe or "checkpoint_every" in mapping(recipe.get("fit"))
                    for recipe in recipes(data)),
            f"{path} has the form of an earlier version: `python -m pipeline params migrate {path} --write` rewrites "
            "it")


def mapping(value: Any) -> Any:
    """What should be a mapping, if it is one; else an empty one. What is wrong is said later, where it is read."""
    return value if isinstance(value, Mapping) else {}


def recipes(data: Any) -> list[Any]:
    """The mappings under `train`, as far as there are any."""
    return [recipe for recipe in mapping(mapping(data).get("train")).values() if isinstance(recipe, Mapping)]


def migrated(path: Path, cls: type) -> str:
    """The text of a file of parameters, which `cls` reads, in today's form: what equals a default is gone, comments
    stay with what does not. ConfigError, or YAMLError, if it is no such file."""
    text = path.read_text("utf-8")
    check_yaml(text)
    yaml = YAML()
    yaml.width = 120
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    data = yaml.load(text)
    require(isinstance(data, Mapping), f"{path}: expected a mapping of sections")
    for recipe in recipes(data):
        run = recipe.setdefault("run", CommentedMap())
        for name in MOVED:
            for place in (recipe, mapping(recipe.get("fit"))):
                if name in place:
                    run[name] = place.pop(name)
    for dataset in mapping(data.get("datasets")).values():
        if mapping(dataset).get("heldout", 0) is None:
            del dataset["heldout"]
    reduce(data, load(cls, data))
    new = io.StringIO()
    yaml.dump(data, new)
    return new.getvalue()


def reduce(written: Any, value: Any, default: Any = dataclasses.MISSING) -> None:
    """Delete from a mapping what the loaded `value` has without it: as in `default`, or by its class."""
    if isinstance(value, dict):
        for key, inner in value.items():
            reduce(written[key], inner)
    elif dataclasses.is_dataclass(value):
        for name, usual in defaults_of(type(value), default).items():
            if name in written and getattr(value, name) == usual:
                del written[name]
            elif name in written:
                reduce(written[name], getattr(value, name),
                       usual if dataclasses.is_dataclass(usual) else dataclasses.MISSING)


def outputs() -> Iterator[Path]:
    """Folders of finished outputs, without a look into them: they may hold millions of files."""
    for depth in ("*", "*/*", "*/*/*"):
        yield from (path.parent for path in sorted(OUT.glob(f"{depth}/{MANIFEST}")))


def finished_stages() -> Iterator[str]:
    """Stages, as DVC calls them, whose outputs are all there."""
    for folder in outputs():
        stage, *key = folder.relative_to(OUT).parts
        if stage != "train" or all((OUT / "train" / key[0] / name).exists() for name in ("curve.csv", "grids")):
            yield "@".join([stage, *key[:1]])


def older_outputs() -> Iterator[Path]:
    """Folders of finished outputs without an identity."""
    return (folder for folder in outputs() if not (folder / IDENTITY).exists())


def refuse_older_outputs() -> None:
    """StorageError, with the remedy, before DVC deletes what an earlier version has made."""
    if found := next(older_outputs(), None):
        raise StorageError(f"{found} was made by an earlier version: `python -m pipeline adopt` keeps all that "
                           f"lies in {OUT}; delete that folder to make it anew")


def adopt() -> Iterator[str]:
    """Give the outputs of an earlier version their identity -> a line for each."""
    for folder in [*older_outputs()]:
        told = identity(read_manifest(folder, None))
        write_atomic(folder / IDENTITY, f"{told}\n".encode())
        yield f"{folder}: {told}"


def refuse_older_runs(key: str, new: Path, root: str | None) -> None:
    """StorageError, with the remedy, where a training would begin in `new`, anew, beside what an earlier version has of
    it, here or under a storage root."""
    if new.exists():
        return
    if root:  # all of it lies there, and here at most a part
        old = [f"{root}/{name.partition('/checkpoints/')[0]}"
               for name in open_store(root).sizes(f"runs/train@{key}/") if "/checkpoints/" in name]
    else:
        old = [str(path.parent) for path in (new.parents[1] / f"train@{key}").glob("*/checkpoints")]
    if old:
        new.parent.mkdir(parents=True, exist_ok=True)
        to = f"{root}/{run_name(new)}" if root else new
        raise StorageError(f"{old[0]} holds a training of an earlier version: if its parameters and data are those of "
                           f"now, move it to {to}, which goes on with it; if not, delete it")
