"""The frozen text encoder: Qwen3's last hidden states, loaded from files without network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixelgen.errors import CheckpointError
from pixelgen.tensors import reading

# No token of the empty prompt, which is padding from end to end, may look at any. These kernels give 0 for it, on the
# CPU and on GPUs; cuDNN's, the default on some GPUs, gives other numbers.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def load_text_encoder(directory: str | Path, length: int, device: str | torch.device = "cpu",
                      precision: str = "fp32") -> "TextEncoder":
    """The encoder and its tokenizer in `directory`, as transformers' `save_pretrained` writes them.

    Any model of `AutoModel` will do; the paper's is `Qwen/Qwen3-1.7B`, in bf16. CheckpointError if there is none.
    No code that comes with them is run.
    """
    from transformers import AutoModel, AutoTokenizer  # slow to import; only text needs it

    if not (Path(directory) / "config.json").is_file():
        raise CheckpointError(f"{directory}: not a text encoder: there is no config.json. Needed is a folder with "
                              "model and tokenizer, such as a copy of Qwen/Qwen3-1.7B")
    with reading(Path(directory), "text encoder with safetensors"):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False,
                                                  padding_side="right")
        network = AutoModel.from_pretrained(directory, local_files_only=True, trust_remote_code=False,
                                            use_safetensors=True,
                                            dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return TextEncoder(tokenizer, network.to(device), length)


class TextEncoder:
    """Prompts -> text features (B, L, C) in float32: the last hidden states of exactly `length` tokens.

    Shorter prompts are padded on the right, and no token looks at the padding; longer ones are cut. The states of
    padding tokens are part of the features, which the denoiser sees without a mask.
    """

    def __init__(self, tokenizer: Any, network: Any, length: int):
        self.tokenizer, self.network, self.length = tokenizer, network.eval().requires_grad_(False), length
        self.width = int(network.config.hidden_size)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts), truncation=True, max_length=self.length, padding="max_length",
                                return_tensors="pt").to(self.network.device)
        with sdpa_kernel(BACKENDS):
            states = self.network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                                  use_cache=False).last_hidden_state  # keys and values are not needed again
        return states.float()
