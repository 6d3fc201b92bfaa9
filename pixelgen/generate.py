"""From a trained model to images: what the sample stage, the command line and a notebook use."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pixelgen.checkpoint import load_denoiser
from pixelgen.config import SamplerConfig, choose
from pixelgen.images import to_uint8
from pixelgen.models.jit import JiT
from pixelgen.samplers import Callback, sample


class PixelGen:
    """A trained denoiser that draws images.

    >>> model = PixelGen.from_pretrained("out/train/c2i/model")
    >>> images = model.generate(labels=[3, 7], seeds=[0, 1])   # (2, H, W, 3) uint8
    """

    def __init__(self, denoiser: JiT, precision: str = "fp32"):
        self.denoiser, self.precision = denoiser, choose(precision, ["fp32", "bf16"], "precision")

    @classmethod
    def from_pretrained(cls, source: str | Path, weights: str = "ema", device: str | torch.device = "cpu",
                        precision: str = "fp32", compile: bool = False) -> "PixelGen":
        """Load an exported model from a directory, or from a Hugging Face Hub repository `owner/name`.

        `precision`: fp32 or bf16 (autocast). Errors name the file and the keys that do not fit.
        """
        directory = Path(source)
        if not directory.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/")):
            from huggingface_hub import snapshot_download

            directory = Path(snapshot_download(str(source), allow_patterns=["config.json", "*.safetensors"]))
        denoiser = load_denoiser(directory, weights)
        if not isinstance(denoiser, JiT):
            raise ValueError(f"{directory} is text-conditional; this class draws class-conditional models only")
        if compile:
            denoiser.compile()
        return cls(denoiser.to(device), precision)

    def generate(self, labels: Sequence[int], seeds: Sequence[int], sampler: SamplerConfig = SamplerConfig(),
                 batch_size: int | None = None, callback: Callback | None = None) -> np.ndarray:
        """One image for each label and seed -> (N, H, W, 3) uint8.

        An image depends on its own label and seed only, up to the last bit of a few pixels: matrix products of other
        sizes round differently. With a `batch_size`, the network always sees exactly that many samples (the last
        batch is filled up), and an image has the same bytes whatever is asked for beside it. None: one batch of all.
        """
        classes = self.denoiser.config.num_classes
        if len(labels) != len(seeds):
            raise ValueError(f"{len(labels)} labels, but {len(seeds)} seeds: one seed for each image")
        if len(labels) == 0:
            raise ValueError("no labels: nothing to draw")
        if wrong := sorted({y for y in labels if not 0 <= y < classes}):
            raise ValueError(f"labels {wrong} are outside 0 to {classes - 1}")
        size = batch_size or len(labels)
        parts = []
        for start in range(0, len(labels), size):
            chosen = range(start, min(start + size, len(labels)))
            filled = [*chosen, *[chosen[-1]] * (size - len(chosen))]
            drawn = self._draw([labels[i] for i in filled], [seeds[i] for i in filled], sampler, callback)
            parts.append(drawn[:len(chosen)])
        return np.concatenate(parts)

    @torch.no_grad()
    def _draw(self, labels: list[int], seeds: list[int], sampler: SamplerConfig, callback: Callback | None
              ) -> np.ndarray:
        device = self.denoiser.output_weight.device
        noise = self.noise(seeds).to(device)
        y = torch.tensor(labels, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            x = sample(lambda x, t, y: self.denoiser(x, t, y)[0].float(), noise, y,
                       torch.full_like(y, self.denoiser.null_label), sampler, callback)
        return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

    def noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """Starting noise (N, 3, H, W), row i from `seeds[i]` alone; drawn on the CPU, the same on every device."""
        size = self.denoiser.config.image_size
        return torch.stack([torch.randn(3, size, size, generator=torch.Generator().manual_seed(int(s)))
                            for s in seeds])
