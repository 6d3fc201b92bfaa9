"""Rendered scenes of coloured shapes, with captions in the grammar of GenEval's six tags.

A prompt is a line of GenEval's metadata whose classes are shapes. `place` puts things so that a prompt is fulfilled,
`render` paints them. Of every tag but single_object (which has one prompt a shape) some prompts are held out: no
training caption names what they combine. Coordinates and sizes are shares of the image's side.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from pipeline.datasets import DatasetParams, Item, Sample
from pipeline.datasets.files import split_of
from pipeline.datasets.listed import ListedSource
from pixelgen.config import choose, require

if TYPE_CHECKING:
    import numpy as np

Prompt = dict[str, Any]
SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (220, 40, 40), "yellow": (235, 215, 40), "green": (40, 160, 60), "blue": (40, 70, 220),
          "purple": (150, 50, 170), "black": (20, 20, 20)}
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
BACKGROUND = (185, 225)  # range of its grey
SIZES = (0.34, 0.40)  # range of the side of a thing's bounding box
MARGIN = 0.045  # least distance of a thing to the border of its quarter of the image
PHOTO = "a photo of "
CAPTIONS = {"short": "{}", "long": PHOTO + "{} on grey"}  # columns of captions
OVERSAMPLING = 4  # pixels painted for each pixel kept, on a side
HELD_OUT = 4  # one prompt in so many


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    x: float  # of the centre
    y: float
    size: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


# ----------------------------------------------------------------------------------------------------- prompts


@functools.cache
def all_prompts() -> dict[str, list[Prompt]]:
    """Every prompt of the grammar, by tag."""
    pairs = list(itertools.permutations(SHAPES, 2))
    attributes = [((a, x), (b, y)) for a, b in pairs for x, y in itertools.permutations(COLORS, 2)]
    return {
        "single_object": [_prompt("single_object", f"a {a}", {"class": a}) for a in SHAPES],
        "two_object": [_prompt("two_object", f"a {a} and a {b}", {"class": a}, {"class": b}) for a, b in pairs],
        "counting": [_prompt("counting", f"{word} {a}s", {"class": a, "count": n})
                     for a in SHAPES for n, word in NUMBERS.items()],
        "colors": [_prompt("colors", f"a {x} {a}", {"class": a, "color": x}) for a in SHAPES for x in COLORS],
        "position": [_prompt("position", f"a {b} {r} a {a}", {"class": a}, {"class": b, "position": [r, 0]})
                     for a, b in pairs for r in RELATIONS],
        "color_attr": [_prompt("color_attr", f"a {x} {a} and a {y} {b}", {"class": a, "color": x},
                               {"class": b, "color": y}) for (a, x), (b, y) in attributes],
    }


def _prompt(tag: str, text: str, *include: dict[str, Any]) -> Prompt:
    things = [{"count": 1, **thing} for thing in include]
    first = things[0]
    more = {"exclude": [{"class": first["class"], "count": first["count"] + 1}]} if tag == "counting" else {}
    return {"tag": tag, "include": things, **more, "prompt": PHOTO + text}


@functools.cache
def held_out(tag: str) -> list[Prompt]:
    """The prompts for evaluation: one in `HELD_OUT` of a tag, but at least two; all of single_object."""
    import numpy as np

    every = all_prompts()[tag]
    if tag == "single_object":
        return every
    order = np.random.RandomState(0).permutation(len(every))  # its stream never changes
    return [every[i] for i in sorted(order[:max(2, len(every) // HELD_OUT)])]


@functools.cache
def trained(tag: str) -> list[Prompt]:
    """The prompts whose scenes may be trained on: not held out, and of no colour and shape that `colors` holds out."""
    banned = [p["prompt"] for p in held_out(tag)] if tag != "single_object" else []
    unnamed = {named(p["include"][0]) for p in held_out("colors")}
    return [p for p in all_prompts()[tag] if p["prompt"] not in banned
            and not any(named(thing) in unnamed for thing in p["include"])]


def named(thing: dict[str, Any]) -> tuple[str, str] | None:
    return (thing["color"], thing["class"]) if "color" in thing else None


# ------------------------------------------------------------------------------------------------------ scenes


def place(prompt: Prompt, random: np.random.Generator) -> list[Thing]:
    """Things that fulfil the prompt and nothing else, each somewhere in a quarter of the image of its own."""
    import numpy as np

    from pixelgen.metrics.geneval import relations

    kinds = [(thing["class"], thing.get("color")) for thing in prompt["include"] for _ in range(thing["count"])]
    relation = next((thing["position"][0] for thing in prompt["include"] if "position" in thing), None)
    while True:
        quarters = random.permutation(4)
        things = [_thing(shape, color, int(quarter), random)
                  for (shape, color), quarter in zip(kinds, quarters, strict=False)]
        if relation is None or relations(np.array(things[1].box), np.array(things[0].box)) == {relation}:
            return things


def _thing(shape: str, color: str | None, quarter: int, random: np.random.Generator) -> Thing:
    """A thing of this colour, or of any, that keeps its distance from the borders of a quarter of the image."""
    size = random.uniform(*SIZES)
    x, y = random.uniform(MARGIN + size / 2, 0.5 - MARGIN - size / 2, 2)
    return Thing(shape, color or str(random.choice(list(COLORS))), quarter % 2 / 2 + x, quarter // 2 / 2 + y, size)


def render(things: list[Thing], size: int, random: np.random.Generator) -> Image.Image:
    """Paint the things on a grey of random brightness; size×size pixels, smooth at the edges."""
    import numpy as np

    side = size * OVERSAMPLING
    image = Image.new("RGB", (side, side), (int(random.integers(*BACKGROUND)),) * 3)
    canvas = ImageDraw.Draw(image)
    for thing in things:
        color = tuple(int(c) for c in np.clip(np.array(COLORS[thing.color]) + random.integers(-12, 13, 3), 0, 255))
        paint(canvas, thing.shape, [side * v for v in thing.box], color)
    return image.resize((size, size), Image.Resampling.BOX)


def silhouette(shape: str, size: int) -> np.ndarray:
    """Mask (size, size) of a shape that fills its bounding box."""
    import numpy as np

    side = size * OVERSAMPLING
    image = Image.new("RGB", (side, side))
    paint(ImageDraw.Draw(image), shape, [0, 0, side - 1, side - 1], (255, 255, 255))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))[..., 0] > 127


def paint(canvas: ImageDraw.ImageDraw, shape: str, box: list[float], color: tuple[int, ...]) -> None:
    if shape == "circle":
        canvas.ellipse(box, fill=color)
    elif shape == "square":
        canvas.rectangle(box, fill=color)
    else:
        x0, y0, x1, y1 = box
        canvas.polygon([((x0 + x1) / 2, y0), (x1, y1), (x0, y1)], fill=color)


# ---------------------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class Scenes(ListedSource):
    """Scenes of training prompts, every tag as often as the others."""

    captions: dict[str, float]  # {short or long: share, …}: how often, relatively, each is drawn in training
    count: int  # how many are rendered
    clutter: float  # share of them that show one thing more than their captions say

    def __post_init__(self) -> None:
        super().__post_init__()
        for column in self.captions:
            choose(column, [*CAPTIONS], "captions: column of scenes")
        require(self.count >= 1, f"count {self.count} must be at least 1")
        require(0 <= self.clutter <= 1, f"clutter {self.clutter} must lie in [0, 1]")

    def listing(self, data: DatasetParams) -> tuple[None, list[Item]]:
        return None, [Item(f"{n:07}", None, split_of(f"{n:07}", data.heldout)) for n in range(self.count)]

    def load(self, data: DatasetParams, item: Item) -> Sample:
        """A scene of a random training prompt, with its captions."""
        import numpy as np

        random = np.random.default_rng([data.seed, int(item.key)])
        prompts = trained(str(random.choice([*all_prompts()])))
        prompt = prompts[random.integers(len(prompts))]
        things = place(prompt, random)
        if len(things) < 4 and random.random() < self.clutter:
            free = [q for q in range(4) if q not in {int(t.x > 0.5) + 2 * int(t.y > 0.5) for t in things}]
            things.append(_thing(str(random.choice(SHAPES)), None, int(random.choice(free)), random))
        text = prompt["prompt"].removeprefix(PHOTO)
        captions: list[str | None] = [CAPTIONS[name].format(text) for name in self.captions]
        return Sample(render(things, data.image_sizes[-1], random), item.split, None, captions)
