"""From a trained model to images: what the sample stage, the command line and a notebook use."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pixelgen.checkpoint import load_denoiser
from pixelgen.config import ConfigError, SamplerConfig, choose, require
from pixelgen.encoders.text import TextEncoder, load_text_encoder
from pixelgen.errors import CheckpointError
from pixelgen.images import to_uint8
from pixelgen.models.jit import JiT
from pixelgen.models.jit_t2i import JiTText
from pixelgen.models.speed import compile_blocks
from pixelgen.precision import store_in_bf16
from pixelgen.samplers import Callback, sample
from pixelgen.threads import in_background

BATCH = 32  # samples that the networks of the workflow see at once: no byte depends on how many are asked for


class PixelGen:
    """A trained denoiser that draws images of classes, or of prompts.

    >>> model = PixelGen.from_pretrained("out/train/c2i/model")
    >>> images = model.generate([3, 7], seeds=[0, 1])   # (2, H, W, 3) uint8
    >>> model = PixelGen.from_pretrained("out/train/sft/model", text_encoder="out/weights/text")
    >>> images = model.generate(["a photo of a red circle"], seeds=[0])
    """

    def __init__(self, denoiser: JiT | JiTText, precision: str = "fp32", text: TextEncoder | None = None):
        self.denoiser, self.precision, self.text = denoiser, choose(precision, ["fp32", "bf16"], "precision"), text

    @classmethod
    def from_pretrained(cls, source: str | Path, weights: str = "ema", device: str | torch.device = "cpu",
                        precision: str = "fp32", compile: bool = False,
                        text_encoder: str | Path | None = None) -> "PixelGen":
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
        denoiser = load_denoiser(directory, weights)
        text = None
        if isinstance(denoiser, JiTText):
            c = denoiser.config
            if text_encoder is None:
                raise ConfigError(f"{directory} draws prompts: name the folder of its text encoder in text_encoder")
            text = load_text_encoder(text_encoder, c.text_length, device, precision)
            require(text.width == c.text_width, f"{text_encoder} gives features of width {text.width}, {directory} was "
                    f"trained on {c.text_width}: it is another text encoder")
        if precision == "bf16":
            store_in_bf16(denoiser)
        if compile:
            compile_blocks(denoiser)
        return cls(denoiser.to(device), precision, text)

    def generate(self, wanted: Sequence[int] | Sequence[str], seeds: Sequence[int],
                 sampler: SamplerConfig = SamplerConfig(), batch_size: int | None = None, negative: str = "",
                 callback: Callback | None = None) -> np.ndarray:
        """One image for each class label or prompt and its seed -> (N, H, W, 3) uint8.

        Guidance leads away from the null label, or from the prompt `negative`.

        An image depends on its own label or prompt and seed only, up to the last bit of a few pixels: matrix products
        of other sizes round differently. With a `batch_size`, the networks always see exactly that many samples (the
        last batch is filled up), and an image has the same bytes whatever is asked for beside it. None: one batch.
        """
        if len(wanted) != len(seeds):
            raise ValueError(f"{len(wanted)} labels or prompts, but {len(seeds)} seeds: one seed for each image")
        if len(wanted) == 0:
            raise ValueError("no labels or prompts: nothing to draw")
        size = batch_size or len(wanted)
        null = self.absence(negative)
        batches = [[*range(start, min(start + size, len(wanted)))] for start in range(0, len(wanted), size)]
        batches[-1] += [batches[-1][-1]] * (len(batches) * size - len(wanted))
        parts = []
        with contextlib.closing(in_background(self.noise([seeds[i] for i in batch]) for batch in batches)) as noises:
            for batch, noise in zip(batches, noises, strict=True):
                condition = self.conditions([wanted[i] for i in batch])
                parts.append(self._draw(condition, null.expand_as(condition), noise, sampler, callback))
        return np.concatenate(parts)[:len(wanted)]

    def absence(self, negative: str = "") -> Tensor:
        """What guidance leads away from: the null label (1,), or the features (1, L, C) of the prompt `negative`."""
        if isinstance(self.denoiser, JiTText):
            assert self.text is not None
            return self.text([negative])
        require(not negative, f"negative {negative!r}: a class-conditional model takes no negative prompt")
        return torch.tensor([self.denoiser.null_label], device=self.denoiser.output_weight.device)

    def conditions(self, wanted: Sequence[int | str]) -> Tensor:
        """What the denoiser is given for labels or prompts: labels (N,) or text features (N, L, C). ConfigError for
        what this model cannot draw."""
        if isinstance(self.denoiser, JiTText):
            assert self.text is not None
            if wrong := [w for w in wanted if not isinstance(w, str)]:
                raise ConfigError(f"this model draws prompts, not labels such as {wrong[0]!r}")
            return self.text(wanted)  # type: ignore[arg-type]
        classes = self.denoiser.config.num_classes
        if strange := [w for w in wanted if isinstance(w, str) or not 0 <= w < classes]:
            raise ConfigError(f"labels {sorted(set(strange), key=str)} are outside 0 to {classes - 1}")
        return torch.tensor(wanted, device=self.denoiser.output_weight.device)

    @torch.no_grad()
    def _draw(self, condition: Tensor, null: Tensor, noise: Tensor, sampler: SamplerConfig,
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
