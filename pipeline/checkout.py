"""Where things lie that git does not carry: runs and data.

DVC runs an experiment, from the queue or with `--temp`, in a checkout of its own below `.dvc/tmp/exps`. It has neither.
"""

from pathlib import Path


def main_checkout() -> Path:
    """The checkout whose experiment runs in the working directory; without one, the working directory."""
    for place in Path.cwd().parents:
        if place.parts[-3:] == (".dvc", "tmp", "exps"):
            return place.parents[2]
    return Path()


def runs() -> Path:
    """The folder of run directories. Experiments share that of the main checkout, so equal work is done once."""
    return main_checkout() / "runs"


def data_path(path: str | Path) -> Path:
    """Where a path in params.yaml leads. In an experiment, a relative path of something that git does not carry leads
    into the main checkout."""
    return Path(path) if Path(path).exists() else main_checkout() / path
