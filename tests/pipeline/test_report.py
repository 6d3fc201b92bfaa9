"""The report says when a figure must not be set beside the paper's, and loads nothing from anywhere."""

import dataclasses
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from pipeline import page
from pipeline.metrics import Metric, adm
from pipeline.params import read_params
from pipeline.stage import Stage
from pipeline.stages import report
from pipeline.storage import Storage
from tests.e2e.workspace import dvc, make

COMPARABLE = {"extractor": "inception-v3-compat", "samples": {"count": 50_000}, "reference": {"npz": "virtual.npz"}}


def test_what_is_comparable():
    assert adm.incomparable(COMPARABLE) == []
    for change, reason in [({"extractor": "digits"}, "features of the 'digits' extractor"),
                           ({"samples": {"count": 500}}, "500 samples"),
                           ({"reference": {"npz": "computed from the training split"}}, "computed here")]:
        (found,) = adm.incomparable(COMPARABLE | change)
        assert reason in found


def test_pictures_are_inside_the_page(tmp_path):
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    markup = page.picture(tmp_path / "a.png", "a <b>", scale=3)
    assert 'width=12 src="data:image/png;base64,' in markup and "a &lt;b&gt;" in markup and "<b>" not in markup


def test_a_plot_spans_its_box():
    markup = page.plot("loss", [10, 20, 30], [3.0, 1.0, 2.0], width=100, height=50)
    points = re.search(r'points="([^"]+)"', markup).group(1)
    assert points == "0.0,0.0 50.0,50.0 100.0,25.0"
    assert "3 → 2" in markup


def test_a_flat_plot_of_one_point_is_drawn():
    assert "0.0,50.0" in page.plot("loss", [1], [2.0], width=100, height=50)


def test_a_plot_leaves_out_what_is_not_finite():
    markup = page.plot("loss", [10, 15, 20, 30], [3.0, math.nan, math.inf, 1.0], width=100, height=50)
    assert 'points="0.0,0.0 100.0,50.0"' in markup and "from 1 to 3" in markup
    assert "loss: never finite" in page.plot("loss", [10], [math.nan])


def test_the_paper_is_marked_as_such():
    markup = page.table(["", "fid"], [["ours", "9"]], [["XL", "5.11"]])
    assert markup.index("ours") < markup.index("paper: XL") and "class=paper" in markup


def test_a_run_may_train_and_evaluate_nothing(tmp_path, monkeypatch):
    params = read_params()
    one = {"c2i": params.train["c2i"]}
    changed = dataclasses.replace(params, train=one, sample={}, evaluate={})
    monkeypatch.chdir(tmp_path)
    Path("out/train/c2i/grids").mkdir(parents=True)
    Path("out/train/c2i/curve.csv").write_text("step,loss\n10,3.0\n20,2.0\n")
    report.run(Stage("report", "", changed, None, Storage(None)))
    told = Path("out/report/index.html").read_text()
    assert "training of c2i" in told and "loss: 3 → 2" in told and "nothing to train" not in told
    assert "nothing to sample" in told and "nothing to evaluate" in told
    Path("out/train/c2i/curve.csv").write_text("step,loss\n")  # of a run that ends before its first line
    assert report.training("c2i")[0] == "<h2>training of c2i</h2>"


def test_a_metric_without_a_section_of_its_own_has_its_figures_in_a_table(tmp_path, monkeypatch):
    """They are those that the evaluation has published."""
    params = read_params()
    monkeypatch.chdir(tmp_path)
    plain = dataclasses.replace(params.evaluate["fid"], metric=Metric())
    for name, kind in (("evaluate/fid", "evaluation"), ("sample/c2i", "samples")):
        (folder := Path("out") / name).mkdir(parents=True)
        Storage(None).publish(folder, kind, {}, figures={"sharpness": 1.5, "settings": {"of": "this"}})
    stage = SimpleNamespace(params=SimpleNamespace(evaluate={"fid": plain}, sample=params.sample, train=params.train),
                            open=lambda name, key: Storage(None).open(Path("out") / name / key, "samples"))
    found = "".join(report.evaluation(stage, "fid"))
    assert "<h2>fid</h2>" in found and "<td>sharpness</td><td class=n>1.5</td>" in found and "&quot;this&quot;" in found


def empty(params):
    for section in ("networks", "datasets", "reference", "train", "prompts", "sample", "evaluate"):
        params[section] = {}


def test_dvc_ends_a_run_of_nothing_with_a_report(tmp_path):
    """Also where it runs no stage, but brings back what they have written."""
    workspace = make(tmp_path, empty)
    assert "Running stage 'report'" in dvc(workspace, "repro")
    shutil.rmtree(workspace / "out")
    assert "Running stage" not in dvc(workspace, "repro")
    assert "nothing to evaluate" in (workspace / "out/report/index.html").read_text()
