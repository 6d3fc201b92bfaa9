"""GenEval's classifier of colours: CLIP ViT-L/14."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.networks.published import Published, hub


@dataclass(frozen=True)
class ClipVitL14(Published):
    role: ClassVar = "clip"
    files: ClassVar = hub(
        "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "config.json",
        "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
        "merges.txt", "special_tokens_map.json")

    def prepare(self, folder: Path) -> None:
        from pixelgen.metrics.colors import load_colors

        load_colors(folder, "cpu")
