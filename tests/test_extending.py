"""The worked examples of docs/extending.md do what they say, in as many files as it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/extending.md").read_text()
CHAPTERS = {title: text for title, text in re.findall(r"^## Add (.*?)\n(.*?)(?=^## |\Z)", GUIDE, re.M | re.S)}
TERM = "a term of the objective"
MOST = {"a denoiser": 3}  # files beside the test; others: 2


def add(chapter: str, to: Path) -> list[str]:
    """Do what a chapter says -> the files that were written or changed."""
    touched = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", chapter, re.M | re.S):
        head, _, body = text.partition("\n")
        name = head.split()[1]
        if language == "python":
            assert not (to / name).exists(), name
            (to / name).write_text(body)
        elif language == "diff":
            lines = body.splitlines(keepends=True)
            before, after = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
            old = (to / name).read_text()
            assert old.count(before) == 1, f"{name} has not one place of:\n{before}"
            (to / name).write_text(old.replace(before, after))
        else:
            continue
        touched.append(name)
    return [*dict.fromkeys(touched)]


def digests(path: Path) -> str:
    """Of the code of every instance of a stage of the demo."""
    program = "import json; from pipeline.params import *; print(json.dumps(code_digests(read_params())))"
    return subprocess.run([sys.executable, "-c", program], cwd=path, text=True, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository with all examples in it, and the files of each."""
    path = tmp_path_factory.mktemp("extended")
    for name in ("pixelgen", "pipeline", "tests", "clusters", "presets"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "pyproject.toml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, path / name)
    files = {title: add(text, path) for title, text in CHAPTERS.items() if title != TERM}
    assert digests(path) == digests(ROOT), "nothing runs again for what is not chosen"
    return path, files | {TERM: add(CHAPTERS[TERM], path)}


def test_each_room_has_an_example():
    table = re.findall(r"^\| (a .*?) \|.*\| (\d) \|$", GUIDE, re.M)
    assert {title.partition(",")[0]: int(files) for title, files in table} == {
        title: MOST.get(title, 2) for title in (*CHAPTERS, "a source of prompts")}


@pytest.mark.parametrize("title", CHAPTERS)
def test_an_example_touches_few_files_and_passes_its_test(extended, title):
    path, files = extended
    code = [name for name in files[title] if not name.startswith("tests/")]
    (test,) = {*files[title]} - {*code}
    assert len(code) <= MOST.get(title, 2), code
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", test], cwd=path,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


def test_what_follows_from_the_lists_knows_the_examples(extended):
    path, _ = extended
    schema = subprocess.run([sys.executable, "-m", "pipeline", "params", "schema"], cwd=path, text=True,
                            capture_output=True, check=True).stdout
    assert all(f'"{kind}": {{' in schema for kind in ("midpoint", "csv_folder", "edges", "random", "sharpness"))
    drawing = subprocess.run([sys.executable, "-m", "pixelgen", "sample", "--help"], cwd=path, text=True,
                             capture_output=True, check=True).stdout
    assert "midpoint" in drawing and "--place" in drawing


def test_the_examples_pass_the_static_checks(extended):
    path, _ = extended
    for command in ("ruff", "check", "."), ("mypy",):
        done = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], cwd=path, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout
