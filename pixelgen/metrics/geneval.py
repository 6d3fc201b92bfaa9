"""GenEval's rules and score (arXiv 2310.11513): from what a detector saw in an image to whether it shows its prompt.

A box is [x0, y0, x1, y1] in pixels, its last column and row inside; detections of a class are (N, 5), box and score.
Images are (H, W, 3) uint8 RGB.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from pixelgen.errors import FileError

Array = np.ndarray
Detections = Mapping[str, Array]  # class -> (N, 5), box and score
Colors = Callable[[str, Array], Sequence[str]]  # class, (n, 5) -> the colour of each

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
LARGEST = 4096 * 4096  # pixels of an image; a detector's masks take hundreds of bytes for each
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
    threshold = _threshold(prompt, rules)
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
    return boxes[_kept(boxes, threshold, rules)]


def _kept(boxes: Array, threshold: float, rules: Rules) -> list[int]:
    """Where in `boxes` the detections that `keep` keeps are."""
    order = np.argsort(-boxes[:, 4], kind="stable")
    kept: list[int] = []
    for place in order[boxes[order, 4] > threshold][: rules.max_objects].tolist():
        if rules.max_overlap == 1 or all(overlap(boxes[k], boxes[place]) < rules.max_overlap for k in kept):
            kept.append(place)
    return kept


def _threshold(prompt: Mapping[str, Any], rules: Rules) -> float:
    return rules.counting_threshold if prompt["tag"] == "counting" else rules.threshold


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


# ------------------------------------------------------------------------------------------- images, and folders


@dataclass(frozen=True, eq=False)
class ClassDetections:
    """The objects of one class in an image: boxes (N, 5) float32, [x0, y0, x1, y1, score]; masks (N, H, W) bool."""

    boxes: Array
    masks: Array


class Detector(Protocol):
    @property
    def name(self) -> str: ...

    def __call__(self, image: Array, /) -> Mapping[str, ClassDetections]: ...


class ColorClassifier(Protocol):
    """From an image, a class, and boxes (n, 5) and masks (n, H, W) of n objects to the colour of each."""

    @property
    def name(self) -> str: ...

    def __call__(self, image: Array, class_name: str, boxes: Array, masks: Array, /) -> Sequence[str]: ...


@dataclass(frozen=True)
class PromptedImage:
    """An image of a folder, its path in there with `/`, and the line of the benchmark's metadata that it shall show."""

    path: Path
    filename: str
    prompt: dict[str, Any]


def judge_image(image: Array, prompt: Mapping[str, Any], detector: Detector, colors: ColorClassifier,
                rules: Rules = Rules()) -> Verdict:
    """Whether an image fulfils a line of the benchmark's metadata, as far as the detector and the classifier see."""
    seen = {}
    for name, found in detector(image).items():
        kept = _kept(found.boxes, _threshold(prompt, rules), rules)
        seen[name] = ClassDetections(found.boxes[kept], found.masks[kept])

    def colors_of(name: str, objects: Array) -> Sequence[str]:
        """Of the first of the kept objects: these are in the order in which `judge` takes them."""
        return colors(image, name, objects, seen[name].masks[: len(objects)])

    return judge(prompt, {name: found.boxes for name, found in seen.items()}, colors_of, rules)


def list_images(directory: Path) -> list[PromptedImage]:
    """The images of a folder in the benchmark's layout: `00000/metadata.jsonl`, `00000/samples/0000.png` and so on.
    Other files are left aside, as by the benchmark's own tool. FileError that names all that is missing or damaged."""
    if not directory.is_dir():
        raise FileError(f"{directory}: no such folder of GenEval images")
    samples: list[PromptedImage] = []
    problems: list[str] = []
    folders = sorted(f for f in directory.iterdir() if f.is_dir() and f.name.isdigit())
    for folder in folders:
        try:
            prompt = _read_prompt(folder / "metadata.jsonl")
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{folder.name}/metadata.jsonl: {error}")
            continue
        images = sorted((folder / "samples").glob("*.png"))
        images = [image for image in images if image.stem.isdigit() and image.is_file()]
        problems += [] if images else [f"{folder.name}/samples: no image NNNN.png"]
        for image in images:
            try:
                with open_image(image) as opened:
                    opened.verify()
            except Exception as error:  # a damaged file can raise anything
                problems.append(f"{folder.name}/samples/{image.name}: not a readable image: {error}")
            samples.append(PromptedImage(image, image.relative_to(directory).as_posix(), prompt))
    if not folders:
        problems.append("no folder 00000, 00001, …")
    if problems:
        more = f"\nand {len(problems) - 20} more" if len(problems) > 20 else ""
        raise FileError(f"{directory}: not a folder of GenEval images\n" + "\n".join(problems[:20]) + more)
    return samples


def open_image(file: Path | io.BytesIO) -> Image.Image:
    """A PNG, of which no pixel has been decoded yet. ValueError if it has too many."""
    image = Image.open(file, formats=["PNG"])
    if image.width * image.height > LARGEST:
        raise ValueError(f"{image.width}×{image.height} pixels are more than {LARGEST:,}")
    return image


def _read_prompt(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError("no such file")
    prompt = json.loads(path.read_text("utf-8"))
    if not isinstance(prompt, dict) or not all(isinstance(prompt.get(key), str) for key in ("tag", "prompt")):
        raise ValueError("expected an object with a tag and a prompt")
    include, exclude = prompt.get("include", []), prompt.get("exclude", [])
    if not isinstance(include, list) or not isinstance(exclude, list) or not include + exclude or not all(
            isinstance(w, dict) and isinstance(w.get("class"), str) and isinstance(w.get("count"), int)
            for w in include + exclude):
        raise ValueError("expected what to include, each with a class and a count")
    for number, wanted in enumerate(include):
        position = wanted.get("position", ["", -1])
        if not isinstance(position, list) or len(position) != 2 or position[1] not in range(-1, number):
            raise ValueError(f"expected a position relative to an object before it, not {position}")
    return prompt


def evaluate_image(sample: PromptedImage, detector: Detector, colors: ColorClassifier, rules: Rules) -> dict[str, Any]:
    """A line of the benchmark's results, and the checksum of the image that it is about."""
    data = sample.path.read_bytes()
    try:
        image = np.asarray(ImageOps.exif_transpose(open_image(io.BytesIO(data))).convert("RGB"))
    except Exception as error:  # a damaged file can raise anything
        raise FileError(f"{sample.path}: not a readable image: {error}") from error
    verdict = judge_image(image, sample.prompt, detector, colors, rules)
    return {"filename": sample.filename, "tag": sample.prompt["tag"], "prompt": sample.prompt["prompt"],
            "correct": verdict.correct, "reason": verdict.reason, "metadata": json.dumps(sample.prompt),
            "details": json.dumps({name: boxes.tolist() for name, boxes in verdict.kept.items()}),
            "sha256": hashlib.sha256(data).hexdigest()}


def evaluate_folder(directory: Path, detector: Detector, colors: ColorClassifier, rules: Rules, results: Path,
                    progress: Callable[[Sequence[PromptedImage]], Iterable[PromptedImage]] = iter) -> dict[str, Any]:
    """Judge every image of a folder, one line of `results` each, and return the score and who judged.

    What is recorded already is not judged again, so a run goes on where it was cut off; a line that was cut off is
    dropped. FileError if `results` are of other judges or rules, or of images that are not in the folder as they were.
    """
    samples = list_images(directory)
    judges = {"detector": detector.name, "color_classifier": colors.name}
    _check_judges(results, {**judges, "rules": asdict(rules)})
    done = _read_results(results)
    present = {s.filename: s for s in samples}
    for name, record in done.items():
        sample = present.get(name)
        if sample is None or record["metadata"] != json.dumps(sample.prompt) \
                or record["sha256"] != hashlib.sha256(sample.path.read_bytes()).hexdigest():
            raise FileError(f"{results} records {name}, which is not in {directory} as it was then; delete {results} "
                            "to start afresh")
    with results.open("a", encoding="utf-8") as file:
        for sample in progress([s for s in samples if s.filename not in done]):
            done[sample.filename] = evaluate_image(sample, detector, colors, rules)
            file.write(json.dumps(done[sample.filename]) + "\n")
            file.flush()
    return {**score([done[name] for name in present]), **judges}


def _check_judges(results: Path, judges: dict[str, Any]) -> None:
    """Keep beside `results` who judges and by which rules, and refuse to mix in the results of others."""
    path = results.with_name(results.name + ".judges")
    if results.exists():
        if not path.is_file():
            raise FileError(f"{results} exists without {path.name}, which says whose it is; write to another file")
        if (recorded := json.loads(path.read_text("utf-8"))) != judges:
            raise FileError(f"{results} is by {recorded}, not by {judges}; write to another file")
    else:
        results.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(judges, indent=2) + "\n", "utf-8")


def _read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The records in a file by filename. A last line without its end, of a run that was cut off, is removed from it."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        named = {r["filename"]: r for r in records if r.keys() >= {"tag", "correct", "metadata", "sha256"}}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path}: a line in it is no result: {error}") from error
    if len(named) != len(records):
        raise FileError(f"{path}: an image is recorded twice, or a line lacks something")
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return named
