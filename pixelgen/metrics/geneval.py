"""GenEval's rules and score (arXiv 2310.11513): from what a detector saw in an image to whether it shows its prompt.

A box is [x0, y0, x1, y1] in pixels, its last column and row inside; detections of a class are (N, 5), box and score.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Detections = Mapping[str, Array]  # class -> (N, 5), box and score
Colors = Callable[[str, Array], Sequence[str]]  # class, (n, 5) -> the colour of each

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = 153  # grey (#999) of what lies outside an object's mask


@dataclass(frozen=True)
class Rules:
    """Thresholds of the benchmark."""

    threshold: float = 0.3  # a detection counts above this score
    counting_threshold: float = 0.9  # and above this one in prompts that count
    max_objects: int = 16  # of a class, by score
    max_overlap: float = 1.0  # a box is dropped when it overlaps a better one by this much or more; 1: none is
    position_threshold: float = 0.1  # share of both boxes' sizes by which an offset of centres is shortened


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reason: str  # a line for each rule that was broken
    kept: dict[str, Array]  # the detections that counted, best first


def judge(prompt: Mapping[str, Any], detections: Detections, colors: Colors, rules: Rules = Rules()) -> Verdict:
    """Whether an image fulfils a line of the benchmark's metadata: `include` and `exclude` lists of objects."""
    counting = prompt["tag"] == "counting"
    threshold = rules.counting_threshold if counting else rules.threshold
    kept = {name: found for name, boxes in detections.items() if len(found := keep(boxes, threshold, rules))}
    none = np.zeros((0, 5), np.float32)
    broken: list[str] = []
    groups: list[Array | None] = []  # what fulfilled each wanted object, for the positions of later ones
    for wanted in prompt.get("include", ()):
        objects = kept.get(wanted["class"], none)[: wanted["count"]]
        problem = _problem(wanted, objects, groups, colors, rules)
        groups.append(None if problem else objects)
        broken += [problem] if problem else []
    for banned in prompt.get("exclude", ()):
        number = len(kept.get(banned["class"], none))
        if number >= banned["count"]:
            broken.append(f"expected {banned['class']}<{banned['count']}, found {number}")
    return Verdict(not broken, "\n".join(broken), kept)


def keep(boxes: Array, threshold: float, rules: Rules) -> Array:
    """The best-scored detections strictly above the threshold, best first, without those that overlap a better one."""
    boxes = np.asarray(boxes, np.float32).reshape(-1, 5)
    order = np.argsort(-boxes[:, 4], kind="stable")
    boxes = boxes[order][boxes[order, 4] > threshold][: rules.max_objects]
    kept: list[Array] = []
    for box in boxes:
        if rules.max_overlap == 1 or all(overlap(better, box) < rules.max_overlap for better in kept):
            kept.append(box)
    return np.array(kept, np.float32).reshape(-1, 5)


def _problem(wanted: Mapping[str, Any], objects: Array, groups: Sequence[Array | None], colors: Colors, rules: Rules
             ) -> str | None:
    """What keeps the best objects of a class from being what is wanted; None if nothing does."""
    name, count = wanted["class"], wanted["count"]
    if len(objects) < count:
        return f"expected {name}>={count}, found {len(objects)}"
    if "color" in wanted:
        seen = list(colors(name, objects))
        right = seen.count(wanted["color"])
        if right < count:
            others = ", ".join(f"{seen.count(c)} {c}" for c in COLORS if c in seen)
            return f"expected {wanted['color']} {name}>={count}, found {right} {wanted['color']}; and {others}"
    if "position" in wanted:
        relation, number = wanted["position"]
        targets = groups[number]
        if targets is None:
            return f"no target for {name} to be {relation}"
        for thing in objects:
            for target in targets:
                found = relations(thing, target, rules.position_threshold)
                if relation not in found:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(found))} target"
    return None


def relations(a: Array, b: Array, threshold: float = 0.1) -> set[str]:
    """How `a` lies to `b`: left of, right of, above, below; two of them along a diagonal, none when too close.

    The offset of centres is shortened on each axis by a share of both boxes' sizes; a relation holds along an axis that
    makes up more than half of the unshortened distance.
    """
    a, b = np.asarray(a, np.float32)[:4].reshape(2, 2), np.asarray(b, np.float32)[:4].reshape(2, 2)
    size = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    offset = a.mean(0) - b.mean(0)
    revised = np.maximum(np.abs(offset) - threshold * size, 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return set()
    x, y = revised / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, yes in holds.items() if yes}


def overlap(a: Array, b: Array) -> float:
    """Intersection over union of two boxes, whose last pixels belong to them."""
    def area(box: Array) -> float:
        width, height = np.maximum(box[2:4] - box[:2] + 1, 0)
        return float(width * height)

    both = area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:4], b[2:4])]))
    union = area(a) + area(b) - both
    return both / union if union else 0.0


def crop(image: Array, box: Array, mask: Array | None) -> Array:
    """What the colour classifier sees of an object in image (H, W, 3) uint8: grey outside its mask, cut to its box."""
    if mask is not None:
        image = np.where(mask[..., None], image, np.uint8(BACKGROUND))
    x0, y0, x1, y1 = np.round(np.asarray(box, np.float64)[:4]).astype(int)
    return image[max(y0, 0): y1, max(x0, 0): x1]


def score(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The benchmark's figures from {"tag", "correct", "metadata"} of every image: per tag the share of right images,
    overall the mean over tags, and the shares of right images and of prompts with at least one right image."""
    tags = {tag: [r["correct"] for r in results if r["tag"] == tag] for tag in dict.fromkeys(r["tag"] for r in results)}
    prompts: dict[str, bool] = {}
    for r in results:
        prompts[r["metadata"]] = prompts.get(r["metadata"], False) or r["correct"]
    per_tag = {tag: sum(right) / len(right) for tag, right in tags.items()}
    return {"overall": sum(per_tag.values()) / len(per_tag), **per_tag,
            "image_accuracy": sum(r["correct"] for r in results) / len(results),
            "prompt_accuracy": sum(prompts.values()) / len(prompts),
            "images": len(results), "prompts": len(prompts)}
