"""Transformers' networks from local files: plain tensors only, every key accounted for, named by checksum."""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgen.errors import CheckpointError
from pixelgen.tensors import check_state, read_pickle, read_safetensors

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a directory, the first that is there


def weights_file(path: Path) -> Path:
    """`path` itself, or the weights in it if it is a directory written by transformers' `save_pretrained`.
    CheckpointError if there are none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path / 'config.json'}: no such file; expected what save_pretrained writes")
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: holds neither {' nor '.join(WEIGHTS)}")


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors in a file, below `state_dict` if it has one, and the file's sha256. A pickle's code never runs."""
    state: Any = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    with path.open("rb") as file:
        return check_state(state, path), hashlib.file_digest(file, "sha256").hexdigest()


def build(network: type[Any], config: Any, state: Mapping[str, Tensor], source: Path, unused: str) -> Any:
    """The frozen `network` of a config with weights under the names of the Hub's files, which outlive transformers'
    renamings of its modules. CheckpointError that lists what is missing, extra or misshaped, `unused` (a regular
    expression) left aside."""
    with _quietly():
        model, info = network.from_pretrained(None, config=config, state_dict=dict(state), dtype=torch.float32,
                                              ignore_mismatched_sizes=True, output_loading_info=True)
    found = {"missing": sorted(info["missing_keys"]), "extra": sorted(info["unexpected_keys"]),
             "misshaped": [f"{key} {tuple(theirs)} instead of {tuple(ours)}"
                           for key, theirs, ours in sorted(info["mismatched_keys"])]}
    problems = [f"{what} ({len(keys)}): {', '.join(keys)}" for what, names in found.items()
                if (keys := [name for name in names if not re.search(unused, name)])]
    if problems:
        raise CheckpointError(f"{source}: not the weights of {network.__name__}; " + "; ".join(problems))
    return model.eval().requires_grad_(False)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own report on keys, which warns of the unused ones too, and its bar."""
    from transformers.utils import logging as theirs  # slow

    logger, bar = logging.getLogger("transformers"), theirs.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            theirs.enable_progress_bar()
