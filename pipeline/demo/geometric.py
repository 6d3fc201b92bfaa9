"""What judges the demo's scenes, in place of Mask2Former and CLIP. Nothing here is trained."""

import numpy as np
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]

from pipeline.demo import scenes
from pixelgen.metrics.geneval import ClassDetections

SIDE = 64  # images are brought to this size
TEMPLATE = 24  # pixels of a side of the masks that are compared
LEAST_AREA, LEAST_SIDE = 0.012, 0.12  # of the image; smaller patches of a colour are no things
LIKENESS = 0.85  # intersection over union with the best shape that counts as certain


class GeometricDetector:
    """Finds shapes by colour and outline. Every pixel takes the nearest of the known colours or the background's;
    connected pixels of a colour are a thing, whose shape is the one that its mask overlaps best. The score is that
    overlap over `LIKENESS`, at most 1."""

    name = "geometric"

    def __init__(self) -> None:
        self.templates = {shape: scenes.silhouette(shape, TEMPLATE) for shape in scenes.SHAPES}

    def __call__(self, image: np.ndarray) -> dict[str, ClassDetections]:
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        known = np.array([*scenes.COLORS.values(), np.median(border, axis=0)])
        nearest = np.linalg.norm(image[:, :, None] - known, axis=-1).argmin(-1)
        boxes: dict[str, list[list[float]]] = {shape: [] for shape in scenes.SHAPES}
        masks: dict[str, list[np.ndarray]] = {shape: [] for shape in scenes.SHAPES}
        for color in range(len(scenes.COLORS)):
            parts, _ = ndimage.label(nearest == color)
            for number, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
                mask = parts == number
                cut = mask[rows, columns]
                if cut.sum() < LEAST_AREA * SIDE**2 or min(cut.shape) < LEAST_SIDE * SIDE:
                    continue
                shape, likeness = self._shape(cut)
                boxes[shape].append([columns.start, rows.start, columns.stop, rows.stop,
                                     min(1.0, likeness / LIKENESS)])
                masks[shape].append(mask)
        return {shape: ClassDetections(np.array(boxes[shape], np.float32), np.array(masks[shape]))
                for shape in scenes.SHAPES if boxes[shape]}

    def _shape(self, mask: np.ndarray) -> tuple[str, float]:
        """The shape whose silhouette overlaps a cut-out mask best, and by how much."""
        square = Image.fromarray(mask.astype(np.uint8) * 255).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
        seen = np.asarray(square) > 127
        likeness = {shape: float((seen & t).sum() / (seen | t).sum()) for shape, t in self.templates.items()}
        return max(likeness.items(), key=lambda pair: pair[1])


class SceneColors:
    """The colour of a thing is the known one that is nearest to the median of its pixels."""

    name = "scene-colors"

    def __call__(self, image: np.ndarray, name: str, boxes: np.ndarray, masks: np.ndarray) -> list[str]:
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        known = np.array([*scenes.COLORS.values()])
        medians = [np.median(image[mask], axis=0) for mask in masks]
        return [list(scenes.COLORS)[int(np.linalg.norm(known - m, axis=-1).argmin())] for m in medians]
