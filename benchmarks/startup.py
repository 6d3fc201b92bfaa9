"""What stages cost beside their work: the whole DAG at sizes of seconds, so that most of its time is starting things.

`python -m benchmarks.startup` runs `dvc repro` in a temporary workspace with the parameters of the tests of the
workflow, and prints the seconds between the starts of one stage and the next, DVC's own included.
"""

import re
import subprocess
import tempfile
import time
from pathlib import Path

from tests.e2e.test_workflow import tiny
from tests.e2e.workspace import environment, make


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        workspace = make(Path(folder), tiny)
        start = last = time.monotonic()
        running, process = "dvc", subprocess.Popen(["dvc", "repro"], cwd=workspace, env=environment(workspace),
                                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout
        for line in process.stdout:
            if found := re.match(r"Running stage '(.+)'", line):
                now = time.monotonic()
                print(f"{running:24}{now - last:6.1f}", flush=True)
                running, last = found[1], now
        print(f"{running:24}{time.monotonic() - last:6.1f}\n{'all':24}{time.monotonic() - start:6.1f}")
        assert process.wait() == 0


if __name__ == "__main__":
    main()
