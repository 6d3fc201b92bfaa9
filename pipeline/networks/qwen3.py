"""Qwen3-1.7B, the encoder of prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.networks.published import Published, hub


@dataclass(frozen=True)
class Qwen3(Published):
    role: ClassVar = "text"
    files: ClassVar = hub(
        "Qwen/Qwen3-1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", "config.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

    def config(self, folder: Path) -> dict[str, Any]:
        return {"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}

    def prepare(self, folder: Path) -> None:
        from pixelgen.encoders.text import load_text_encoder

        load_text_encoder(folder, length=128, precision="bf16")
