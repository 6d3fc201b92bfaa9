"""Pieces of the report's HTML."""

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{image-rendering:pixelated;max-width:100%;margin:.3rem}
figure{display:inline-block;margin:.3rem;vertical-align:top}
figcaption{font-size:.85rem;color:#666;max-width:14rem}.paper td{color:#777}
.warn{background:#fff6e0;padding:.6rem 1rem;border-left:4px solid #e0a000}details{margin:1rem 0}pre{font-size:.8rem}"""


def page(body: Iterable[str]) -> str:
    """A whole page, which needs no other file."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>PixelGen report</title><style>{STYLE}</style>"
    return head + "\n".join(body) + "</html>\n"


def figures_of(figures: dict[str, Any]) -> str:
    """A table of those figures that are numbers."""
    return table(["figure", "value"], [[k, number(v)] for k, v in figures.items() if isinstance(v, int | float)])


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
