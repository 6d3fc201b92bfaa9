"""The static checks, and what the repository promises about itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"], ["lint-imports"]], ids=lambda c: c[0])
def test_static_checks(command):
    tool = Path(sys.executable).parent / command[0]
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


def test_the_lock_pins_everything_and_names_no_host():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert all(re.match(r"^[A-Za-z0-9_.-]+(\[[a-z0-9,-]+\])?==[^ ;]+( ; .+)?$", line) for line in lines)


def test_the_lock_covers_every_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    names = {canonical(re.split(r"[\[>=; ]", d)[0]) for d in wanted}
    locked = {canonical(line.split("==")[0]) for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert names <= locked, names - locked


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()
