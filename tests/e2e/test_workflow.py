"""The whole DAG by `dvc repro`, in a workspace of its own and at tiny sizes: what runs, what is rerun, what survives.

The tests go through one workspace in order, as a user would.
"""

import contextlib
import json
import re
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
DRAWN = ("sample@c2i", "evaluate@fid", *JUDGED)
TRAINED = ("train@c2i", "train@t2i-256", "train@t2i-512", "train@sft")


def tiny(params):
    """The demo's parameters, cut down to seconds."""
    c2i = params["train"]["c2i"]
    c2i["fit"] |= {"steps": 30, "batch_size": 16}
    c2i["run"] |= {"checkpoint_every": 5, "log_every": 2, "grid_every": 15}
    c2i["run"]["grid_sampler"]["euler"]["steps"] = 2
    params["sample"]["c2i"] |= {"per_prompt": 4, "part_size": 7}
    params["sample"]["c2i"]["sampler"] = {"euler": {"steps": 3, "guidance": 2.5, "interval": [0.1, 1.0]}}
    for name, count in (("scenes-pretrain", 90), ("scenes-sft", 40)):
        params["datasets"][name]["sources"]["scenes"]["scenes"]["count"] = count
        params["datasets"][name]["rows_per_shard"] = 30
    for stage in ("t2i-256", "t2i-512", "sft"):
        params["train"][stage]["fit"] |= {"steps": 4, "batch_size": 8}
        params["train"][stage]["run"] |= {"checkpoint_every": 2, "log_every": 2, "grid_every": 4}
        params["train"][stage]["run"]["grid_sampler"]["euler"]["steps"] = 2
    params["sample"]["geneval"] |= {"per_prompt": 2, "part_size": 30}
    params["sample"]["geneval"]["sampler"]["adams_bashforth"]["steps"] = 2
    params["evaluate"]["geneval"]["metric"]["demo_geneval"]["batch_size"] = 30


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make(tmp_path_factory.mktemp("workspace"), tiny)


def changed(workspace):
    """The stages that `dvc repro` would rerun for what is changed now, if whatever is rerun gives something new.

    The first stage works out what has another meaning. A dry run then names the first of the others only; dvc.lock
    knows what each stage reads and writes.
    """
    dvc(workspace, "repro", "params")
    listing = dvc(workspace, "repro", "--dry")
    found = {line.split("'")[1] for line in listing.splitlines() if line.startswith("Running stage")}
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
    edit(workspace, lambda p: p["train"]["c2i"]["objective"]["lpips"].update(wieght=0.1))
    printed = dvc(workspace, "repro", check=False)
    assert "train.c2i.objective.lpips: key: 'wieght' is not known (did you mean 'weight'?)" in printed
    assert "Running stage 'networks'" not in printed
    assert not (workspace / "out/networks").exists()
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


def alone_in(workspace, name):
    """A training without the workflow, by params.yaml -> its folder."""
    command = [sys.executable, "-m", "pixelgen", "train", "params.yaml", "out/shard/digits", name, "--key", "c2i"]
    subprocess.run([*command, "--threads", "1"], cwd=workspace, env=environment(workspace), check=True)
    return workspace / name


def run_of(workspace, key):
    """The run directory that a trained model is of."""
    return workspace / json.loads((workspace / f"out/train/{key}/model/manifest.json").read_text())["run"]


def commit(workspace):
    subprocess.run(["git", "add", "-A"], cwd=workspace, check=True)
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "a run"], cwd=workspace,
                   check=True)


def test_training_needs_no_workflow(workspace):
    """In one process, without Ray, the steps of the stage's two ranks: the same checkpoints and model, to the bit."""
    alone_in(workspace, "alone")
    for name in ("raw", "ema", "projector"):
        path = f"model/{name}.safetensors"
        assert digest(workspace / "alone" / path) == digest(workspace / "out/train/c2i" / path)
    run = run_of(workspace, "c2i")
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
    commit(workspace)


@pytest.mark.parametrize(("change", "rerun"), [
    (lambda p: p["sample"]["c2i"]["sampler"]["euler"].update(guidance=3.0), {"sample@c2i", "evaluate@fid", "report"}),
    (lambda p: p["train"]["c2i"]["objective"]["lpips"].update(weight=0.2),
     {"train@c2i", "sample@c2i", "evaluate@fid", "report"}),
    (lambda p: p["evaluate"]["fid"]["metric"]["adm"].update(batch_size=99), {"evaluate@fid", "report"}),
    (lambda p: p["train"]["sft"]["optimizer"].update(lr=1e-5), {"train@sft", *JUDGED}),
    (lambda p: p["train"]["t2i-512"]["optimizer"].update(lr=1e-5), {"train@t2i-512", "train@sft", *JUDGED}),
])
def test_a_parameter_reruns_what_depends_on_it(workspace, change, rerun):
    with edited(workspace, ("params.yaml", change)):
        assert changed(workspace) == rerun


@contextlib.contextmanager
def edited(workspace, *edits):
    """Files in which something is replaced: (path, old, new), or (path, a function that changes parameters)."""
    files = {workspace / path: (workspace / path).read_text() for path in ("params.yaml", *(e[0] for e in edits))}
    try:
        for path, *change in edits:
            if callable(change[0]):
                edit(workspace, change[0])
            else:
                text = (workspace / path).read_text()
                assert change[0] in text, f"{path} has no {change[0]}"
                (workspace / path).write_text(text.replace(*change, 1))
        yield
    finally:
        for file, text in files.items():
            file.write_text(text)


def test_what_means_the_same_reruns_nothing(workspace):
    """Comments, docstrings, orders, defaults written out, where and how stages run."""
    def reordered(params):
        params["train"]["c2i"]["optimizer"]["weight_decay"] = 0.0  # as by default
        for key in [*params["train"]][::-1]:
            params["train"][key] = params["train"].pop(key)

    with edited(workspace, ("README.md", "readme", "text"),
                ("clusters/local.yaml", "max_failures: 2", "max_failures: 3"),
                ("pixelgen/losses.py", '"""', '"""Described otherwise: '),
                ("pixelgen/objective.py", "\nimport torch", "\n# a comment\nimport torch"),
                ("pipeline/cluster.py", "\nimport json", "\nEDITED = True\nimport json"),
                ("params.yaml", "# The demo", "# A demo"), ("params.yaml", reordered)):
        assert changed(workspace) == set()


def test_what_is_recorded_of_a_run_makes_nothing_anew(workspace):
    """It is shown in the report, as are the settings of a training that last."""
    with edited(workspace, ("pixelgen/recipe.py", "keep_checkpoints: int = 3", "keep_checkpoints: int = 4"),
                ("params.yaml", lambda p: p["train"]["c2i"]["run"].update(log_every=3, grid_every=None))):
        assert changed(workspace) == {"report"}


@pytest.mark.parametrize(("change", "rerun"), [
    (("pixelgen/losses.py", "\nimport torch", "\nEDITED = True\nimport torch"), {*TRAINED, *DRAWN}),
    (("pixelgen/sampling.py", "\nimport torch", "\nEDITED = True\nimport torch"), {*DRAWN}),
    (("pixelgen/samplers/euler.py", "\nfrom dataclasses", "\nEDITED = True\nfrom dataclasses"),
     {"sample@c2i", "evaluate@fid", "report"}),
    (("pixelgen/prompts.py", "\nimport json", "\nEDITED = True\nimport json"), {"prompts@geneval", *DRAWN}),
    (("pipeline/demo/scenes.py", "\nimport functools", "\nEDITED = True\nimport functools"),
     {"networks", "reference@digits", "prompts@geneval", "shard@scenes-pretrain", "shard@scenes-sft", *TRAINED,
      *DRAWN}),
    (("pipeline/datasets/image_folder.py", "\nfrom dataclasses", "\nEDITED = True\nfrom dataclasses"), set()),
    (("pixelgen/samplers/__init__.py", '"heun": "', '"more": "pixelgen.samplers.more:More", "heun": "'), set()),
    (("pixelgen/data/captions.py", '("A photo of "', '("A view of "'),
     {"networks", "reference@digits", *TRAINED, *DRAWN}),
    (("pixelgen/config.py", "weight_decay: float = 0.0", "weight_decay: float = 0.1"), {*TRAINED, *DRAWN}),
], ids=["a loss", "sampling", "a sampler", "prompts", "scenes", "a source not used", "a new sampler",
        "prefixes of prompts", "a default"])
def test_an_edit_reruns_what_means_something_else_now(workspace, change, rerun):
    with edited(workspace, change):
        assert changed(workspace) == rerun


def test_a_change_is_shown_with_its_resolved_value(workspace):
    """Also of a default, which params.yaml does not mention."""
    with edited(workspace, ("params.yaml", lambda p: p["train"]["c2i"]["optimizer"].update(weight_decay=0.1))):
        dvc(workspace, "repro", "params")
        shown = json.loads(dvc(workspace, "params", "diff", "--json"))
    (name, values), = shown["out/params.json"].items()
    assert (name, values["old"], values["new"]) == ("train.c2i.optimizer.weight_decay", 0.0, 0.1)


def test_what_other_versions_make_the_same_reruns_nothing(workspace):
    """Prompts are made again, under another Ray: their manifest says so, their identity is the same."""
    out = workspace / "out/prompts/geneval"
    manifest, identity = (out / "manifest.json").read_text(), (out / "identity").read_text()
    with edited(workspace, ("pipeline/storage.py", "    return {name:", "    return {'ray': '9.9'} or {name:")):
        dvc(workspace, "repro", "--force", "--single-item", "prompts@geneval")
        assert json.loads((out / "manifest.json").read_text()) == json.loads(manifest) | {"versions": {"ray": "9.9"}}
        assert (out / "identity").read_text() == identity
        assert changed(workspace) == set()
    checked = subprocess.run([sys.executable, "-m", "pipeline", "check"], cwd=workspace, env=environment(workspace),
                             text=True, capture_output=True, check=True)
    assert "out/prompts/geneval: " in checked.stdout and "ray 9.9, now " in checked.stdout


def test_more_steps_go_on_where_the_run_was(workspace):
    """And end at the bits of one long run."""
    run = run_of(workspace, "c2i")
    saved = {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/*.pt")}
    with edited(workspace, ("params.yaml", lambda p: p["train"]["c2i"]["fit"].update(steps=36))):
        assert "training goes on from step 30" in dvc(workspace, "repro", "train@c2i", cluster="one")
        alone = alone_in(workspace, "longer")
    assert run_of(workspace, "c2i") == run
    kept = [path for path in saved if path.exists()]
    assert kept and all(path.stat().st_mtime_ns == saved[path] for path in kept)
    assert digest(alone / "model/ema.safetensors") == digest(workspace / "out/train/c2i/model/ema.safetensors")
    steps = [line.split(",")[0] for line in (workspace / "out/train/c2i/curve.csv").read_text().splitlines()]
    assert steps == ["step", *(str(s) for s in range(2, 37, 2))]
    dvc(workspace, "repro", "train@c2i")
    assert len((workspace / "out/train/c2i/curve.csv").read_text().splitlines()) == 16
    shutil.rmtree(workspace / "longer")


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
        while not any(workspace.glob("runs/train/*/checkpoints/step-*.pt")):
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    (run,) = workspace.glob("runs/train/*")
    assert not (run / "checkpoints/step-00000030.pt").exists(), "killed too late to show anything"
    dvc(workspace, "repro", "train@c2i")
    assert {p.name: digest(p) for p in model.iterdir()} == undisturbed
    assert unmeasured(curve.read_text()) == losses


@pytest.mark.parametrize("patch", ["", "cluster.Cluster.here = lambda *_: False"], ids=["in process", "ray train"])
def test_one_worker_gives_the_bits_of_two(workspace, patch):
    """Training and sampling in one process, without Ray, or with a single worker of Ray's."""
    files = [p for name in ("train/c2i/model", "sample/c2i") for p in sorted((workspace / "out" / name).iterdir())]
    before = {path: digest(path) for path in files}
    for path in ("runs/train", "runs/sample", "out/train/c2i", "out/sample/c2i"):
        shutil.rmtree(workspace / path, ignore_errors=True)
    program = f"""import sys
from pipeline import cluster
{patch}
from pipeline import stage
for name in ("train", "sample"):
    stage.run(name, "c2i")
assert ("ray" in sys.modules) == {bool(patch)}"""
    subprocess.run([sys.executable, "-c", program], cwd=workspace, check=True,
                   env=environment(workspace) | {"PIXELGEN_CLUSTER": "one"})
    assert {path: digest(path) for path in files} == before


def test_a_lost_model_file_is_not_passed_over(workspace):
    """A damaged artifact stops the stage that would read it."""
    (workspace / "out/sample/c2i/labels.npy").write_bytes(b"damaged")
    done = subprocess.run([sys.executable, "-m", "pipeline", "evaluate", "fid"], cwd=workspace,
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


def test_experiments_of_the_queue_do_not_disturb_each_other(workspace):
    """Two at a time, each in a checkout of its own, without the data and the runs that git does not carry: they use
    those of the main one. Each ends where a training of its own parameters ends that nobody is beside."""
    dvc(workspace, "repro", "train@c2i")
    commit(workspace)
    for number in range(12):
        (workspace / f"data/pictures/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (number, 0, 0)).save(workspace / f"data/pictures/{number % 2}/{number}.png")
    pictures = "++datasets.pictures={sources: {p: {image_folder: {path: data/pictures}}}, image_sizes: [32]}"
    ablations = {"perceptual": ["shard@pictures", "-S", "train.c2i.objective.lpips.weight=0.2", "-S", pictures],
                 "decay": ["-S", "++train.c2i.optimizer.weight_decay=0.1"]}
    before = {*(workspace / "runs/train").iterdir()}
    for name, arguments in ablations.items():
        dvc(workspace, "exp", "run", "--queue", "--name", name, "train@c2i", *arguments)
    try:
        dvc(workspace, "queue", "start", "--jobs", "2", cluster="one")
        deadline = time.monotonic() + 400
        while (status := dvc(workspace, "queue", "status")) and ("Queued" in status or "Running" in status):
            assert time.monotonic() < deadline, status
            time.sleep(1)
    finally:
        dvc(workspace, "queue", "stop", "--kill", check=False)
    printed = {name: dvc(workspace, "queue", "logs", name) for name in ablations}
    assert status.count("Success") == 2, printed
    for text in printed.values():
        assert re.findall("Running stage '(train.*)'", text) == ["train@c2i"]
    assert "Running stage 'shard@pictures'" in printed["perceptual"]
    made = {*(workspace / "runs/train").iterdir()} - before
    assert len(made) == 2 and not [*(workspace / ".dvc/tmp/exps").glob("*/runs")]
    ends = {digest(run / "checkpoints/step-00000030.pt") for run in made}
    for change in (lambda p: p["train"]["c2i"]["objective"]["lpips"].update(weight=0.2),
                   lambda p: p["train"]["c2i"]["optimizer"].update(weight_decay=0.1)):
        with edited(workspace, ("params.yaml", change)):
            ends.remove(digest(alone_in(workspace, "apart") / "checkpoints/step-00000030.pt"))
        shutil.rmtree(workspace / "apart")
    shown = json.loads(dvc(workspace, "params", "diff", "--json", "decay", "perceptual"))["out/params.json"]
    assert {name: (v["old"], v["new"]) for name, v in shown.items()} == {
        "train.c2i.objective.lpips.weight": (0.1, 0.2), "train.c2i.optimizer.weight_decay": (0.1, 0.0)} | {
        name: (v["old"], v["new"]) for name, v in shown.items() if name.startswith("datasets.pictures.")}
