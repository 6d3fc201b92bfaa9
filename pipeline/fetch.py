"""`python -m pipeline.fetch out/train/c2i/model` prints where the files of an output lie on this machine, checked; what
lies under a storage root is downloaded first. With `--to DIRECTORY` they are copied there."""

import argparse
import shutil
import sys
from pathlib import Path

from pipeline.params import read_params
from pipeline.storage import Storage
from pixelgen.config import require
from pixelgen.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.fetch", description=__doc__)
    parser.add_argument("output", type=Path, help="a directory with a manifest, such as out/train/c2i/model")
    parser.add_argument("--to", type=Path, help="a new directory for the files")
    arguments = parser.parse_args()
    try:
        require(not arguments.to or not arguments.to.exists(), f"{arguments.to} exists already: name a new directory")
        folder = Storage(read_params().storage.root).open(arguments.output, None).local()
        if arguments.to:
            shutil.copytree(folder, arguments.to)
    except UserError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    print(arguments.to or folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
