"""report: one self-contained HTML page with curves, sample grids, and the figures beside the paper's."""

import csv
import html
from typing import Any

from pipeline.page import details, page, picture, plot
from pipeline.stage import OUT, Stage
from pipeline.storage import Storage, fresh_directory
from pixelgen.config import plain

SHOWN_GRIDS = 6


def run(stage: Stage) -> None:
    params = stage.params
    body = ["<h1>PixelGen</h1>"]
    for key in params.evaluate:
        body += evaluation(stage, key)
    for key in params.train:
        body += training(key)
    body += [f"<p class=warn>params.yaml has nothing to {section}.</p>" for section in ("train", "sample", "evaluate")
             if not getattr(params, section)]
    out = fresh_directory(stage.out)
    (out / "index.html").write_text(page(body))
    Storage(None).publish(out, "report", {})


def evaluation(stage: Stage, key: str) -> list[str]:
    """A section by the metric of an evaluation, and the settings of its figures."""
    evaluate = stage.params.evaluate[key]
    scored = Storage(None).open(OUT / "evaluate" / key, "evaluation")
    figures: dict[str, Any] = scored["figures"]  # as in metrics/KEY.json, a folder that a run may lack
    settings = {**{name: value for name, value in figures.items() if isinstance(value, dict)},
                "train": plain(stage.params.train[stage.params.sample[evaluate.sample].model])}
    return [f"<h2>{html.escape(key)}</h2>",
            *evaluate.metric.section(figures, evaluate, stage.open("sample", evaluate.sample).local(), scored.local()),
            details("settings of these figures", settings)]


def training(key: str) -> list[str]:
    """Loss curves and the grids that were drawn on the way."""
    with open(OUT / "train" / key / "curve.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [float(r["step"]) for r in rows]
    names = [*rows[0]] if rows else []  # a run may end before its first line
    measured = [name for name in names if name != "step" and all(r[name] for r in rows)]  # no MFU on a CPU
    curves = [plot(name, steps, [float(r[name]) for r in rows]) for name in measured]
    grids = sorted((OUT / "train" / key / "grids").glob("*.png"))
    shown = grids[::max(1, -(-len(grids) // SHOWN_GRIDS))]
    if grids and grids[-1] not in shown:
        shown.append(grids[-1])
    return [f"<h2>training of {html.escape(key)}</h2>", *curves, "<h3>the same seeds while it learns</h3>",
            *(picture(p, f"step {int(p.stem.removeprefix('step-'))}") for p in shown)]
