"""From a trained model to images: what the sample stage, the command line and a notebook use."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pixelgen.checkpoint import load_denoiser
from pixelgen.conditioning import Conditioning
from pixelgen.config import choose
from pixelgen.errors import CheckpointError
from pixelgen.images import to_uint8
from pixelgen.models import DenoiserNetwork
from pixelgen.precision import store_in_bf16
from pixelgen.samplers import Callback, Sampler
from pixelgen.sampling import sample
from pixelgen.speed import compile_blocks
from pixelgen.threads import in_background

BATCH = 32  # samples that the networks of the workflow see at once: no byte depends on how many are asked for


class PixelGen:
    """A trained denoiser that draws images of classes, or of prompts.

    >>> model = PixelGen.from_pretrained("out/train/c2i/model")
    >>> images = model.generate([3, 7], seeds=[0, 1])   # (2, H, W, 3) uint8
    >>> model = PixelGen.from_pretrained("out/train/sft/model", text_encoder="out/networks/text")
    >>> images = model.generate(["a photo of a red circle"], seeds=[0])
    """

    def __init__(self, denoiser: DenoiserNetwork, precision: str, conditioning: Conditioning):
        self.denoiser, self.conditioning = denoiser, conditioning
        self.precision = choose(precision, ["fp32", "bf16"], "precision")

    @classmethod
    def from_pretrained(cls, source: str | Path, weights: str = "ema", device: str | torch.device = "cpu",
                        precision: str = "fp32", compile: bool = False,
                        text_encoder: str | Path | None = None) -> PixelGen:
        """Load an exported model from a directory, or from a Hugging Face Hub repository `owner/name`.

        `precision`: fp32 or bf16 (autocast). `text_encoder`: the directory of the encoder that a text-conditional
        model was trained with. Errors name the file and the keys that do not fit.
        """
        directory = Path(source)
        if not directory.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/")):
            from huggingface_hub import snapshot_download

            try:
                directory = Path(snapshot_download(str(source), allow_patterns=["config.json", "*.safetensors"]))
            except (OSError, ValueError) as error:  # what the Hub's client raises; so it does without a network
                raise CheckpointError(f"{source}: no such directory, and nothing to be had from the Hub: {error}"
                                      ) from error
        return cls.prepared(load_denoiser(directory, weights), device, precision, compile, text_encoder, str(directory))

    @classmethod
    def prepared(cls, denoiser: DenoiserNetwork, device: str | torch.device = "cpu", precision: str = "fp32",
                 compile: bool = False, text_encoder: str | Path | None = None, told: str = "this model") -> PixelGen:
        """A denoiser made ready to draw, in place, as by `from_pretrained`. `told`: what messages call it."""
        conditioning = denoiser.config.load_conditioning(text_encoder, device, precision, told)
        if precision == "bf16":
            store_in_bf16(denoiser)
        if compile:
            compile_blocks(denoiser)
        return cls(denoiser.eval().requires_grad_(False).to(device), precision, conditioning)

    def generate(self, labels_or_prompts: Sequence[int] | Sequence[str], seeds: Sequence[int],
                 sampler: Sampler | None = None, batch_size: int | None = None, negative: str = "",
                 callback: Callback | None = None) -> np.ndarray:
        """One image for each class label or prompt and its seed -> (N, H, W, 3) uint8.

        `sampler`: None for Heun's. Guidance leads away from the null label, or from the prompt `negative`.

        An image depends on its own label or prompt and seed only, up to the last bit of a few pixels: matrix products
        of other sizes round differently. With a `batch_size`, the networks always see exactly that many samples (the
        last batch is filled up), and an image has the same bytes whatever is asked for beside it. None: one batch.
        """
        count = len(labels_or_prompts)
        if count != len(seeds):
            raise ValueError(f"{count} labels or prompts, but {len(seeds)} seeds: one seed for each image")
        if count == 0:
            raise ValueError("no labels or prompts: nothing to draw")
        sampler = sampler or Sampler.of("heun")()
        size = batch_size or count
        null = self.conditioning.null(negative)
        batches = [[*range(start, min(start + size, count))] for start in range(0, count, size)]
        batches[-1] += [batches[-1][-1]] * (len(batches) * size - count)
        parts = []
        with contextlib.closing(in_background(self.noise([seeds[i] for i in batch]) for batch in batches)) as noises:
            for batch, noise in zip(batches, noises, strict=True):
                condition = self.conditioning.encode([labels_or_prompts[i] for i in batch])
                parts.append(self._draw(condition, null.expand_as(condition), noise, sampler, callback))
        return np.concatenate(parts)[:count]

    @torch.no_grad()
    def _draw(self, condition: Tensor, null: Tensor, noise: Tensor, sampler: Sampler,
              callback: Callback | None) -> np.ndarray:
        device = self.denoiser.output_weight.device
        noise = noise.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            x = sample(lambda x, t, y: self.denoiser(x, t, y)[0].float(), noise, condition, null, sampler, callback)
        return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Starting noise (N, 3, H, W), row i from `seeds[i]` alone; drawn on the CPU, the same on every device."""
        size = self.denoiser.config.image_size
        return torch.stack([torch.randn(3, size, size, generator=torch.Generator().manual_seed(int(s)))
                            for s in seeds])
