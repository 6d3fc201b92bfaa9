"""The whole DAG by `dvc repro`, in a workspace of its own and at tiny sizes: what runs, what is rerun, what survives.

The tests go through one workspace in order, as a user would.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from pixelgen.cli import main
from pixelgen.metrics.geneval import list_images
from tests.e2e.workspace import digest, dvc, edit, environment, make, unmeasured, yaml

JUDGED = ("sample@geneval", "evaluate@geneval", "report")


def tiny(params):
    """The demo's parameters, cut down to seconds."""
    c2i = params["train"]["c2i"]
    c2i["fit"] |= {"steps": 30, "batch_size": 16, "checkpoint_every": 5, "log_every": 2, "grid_every": 15}
    c2i["grid_sampler"]["steps"] = 2
    params["sample"]["c2i"] |= {"per_prompt": 4, "part_size": 7}
    params["sample"]["c2i"]["sampler"] |= {"name": "euler", "steps": 3}
    for name, count in (("scenes-pretrain", 90), ("scenes-sft", 40)):
        params["datasets"][name]["sources"]["scenes"]["count"] = count
        params["datasets"][name]["rows_per_shard"] = 30
    for stage in ("t2i-256", "t2i-512", "sft"):
        params["train"][stage]["fit"] |= {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "log_every": 2,
                                          "grid_every": 4}
        params["train"][stage]["grid_sampler"]["steps"] = 2
    params["sample"]["geneval"] |= {"per_prompt": 2, "part_size": 30}
    params["sample"]["geneval"]["sampler"]["steps"] = 2
    params["evaluate"]["geneval"]["batch_size"] = 30


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make(tmp_path_factory.mktemp("workspace"), tiny)


def changed(workspace):
    """The stages that `dvc repro` would rerun for what is changed now, if whatever is rerun gives something new.

    A dry run names the first of them only; dvc.lock knows what each stage reads and writes.
    """
    listing = dvc(workspace, "repro", "--dry")
    found = {line.split("'")[1] for line in listing.splitlines() if line.startswith("Running stage")} - {"params"}
    stages = yaml.load(workspace / "dvc.lock")["stages"]

    def paths(names, kind):
        return [Path(entry["path"]) for name in names for entry in stages[name].get(kind, [])]

    while more := {name for name in stages.keys() - found if any(
            dep.is_relative_to(out) or out.is_relative_to(dep)
            for dep in paths([name], "deps") for out in paths(found, "outs"))}:
        found |= more
    return found


def test_a_mistake_in_params_stops_before_any_work(workspace):
    good = (workspace / "params.yaml").read_text()
    edit(workspace, lambda p: p["train"]["c2i"]["objective"].insert(0, "lpips_wieght", 0.1))
    printed = dvc(workspace, "repro", check=False)
    assert "train.c2i.objective: key: 'lpips_wieght' is not known (did you mean 'lpips_weight'?)" in printed
    assert "Running stage 'weights'" not in printed
    assert not (workspace / "out/weights").exists()
    (workspace / "params.yaml").write_text(good)


def test_repro_runs_everything(workspace):
    dvc(workspace, "repro")
    metrics = json.loads((workspace / "metrics/fid.json").read_text())
    assert metrics["extractor"] == "digits"
    assert metrics["samples"]["count"] == 40
    assert json.loads((workspace / "out/evaluate/fid/manifest.json").read_text())["figures"] == metrics
    assert "fid" not in metrics and metrics["fd_digits"] > metrics["fd_digits_floor"] > 0
    assert metrics["class_accuracy_heldout"] >= 0.97
    images = np.load(workspace / "out/sample/c2i/samples.npz")["arr_0"]
    labels = np.load(workspace / "out/sample/c2i/labels.npy")
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.uint8
    assert sorted(labels) == sorted([*range(10)] * 4) and list(labels) != sorted(labels)
    page = (workspace / "out/report/index.html").read_text()
    assert "Not comparable with the paper" in page and "data:image/png" in page and "http" not in page
    steps = [line.split(",")[0] for line in (workspace / "out/train/c2i/curve.csv").read_text().splitlines()]
    assert steps == ["step", *(str(s) for s in range(2, 31, 2))]
    assert [p.name for p in sorted((workspace / "out/train/c2i/grids").iterdir())] == [
        "step-00000015.png", "step-00000030.png"]


def test_training_needs_no_workflow(workspace):
    """In one process, without Ray, the steps of the stage's two ranks: the same checkpoints and model, to the bit."""
    command = [sys.executable, "-m", "pixelgen", "train", "params.yaml", "out/shard/digits", "alone", "--key", "c2i"]
    subprocess.run([*command, "--threads", "1"], cwd=workspace, env=environment(workspace), check=True)
    for name in ("raw", "ema", "projector"):
        path = f"model/{name}.safetensors"
        assert digest(workspace / "alone" / path) == digest(workspace / "out/train/c2i" / path)
    run, = (workspace / "runs/train@c2i").iterdir()
    for path in ("checkpoints/step-00000025.pt", "checkpoints/step-00000030.pt", "grids/step-00000030.png"):
        assert digest(workspace / "alone" / path) == digest(run / path)
    shutil.rmtree(workspace / "alone")


def test_text_goes_through_its_three_stages_and_is_judged(workspace):
    sizes = [json.loads((workspace / f"out/train/{s}/model/config.json").read_text())["config"]["image_size"]
             for s in ("t2i-256", "t2i-512", "sft")]
    assert sizes == [32, 64, 64]
    metrics = json.loads((workspace / "metrics/geneval.json").read_text())
    assert "geneval" not in metrics and metrics["detector"] == "geometric"
    assert metrics["geneval_demo"] <= 0.1 and metrics["geneval_demo_untrained"] <= 0.1, "four steps teach nothing"
    assert metrics["geneval_demo_rendered"] >= 0.99 and metrics["geneval_demo_shuffled"] <= 0.1
    samples = list_images(workspace / "out/sample/geneval/images")  # the benchmark's own layout
    records = [json.loads(line) for line in (workspace / "out/evaluate/geneval/results.jsonl").read_text().splitlines()]
    assert [r["filename"] for r in records] == [s.filename for s in samples]
    assert len(records) == metrics["samples"]["count"] == 2 * metrics["prompts"]
    assert np.asarray(Image.open(samples[0].path)).shape == (64, 64, 3)
    page = (workspace / "out/report/index.html").read_text()
    assert "✗ a photo of a circle: expected circle&gt;=1, found 0" in page and "shuffled" in page


def test_nothing_runs_again(workspace):
    assert "Data and pipelines are up to date." in dvc(workspace, "repro")


@pytest.mark.parametrize(("change", "rerun"), [
    (lambda p: p["sample"]["c2i"]["sampler"].update(guidance=3.0), {"sample@c2i", "evaluate@fid", "report"}),
    (lambda p: p["train"]["c2i"]["objective"].update(lpips_weight=0.2),
     {"train@c2i", "sample@c2i", "evaluate@fid", "report"}),
    (lambda p: p["evaluate"]["fid"].update(batch_size=99), {"evaluate@fid", "report"}),
    (lambda p: p["train"]["sft"]["optimizer"].update(lr=1e-5), {"train@sft", *JUDGED}),
    (lambda p: p["train"]["t2i-512"]["optimizer"].update(lr=1e-5), {"train@t2i-512", "train@sft", *JUDGED}),
])
def test_a_parameter_reruns_what_depends_on_it(workspace, change, rerun):
    before = (workspace / "params.yaml").read_text()
    edit(workspace, change)
    assert changed(workspace) == rerun
    (workspace / "params.yaml").write_text(before)


@pytest.mark.parametrize(("file", "rerun"), [
    ("README.md", set()),
    ("clusters/local.yaml", set()),
    ("pixelgen/samplers.py", {"sample@c2i", "evaluate@fid", *JUDGED}),
    ("pixelgen/losses.py", {"train@c2i", "train@t2i-256", "train@t2i-512", "train@sft", "sample@c2i", "evaluate@fid",
                            *JUDGED}),
    ("pixelgen/prompts.py", {"prompts@geneval", "sample@c2i", "evaluate@fid", *JUDGED}),
])
def test_an_edited_file_reruns_what_is_made_of_it(workspace, file, rerun):
    before = (workspace / file).read_text()
    (workspace / file).write_text(before + "\n# edited\n")
    assert changed(workspace) == rerun
    (workspace / file).write_text(before)


def test_samples_do_not_depend_on_the_size_of_parts_or_the_number_of_actors(workspace):
    """In one process, with parts of 3, against two actors with parts of 7."""
    program = """
import numpy as np, torch
from pixelgen import PixelGen
from pipeline.params import read_params
torch.set_num_threads(1)
params = read_params().sample["c2i"]
model = PixelGen.from_pretrained("out/train/c2i/model")
drawn = [model.generate([i % 10 for i in part], [params.seed + i for i in part], params.sampler, 32)
         for part in np.array_split(np.arange(40), 14)]
order = np.random.default_rng(0).permutation(40)
stored = np.load("out/sample/c2i/samples.npz")["arr_0"]
assert np.array_equal(np.concatenate(drawn)[order], stored)
"""
    subprocess.run([sys.executable, "-c", program], cwd=workspace, env=environment(workspace), check=True)


def test_training_survives_kill_9(workspace):
    """dvc, and with it nothing else, is killed in the middle; the next repro takes over and ends at the same bits."""
    model, curve = workspace / "out/train/c2i/model", workspace / "out/train/c2i/curve.csv"
    undisturbed = {p.name: digest(p) for p in model.iterdir()}
    losses = unmeasured(curve.read_text())
    for path in ("runs", "out/train/c2i", ".dvc/cache"):  # from its cache, dvc would bring back what was deleted
        shutil.rmtree(workspace / path)
    process = subprocess.Popen(["dvc", "repro", "train@c2i"], cwd=workspace, env=environment(workspace),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not any(workspace.glob("runs/train@c2i/*/checkpoints/step-*.pt")):
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    (run,) = workspace.glob("runs/train@c2i/*")
    assert not (run / "checkpoints/step-00000030.pt").exists(), "killed too late to show anything"
    dvc(workspace, "repro", "train@c2i")
    assert {p.name: digest(p) for p in model.iterdir()} == undisturbed
    assert unmeasured(curve.read_text()) == losses


@pytest.mark.parametrize("patch", ["", "cluster.Cluster.here = lambda *_: False"], ids=["in process", "ray train"])
def test_one_worker_gives_the_bits_of_two(workspace, patch):
    """Training and sampling in one process, without Ray, or with a single worker of Ray's."""
    files = [p for name in ("train/c2i/model", "sample/c2i") for p in sorted((workspace / "out" / name).iterdir())]
    before = {path: digest(path) for path in files}
    for path in ("runs/train@c2i", "runs/sample@c2i", "out/train/c2i", "out/sample/c2i"):
        shutil.rmtree(workspace / path, ignore_errors=True)
    program = f"""import sys
from pipeline import cluster
{patch}
from pipeline.stages import sample, train
for stage in (train, sample):
    sys.argv = [stage.__name__, "c2i"]
    stage.main()
assert ("ray" in sys.modules) == {bool(patch)}"""
    subprocess.run([sys.executable, "-c", program], cwd=workspace, check=True,
                   env=environment(workspace) | {"PIXELGEN_CLUSTER": "one"})
    assert {path: digest(path) for path in files} == before


def test_a_lost_model_file_is_not_passed_over(workspace):
    """A damaged artifact stops the stage that would read it."""
    (workspace / "out/sample/c2i/labels.npy").write_bytes(b"damaged")
    done = subprocess.run([sys.executable, "-m", "pipeline.stages.evaluate", "fid"], cwd=workspace,
                          env=environment(workspace), text=True, capture_output=True)
    assert done.returncode != 0 and "labels.npy is not the file that the manifest describes" in done.stderr


def test_weights_of_the_trained_model_are_finite_and_distinct(workspace):
    ema, raw = (load_file(workspace / f"out/train/c2i/model/{n}.safetensors") for n in ("ema", "raw"))
    assert ema.keys() == raw.keys() and all(np.isfinite(v).all() for v in ema.values())
    assert any((ema[k] != raw[k]).any() for k in ema)


def test_the_command_line_draws_from_the_trained_model(workspace, capsys):
    picture = workspace / "digits.png"
    arguments = ["sample", str(workspace / "out/train/c2i/model"), str(picture), "--steps", "2", "--labels"]
    assert main([*arguments, "0", "1", "2"]) == 0
    assert Image.open(picture).size == (3 * 34 - 2, 32)
    assert main([*arguments, "10"]) == 1
    assert "labels [10] are outside 0 to 9" in capsys.readouterr().err
