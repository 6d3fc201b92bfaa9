"""report: one self-contained HTML page with curves, sample grids, and the figures beside the paper's."""

import base64
import csv
import dataclasses
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.params import Params, resolved_params
from pipeline.runs import run_stage
from pipeline.storage import Storage, fresh_directory
from pixelgen.encoders import INCEPTION

TRAINED, SAMPLED, EVALUATED, OUT = (Path("out") / n for n in ("train", "sample", "evaluate", "report"))
SHOWN_GRIDS = 6
SUITE = ("fid", "sfid", "inception_score", "precision", "recall")
# arXiv 2602.02493: tables of class-to-image results and of the ablation (L/16, 200k steps, no guidance)
PAPER = [
    ("PixelGen-XL/16, 80 epochs, no guidance",
     {"fid": 5.11, "inception_score": 159.2, "precision": 0.72, "recall": 0.63}),
    ("PixelGen-XL/16, 160 epochs, guidance 2.25",
     {"fid": 1.83, "inception_score": 293.6, "precision": 0.79, "recall": 0.63}),
    ("ablation: JiT-L/16 + REPA", {"fid": 23.67, "recall": 0.63}),
    ("ablation: + LPIPS", {"fid": 10.00, "recall": 0.59}),
    ("ablation: + P-DINO", {"fid": 7.46, "recall": 0.58}),
    ("ablation: + noise gate at 0.3", {"fid": 7.53, "recall": 0.60}),
]
PAPER_GENEVAL = {"": 0.79, "single_object": 0.99, "two_object": 0.88, "counting": 0.59, "colors": 0.90,
                 "position": 0.70, "color_attr": 0.70}  # arXiv 2602.02493, PixelGen-XXL/16; "": overall
SHOWN_VERDICTS = 8  # images of each tag
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{image-rendering:pixelated;max-width:100%;margin:.3rem}
figure{display:inline-block;margin:.3rem;vertical-align:top}
figcaption{font-size:.85rem;color:#666;max-width:14rem}.paper td{color:#777}
.warn{background:#fff6e0;padding:.6rem 1rem;border-left:4px solid #e0a000}details{margin:1rem 0}pre{font-size:.8rem}"""


def main() -> None:
    params = resolved_params("report")
    body = ["<h1>PixelGen</h1>"]
    for key in params.evaluate:
        body += (evaluation if params.evaluate[key].metric == "fid" else geneval)(params, key)
    for key in params.train:
        body += training(key)
    body += [f"<p class=warn>params.yaml has nothing to {section}.</p>" for section in ("train", "sample", "evaluate")
             if not getattr(params, section)]
    out = fresh_directory(OUT)
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>PixelGen report</title><style>{STYLE}</style>"
    (out / "index.html").write_text(page + "\n".join(body) + "</html>\n")
    Storage(None).publish(out, "report", {})


def samples(params: Params, key: str) -> Path:
    return Storage(params.storage.root).open(SAMPLED / key, "samples").local()


def figures(key: str) -> dict[str, Any]:
    """What is also in metrics/KEY.json, a folder that is not there in a run without evaluation."""
    return Storage(None).open(EVALUATED / key, "evaluation")["figures"]


def evaluation(params: Params, key: str) -> list[str]:
    """The figures of one evaluation, the paper's under them, and the samples they were computed from."""
    metrics = figures(key)
    wanted = params.evaluate[key]
    sample = params.sample[wanted.sample]
    ours = {name: metrics.get(name) for name in SUITE}
    rows = [[f"this run ({wanted.sample})", *(number(ours[name]) for name in SUITE)]]
    paper = [[name, *(number(row.get(m)) for m in SUITE)] for name, row in PAPER]
    reasons = incomparable(metrics)
    verdict = ("<p>Same extractor, number of samples and a published reference: comparable with the paper's rows.</p>"
               if not reasons else f"<p class=warn>Not comparable with the paper's rows: {'; '.join(reasons)}.</p>")
    named = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k not in SUITE}
    return [
        f"<h2>{html.escape(key)}: {metrics['samples']['count']} samples by {html.escape(metrics['extractor'])}</h2>",
        verdict,
        picture(samples(params, wanted.sample) / "grid.png", "samples, one class a column", scale=2),
        table(["figure", "value"], [[k, number(v)] for k, v in named.items()]) if named else "",
        table(["", *SUITE], rows, paper),
        details("settings of these figures", {**{k: v for k, v in metrics.items() if isinstance(v, dict)},
                                              "train": dataclasses.asdict(params.train[sample.model])}),
    ]


def geneval(params: Params, key: str) -> list[str]:
    """GenEval's score by tag beside the paper's and the baselines, and images with prompt and verdict."""
    metrics = figures(key)
    sample = params.sample[params.evaluate[key].sample]
    names = [n for n in metrics if n.startswith("geneval")]
    name = min(names, key=len)
    kinds = [k for k in ("", "_rendered", "_shuffled", "_untrained") if f"{name}{k}" in metrics]
    rows = [[f"this run ({sample.model})" if not kind else kind.removeprefix("_"),
             *(number(metrics.get("_".join(filter(None, [f"{name}{kind}", tag])))) for tag in PAPER_GENEVAL)]
            for kind in kinds]
    paper = [["PixelGen-XXL/16", *(number(v) for v in PAPER_GENEVAL.values())]]
    verdict = ("<p>The benchmark's own detector and colour classifier: comparable with the paper's row.</p>"
               if name == "geneval" else f"<p class=warn>Not comparable with the paper's row: {html.escape(name)}, "
               f"judged by {html.escape(metrics['detector'])} and {html.escape(metrics['color_classifier'])}, on "
               f"{metrics['prompts']} prompts.</p>")
    images = samples(params, params.evaluate[key].sample) / "images"
    records = [json.loads(line) for line in (EVALUATED / key / "results.jsonl").read_text().splitlines()]
    shown = []
    for tag in dict.fromkeys(r["tag"] for r in records):
        every = [r for r in records if r["tag"] == tag]
        shown.append(f"<h3>{html.escape(tag)}</h3>")
        shown += [picture(images / r["filename"],
                          f"{'✓' if r['correct'] else '✗'} {r['prompt']}" + (f": {r['reason']}" if r["reason"] else ""))
                  for r in every[::max(1, len(every) // SHOWN_VERDICTS)][:SHOWN_VERDICTS]]
    return [f"<h2>{html.escape(key)}: {metrics['samples']['count']} images of prompts</h2>", verdict,
            table(["", *(tag or "overall" for tag in PAPER_GENEVAL)], rows, paper), *shown,
            details("settings of these figures", {**{k: v for k, v in metrics.items() if isinstance(v, dict)},
                                                  "train": dataclasses.asdict(params.train[sample.model])})]


def incomparable(metrics: dict[str, Any]) -> list[str]:
    """Why the figures must not be set beside the paper's; empty if they may."""
    reasons = []
    if metrics["extractor"] != INCEPTION:
        reasons.append(f"features of the {metrics['extractor']!r} extractor, not of Inception")
    if metrics["samples"]["count"] != 50_000:
        reasons.append(f"{metrics['samples']['count']} samples instead of 50,000")
    if metrics["reference"]["npz"] == "computed from the training split":
        reasons.append("the reference was computed here, from this dataset")
    return reasons


def training(key: str) -> list[str]:
    """Loss curves and the grids that were drawn on the way."""
    with open(TRAINED / key / "curve.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [float(r["step"]) for r in rows]
    names = [*rows[0]] if rows else []  # a run may end before its first line
    measured = [name for name in names if name != "step" and all(r[name] for r in rows)]  # no MFU on a CPU
    curves = [plot(name, steps, [float(r[name]) for r in rows]) for name in measured]
    grids = sorted((TRAINED / key / "grids").glob("*.png"))
    shown = grids[::max(1, -(-len(grids) // SHOWN_GRIDS))]
    if grids and grids[-1] not in shown:
        shown.append(grids[-1])
    return [f"<h2>training of {html.escape(key)}</h2>", *curves, "<h3>the same seeds while it learns</h3>",
            *(picture(p, f"step {int(p.stem.removeprefix('step-'))}") for p in shown)]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], paper: Iterable[Sequence[str]] = ()) -> str:
    def line(row: Sequence[str], kind: str) -> str:
        cells = "".join(f"<td{' class=n' if i else ''}>{html.escape(c)}</td>" for i, c in enumerate(row))
        return f"<tr{kind}>{cells}</tr>"

    header = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = [line(r, "") for r in rows] + [line(["paper: " + r[0], *r[1:]], " class=paper") for r in paper]
    return f"<table><tr>{header}</tr>{''.join(body)}</table>"


def picture(path: Path, caption: str, scale: int = 1) -> str:
    with Image.open(path) as image:
        width = image.width * scale
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><img width={width} src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def plot(name: str, x: Sequence[float], y: Sequence[float], width: int = 280, height: int = 120) -> str:
    """A line as inline SVG, with the extremes of both axes written out; what is not finite is left out."""
    known = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if not known:
        return f"<figure><figcaption>{html.escape(name)}: never finite</figcaption></figure>"
    x, y = zip(*known, strict=True)
    low, high = min(y), max(y)
    span_x, span_y = (x[-1] - x[0]) or 1, (high - low) or 1
    points = " ".join(f"{(a - x[0]) / span_x * width:.1f},{height - (b - low) / span_y * height:.1f}"
                      for a, b in zip(x, y, strict=True))
    return (f'<figure><svg width={width} height={height} viewBox="-2 -2 {width + 4} {height + 4}">'
            f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="1.5"/></svg>'
            f"<figcaption>{html.escape(name)}: {y[0]:.3g} → {y[-1]:.3g} "
            f"(from {low:.3g} to {high:.3g}), steps {x[0]:.0f} to {x[-1]:.0f}</figcaption></figure>")


def details(title: str, data: Any) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(json.dumps(data, indent=2))}</pre></details>"


if __name__ == "__main__":
    run_stage(main)
