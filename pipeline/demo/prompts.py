"""Prompts of scenes that the demo's training leaves out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.demo import scenes
from pipeline.prompts import PromptSource

MOST = 12  # of a tag


@dataclass(frozen=True)
class ScenePrompts(PromptSource):
    """Held-out prompts of every tag."""

    metric: ClassVar[str] = "demo_geneval"

    def read(self, folder: Path) -> list[dict[str, Any]]:
        prompts = [prompt for tag in scenes.all_prompts() for prompt in scenes.held_out(tag)[:MOST]]
        return [{"name": f"{n:05}", **prompt} for n, prompt in enumerate(prompts)]
