"""The report says when a figure must not be set beside the paper's, and loads nothing from anywhere."""

import math
import re

from PIL import Image

from pipeline.stages import report

COMPARABLE = {"extractor": "inception-v3-compat", "samples": {"count": 50_000}, "reference": {"npz": "virtual.npz"}}


def test_what_is_comparable():
    assert report.incomparable(COMPARABLE) == []
    for change, reason in [({"extractor": "digits"}, "features of the 'digits' extractor"),
                           ({"samples": {"count": 500}}, "500 samples"),
                           ({"reference": {"npz": "computed from the training split"}}, "computed here")]:
        (found,) = report.incomparable(COMPARABLE | change)
        assert reason in found


def test_pictures_are_inside_the_page(tmp_path):
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    markup = report.picture(tmp_path / "a.png", "a <b>", scale=3)
    assert 'width=12 src="data:image/png;base64,' in markup and "a &lt;b&gt;" in markup and "<b>" not in markup


def test_a_plot_spans_its_box():
    markup = report.plot("loss", [10, 20, 30], [3.0, 1.0, 2.0], width=100, height=50)
    points = re.search(r'points="([^"]+)"', markup).group(1)
    assert points == "0.0,0.0 50.0,50.0 100.0,25.0"
    assert "3 → 2" in markup


def test_a_flat_plot_of_one_point_is_drawn():
    assert "0.0,50.0" in report.plot("loss", [1], [2.0], width=100, height=50)


def test_a_plot_leaves_out_what_is_not_finite():
    markup = report.plot("loss", [10, 15, 20, 30], [3.0, math.nan, math.inf, 1.0], width=100, height=50)
    assert 'points="0.0,0.0 100.0,50.0"' in markup and "from 1 to 3" in markup
    assert "loss: never finite" in report.plot("loss", [10], [math.nan])


def test_the_paper_is_marked_as_such():
    markup = report.table(["", "fid"], [["ours", "9"]], [["XL", "5.11"]])
    assert markup.index("ours") < markup.index("paper: XL") and "class=paper" in markup
