"""The table of docs/reliability.md: `python -m tests.faults.table` writes it from what the last tests found."""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- begin: written by python -m tests.faults.table -->", "<!-- end -->"
RESULTS = ROOT / ".pytest_cache/faults"


@dataclass(frozen=True)
class Fault:
    """A row: what is done to which stage, and what comes of it."""

    what: str
    stage: str
    outcome: str


FAULTS: dict[str, list[Fault]] = {}  # by the name of the test


def fault(what, stage, outcome):
    """Enter a row of a test into the table. The test has to show the outcome, and then to say with `identical` what
    is the same as without the fault, for each of its rows in turn."""
    def register(test):
        FAULTS.setdefault(test.__name__, []).insert(0, Fault(what, stage, outcome))  # decorators come last first
        return test

    return register


def all_faults():
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.faults.{path.stem}")
    return FAULTS


def row(fault, identical):
    return f"| {fault.what} | {fault.stage} | {fault.outcome} | {identical} |"


def committed():
    """The rows on the page, without its two lines of headings."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]


def main():
    found = []
    for name, faults in all_faults().items():
        path = RESULTS / name
        results = json.loads(path.read_text()) if path.is_file() else None
        if not results or len(results) != len(faults):
            sys.exit(f"{name} has not passed here: run python -m pytest tests/faults")
        found += [row(fault, result) for fault, result in zip(faults, results, strict=True)]
    head, tail = PAGE.read_text().split(BEGIN)[0], PAGE.read_text().split(END)[1]
    lines = ["| fault | stage | what happens | identical in the end |", "|---|---|---|---|", *found]
    PAGE.write_text("\n".join([head + BEGIN, *lines, END + tail]))


if __name__ == "__main__":
    from tests.faults.table import main as imported  # the test modules enter themselves into that one's table

    imported()
