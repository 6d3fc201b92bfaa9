"""Files of tensors from elsewhere: nothing in them is executed, and none takes more memory than it is large itself."""

import itertools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from pixelgen.errors import CheckpointError


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """What safetensors or transformers raises about a file or folder from elsewhere, as a CheckpointError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable {what}: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. CheckpointError if it is none, or damaged."""
    with reading(path, "file of plain tensors"):
        return load_file(path)


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, tensors on the CPU. CheckpointError if there is more in it than tensors and plain
    data."""
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":
                with zipfile.ZipFile(file) as archive:
                    claimed = sum(entry.file_size for entry in archive.infolist())
                if claimed > path.stat().st_size:  # torch never compresses: a small file could become any size
                    raise ValueError(f"an archive of {claimed:,} bytes in a file of {path.stat().st_size:,}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(f"{path}: not a readable file of plain tensors: {str(error)[:500]}") from error


def check_state(state: Any, path: Path) -> dict[str, Tensor]:
    """`state`, of the pickle in `path`, as named dense tensors on the CPU. CheckpointError if there is anything else
    in it, or if its tensors claim more elements than the file has: one number can pose as a tensor of any shape."""
    if not isinstance(state, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor)
                                                 for k, v in state.items()):
        raise CheckpointError(f"{path}: not a state dict: it holds something other than named tensors")
    if odd := [k for k, v in state.items()
               if v.is_nested or v.is_quantized or v.layout != torch.strided or v.device.type != "cpu"]:
        raise CheckpointError(f"{path}: not dense tensors of numbers: {', '.join(odd)}")
    claimed, size = sum(v.numel() * v.element_size() for v in state.values()), path.stat().st_size
    if claimed > 2 * size:  # twice: two names may stand for one tensor
        raise CheckpointError(f"{path}: its tensors claim {claimed:,} bytes, but the file has {size:,}")
    return dict(state)


def run_bare(network: nn.Module, *inputs: object, **named: object) -> None:
    """A forward pass without weights, over inputs on the meta device."""
    tensors = itertools.chain(network.named_parameters(), network.named_buffers())
    bare = {name: torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
            for name, tensor in tensors}
    with torch.no_grad():
        functional_call(network, bare, inputs, named)
