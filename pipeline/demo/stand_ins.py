"""Small stand-ins for the published networks, of the same classes, made in seconds."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.demo import scenes
from pipeline.demo.judge import SIZE, share, split
from pipeline.storage import write_json
from pixelgen.data.captions import PREFIXES
from pixelgen.encoders.dino import PATCH

STAND_IN: dict[str, Any] = {"architecture": "vit_small_patch14_dinov2",
                            "arguments": {"embed_dim": 64, "depth": 4, "num_heads": 4}}
GRID = SIZE // 16  # patches on a side
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
VOCABULARY = 512
LOUDER = 5  # times the usual token embeddings: what random layers add to them shall not drown them


def write_dino(out: Path, seed: int, steps: int = 300) -> dict:
    """A small DINOv2-shaped network that was trained to tell digits by its patch tokens; its accuracy then."""
    import timm

    images, labels = split("train")
    torch.manual_seed(seed)
    network: Any = timm.create_model(STAND_IN["architecture"], num_classes=0, img_size=GRID * PATCH,
                                **STAND_IN["arguments"])
    head = nn.Linear(network.embed_dim, 10)
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=1e-3)
    x = F.interpolate(images.float() / 127.5 - 1, size=GRID * PATCH, mode="bicubic")

    def logits(x: Tensor) -> Tensor:
        return head(network.forward_features(x)[:, 1:]).mean(1)

    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        loss = F.cross_entropy(logits(x[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, out / "model.safetensors")
    write_json(out / "config.json", STAND_IN)
    with torch.no_grad():
        return {"dino_accuracy_train": share(logits(x), labels)}


def write_trunk(out: Path, seed: int) -> dict:
    """An AlexNet trunk with random weights: LPIPS keeps much of its meaning with them (arXiv 1801.03924)."""
    from torchvision.models import alexnet

    torch.manual_seed(seed)
    save_file({f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()},
              out / "trunk.safetensors")
    write_json(out / "config.json", {"net": "alex"})
    return {}


def write_text(out: Path, seed: int) -> dict:
    """A small Qwen3 with random weights, and a tokenizer that was trained on the captions of scenes."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    texts = [template.format(prompt["prompt"].removeprefix(scenes.PHOTO))
             for prompts in scenes.all_prompts().values() for prompt in prompts
             for template in (*scenes.CAPTIONS.values(), *(prefix + "{}" for prefix in PREFIXES))]
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    out.mkdir(exist_ok=True)
    pieces.save_model(str(out))
    tokenizer = Qwen2Tokenizer.from_pretrained(out)
    tokenizer.save_pretrained(out)
    torch.manual_seed(seed)
    network = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **TEXT))
    with torch.no_grad():
        network.embed_tokens.weight *= LOUDER
    network.save_pretrained(out)
    return {"tokens": len(tokenizer)}


WRITERS = {"dino": write_dino, "lpips": write_trunk, "text": write_text}  # by role
