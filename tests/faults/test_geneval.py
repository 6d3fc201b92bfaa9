"""Faults while images are judged by GenEval's rules, one after another in the life of one run: scenes rendered from
their prompts stand for drawn ones, so that no model is needed."""

import shutil

import numpy as np
import pytest

from pipeline.demo import scenes
from pipeline.params import read_params
from pipeline.storage import Storage, fresh_directory
from pixelgen.metrics.geneval import TAGS
from pixelgen.prompts import Prompt, write_images
from tests.faults.table import fault
from tests.faults.workspace import Workspace, build_empty, flip, keep

PER_PROMPT = 12
PARTS = 29  # one for each prompt


def judged(params):
    """The demo's parameters, with few images in a part, and no figures but those of the samples."""
    params["sample"]["geneval"]["per_prompt"] = PER_PROMPT
    params["evaluate"]["geneval"]["metric"]["demo_geneval"] = {"batch_size": PER_PROMPT, "baselines": False}


@pytest.fixture(scope="module")
def geneval(workspace, tmp_path_factory):
    """A workspace whose samples are rendered, half of them from another prompt, and have been judged once."""
    folder = tmp_path_factory.mktemp("geneval")
    geneval = Workspace(build_empty(folder / "work", judged), folder / "kept", {"evaluate": ["geneval"]})
    shutil.copytree(workspace.kept / "out/networks", geneval.path / "out/networks")
    out, random = fresh_directory(geneval.path / "out/sample/geneval"), np.random.default_rng(0)
    prompts = [p for tag in TAGS for p in scenes.held_out(tag)[:12]]
    (out / "images").mkdir()
    for number, (prompt, other) in enumerate(zip(prompts, prompts[1:] + prompts[:1], strict=True)):
        images = [scenes.render(scenes.place(p, random), 64, random) for p in [prompt, other] * (PER_PROMPT // 2)]
        write_images("geneval", out / "images", Prompt(f"{number:05}", prompt["prompt"], prompt),
                     np.stack([np.asarray(image) for image in images]))
    params = read_params(geneval.path / "params.yaml").sample["geneval"]
    Storage(None).publish(out, "samples", params, images=len(prompts) * PER_PROMPT)
    geneval.finish("evaluate")
    keep(geneval)
    geneval.forget("evaluate")
    return geneval


@fault("SIGTERM, as before a machine is taken away", "evaluate (GenEval)", "exit status 143; started again, it goes on")
@fault("kill -9 of the stage", "evaluate (GenEval)", "started again, it goes on with the images that are not judged")
@fault("kill -9 of an actor", "evaluate (GenEval)", "Ray Data does its part again")
@fault("a flipped bit in a finished part", "evaluate (GenEval)",
       "one line names it; started again, it alone is redone")
def test_geneval(geneval, identical):
    with geneval.started(geneval.call("evaluate")) as process:
        process.until(geneval.more_parts("evaluate"))
        assert process.terminate() == "finished work is kept"
    with geneval.started(geneval.call("evaluate")) as process:
        process.until(geneval.more_parts("evaluate"))
        process.kill()
    finished = geneval.written("evaluate")
    with geneval.started(geneval.call("evaluate")) as process:
        process.until(geneval.more_parts("evaluate"))
        assert len(geneval.parts("evaluate")) < PARTS, "killed too late to show anything"
        process.until(lambda: process.ray("MapWorker"))[0].kill()
        assert process.wait() == 0, process.printed()
    files = geneval.same("evaluate")
    assert finished < geneval.written("evaluate"), "finished parts are not redone"
    flip(geneval.parts("evaluate")[3])
    assert "part-000036.jsonl of" in (line := geneval.refused("evaluate")) and "redo it alone" in line
    assert len(geneval.parts("evaluate")) == PARTS - 1
    geneval.finish("evaluate")
    assert geneval.same("evaluate") == files
    for _ in range(4):
        identical(f"{files} files")
