"""prompts: what to draw, as one file of GenEval's metadata.jsonl or of its kind, from a file, a URL or the demo."""

import json
import sys
from pathlib import Path, PurePosixPath

from pipeline.checkout import data_path
from pipeline.datasets import scenes
from pipeline.download import download
from pipeline.params import PromptsParams, resolved_params, stage_params
from pipeline.runs import run_stage
from pipeline.storage import Storage, fresh_directory
from pixelgen.metrics.geneval import TAGS
from pixelgen.prompts import read_prompts

OUT = Path("out/prompts")
DEMO_PROMPTS = 12  # of a tag, at most
LARGEST = 64 << 20  # bytes of a file of prompts


def main() -> None:
    key = sys.argv[1]
    params = stage_params(resolved_params("prompts").prompts, key, "prompts")
    out = fresh_directory(OUT / key)
    if params.source == "scenes":
        prompts = [{"name": f"{n:05}", **p} for n, p in enumerate(
            p for tag in TAGS for p in scenes.held_out(tag)[:DEMO_PROMPTS])]
    else:
        prompts = [{**p.metadata, "name": p.name} for p in read_prompts(local(params, out))]
    text = "".join(json.dumps(p) + "\n" for p in prompts)
    (out / "prompts.jsonl").write_text(text)
    Storage(None).publish(out, "prompts", params, prompts=len(prompts))


def local(params: PromptsParams, out: Path) -> Path:
    """The file or folder of the prompts; a URL is fetched into `out`."""
    assert params.path is not None
    if not params.path.startswith(("https://", "http://")):
        return data_path(params.path)
    target = out / ("source" + PurePosixPath(params.path).suffix)
    download(params.path, target, "fetch it on another machine and set path to the file", LARGEST)
    return target


if __name__ == "__main__":
    run_stage(main)
