"""Files of prompts, and the folders of images that benchmarks read.

A prompt file is GenEval's `metadata.jsonl` (one JSON object a line, with "prompt"), a text file with one prompt a line,
or a folder of text files with one prompt each, as DPG-Bench comes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixelgen.config import ConfigError, choose, require

if TYPE_CHECKING:  # the check of parameters imports this module, and shall be quick
    import numpy as np

LAYOUTS = ("geneval", "dpg")
DPG_IMAGES = 4  # in the 2×2 picture of each prompt


@dataclass(frozen=True)
class Prompt:
    name: str  # of the folder or file that its images go to
    text: str
    metadata: Mapping[str, Any]  # what metadata.jsonl says of it


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file or folder, in its order (a folder: by name). ConfigError names what cannot be used."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        hidden = [f.name for f in files if f.name.startswith(".")]  # "...txt" would become the folder above
        require(not hidden, f"{path}: names with a dot in front are no prompts: remove {', '.join(hidden)}")
        require(bool(files), f"{path}: no .txt files: a folder of prompts has one in each")
        return [Prompt(f.stem, text, {"prompt": text}) for f in files for text in [_filled(_read(f).strip(), str(f))]]
    lines = _read(path).splitlines()
    require(any(line.strip() for line in lines), f"{path}: no prompts in it")
    parse = _metadata if path.suffix == ".jsonl" else lambda line, where: {"prompt": line.strip()}
    described = [parse(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    return [Prompt(f"{n:05}", _filled(d.get("prompt"), f"{path}, prompt {n}"), d) for n, d in enumerate(described)]


def _read(path: Path) -> str:
    require(path.is_file(), f"{path}: no such file of prompts")  # nor a pipe, which might never end
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None


def _metadata(line: str, where: str) -> dict[str, Any]:
    try:
        described = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(described, dict):
        raise ConfigError(f"{where}: not a JSON object, but {line[:40]!r}")
    return described


def _filled(text: Any, where: str) -> str:
    require(isinstance(text, str) and bool(text.strip()), f"{where}: there is no prompt")
    require(not any("\ud800" <= c <= "\udfff" for c in text), f"{where}: half a character, which JSON can hold")
    return text


def check_layout(layout: str, per_prompt: int) -> None:
    choose(layout, LAYOUTS, "layout")
    require(layout != "dpg" or per_prompt == DPG_IMAGES,
            f"{per_prompt} images per prompt: the layout of DPG-Bench shows {DPG_IMAGES} of each")


def write_images(layout: str, directory: Path, prompt: Prompt, images: np.ndarray) -> None:
    """The images (N, H, W, 3) uint8 of one prompt, where a benchmark looks for them in `directory`.

    geneval: NAME/metadata.jsonl, NAME/samples/NNNN.png and NAME/grid.png. dpg: NAME.png, two by two.
    """
    from pixelgen.images import grid

    if layout == "dpg":
        grid(images, columns=2, gap=0).save(directory / f"{prompt.name}.png")
        return
    samples = directory / prompt.name / "samples"
    samples.mkdir(parents=True)
    (directory / prompt.name / "metadata.jsonl").write_text(json.dumps(prompt.metadata) + "\n")
    for n in range(len(images)):
        grid(images[n:n + 1], columns=1).save(samples / f"{n:04}.png")
    grid(images, columns=2).save(directory / prompt.name / "grid.png")
