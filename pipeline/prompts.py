"""Sources of prompts: what to draw, where it is not every class."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pipeline.checkout import data_path
from pipeline.download import download
from pixelgen.config import Variant
from pixelgen.prompts import read_prompts

LARGEST = 64 << 20  # bytes of a file of prompts


class PromptSource(Variant, ABC):
    """Where prompts come from."""

    kinds: ClassVar[dict[str, str]] = {
        "file": "pipeline.prompts:PromptFile",
        "scenes": "pipeline.demo.prompts:ScenePrompts",
    }
    metric: ClassVar[str] = "geneval"  # the kind of the metric that judges images of these prompts

    @abstractmethod
    def read(self, folder: Path, /) -> list[dict[str, Any]]:
        """For each prompt what GenEval's metadata.jsonl says of it, and the `name` of its images' folder or file. What
        has to be fetched is kept in `folder`."""


@dataclass(frozen=True)
class PromptFile(PromptSource):
    """Prompts of a file or folder (`pixelgen.prompts.read_prompts`)."""

    path: str  # GenEval's metadata.jsonl, a text of one prompt a line, or a folder of texts; or the URL of a file

    def read(self, folder: Path) -> list[dict[str, Any]]:
        path = data_path(self.path)
        if self.path.startswith(("https://", "http://")):
            path = folder / ("source" + PurePosixPath(self.path).suffix)
            download(self.path, path, "fetch it on another machine and set path to the file", LARGEST)
        return [{**prompt.metadata, "name": prompt.name} for prompt in read_prompts(path)]
