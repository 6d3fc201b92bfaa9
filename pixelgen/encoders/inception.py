"""The Inception network behind FID: TensorFlow's graph of 2015-12-05 as rebuilt by torch-fidelity.

Shapes: images (B, 3, H, W) uint8 RGB; pool (B, 2048), spatial (B, 2023), logits (B, 1008), all float32.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixelgen.encoders import INCEPTION
from pixelgen.errors import CheckpointError
from pixelgen.precision import ieee_fp32
from pixelgen.tensors import read_pickle

FILE = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7  # of the 192: 17·17·7 = 2023 numbers, close to the 2048 of the pool (arXiv 2103.03841)


class Inception:
    """Call with uint8 images: {"pool", "spatial", "logits"}. Its `name` says whose figures these are."""

    def __init__(self, network: nn.Module, name: str, device: torch.device) -> None:
        self.network, self.name, self.device = network, name, device
        self._spatial = torch.empty(0)
        network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # NHWC, as in TensorFlow

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images with values 0..255; the network resizes them to 299×299 as TensorFlow 1 does."""
        with ieee_fp32():
            pool, logits = self.network(images.to(self.device))
        return {"pool": pool, "spatial": self._spatial, "logits": logits}


def load_inception(path: str | Path, device: str | torch.device = "cpu") -> Inception:
    """The extractor with the weights in `path`, a file; nothing is downloaded.

    It is named `inception-v3-compat` only with the published weights. Others, such as a stand-in for tests,
    load under a name with their checksum, so that no figure of theirs passes for FID.
    Raises CheckpointError when the file is not there or holds anything but weights of this network.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as published  # type: ignore[import-untyped] # slow

    path, device = Path(path), torch.device(device)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected torch-fidelity's {FILE}")
    checked = io.BytesIO()  # torch-fidelity would run what is in a pickle: it gets one that was written here
    torch.save(read_pickle(path), checked)
    checked.seek(0)
    try:
        network = published.FeatureExtractorInceptionV3(
            INCEPTION,
            ["2048", "logits_unbiased"],  # the latter are the logits without the bias
            feature_extractor_weights_path=checked,
        )
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: not the weights of {INCEPTION}: {str(error)[:500]}") from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Inception(network.to(device), INCEPTION if digest == SHA256 else f"inception-{digest[:8]}", device)
