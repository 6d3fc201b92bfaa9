"""Weights on disk: the training state whole, exported models, and the import of the published checkpoints.

Nothing here executes code from a file: states are read with `weights_only`, models are safetensors and JSON.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelgen.config import ConfigError, load, plain
from pixelgen.denoisers import Architecture, Denoiser, Shapes, kind_of
from pixelgen.errors import CheckpointError
from pixelgen.files import atomic
from pixelgen.models import DenoiserNetwork
from pixelgen.tensors import check_state, read_pickle, read_safetensors

if TYPE_CHECKING:  # whoever draws from a model has nothing to do with its training
    from pixelgen.train import TrainState

Weights = dict[str, Tensor]


def save_state(content: Mapping[str, Any], path: Path) -> None:
    """Write what `TrainState.state_dict` gives so that a reader sees a whole file or none."""
    with atomic(path) as file:
        torch.save(content, file)


def load_state(state: "TrainState", path: Path) -> None:
    """Fill `state` from the file; any missing, extra or misshaped entry is an error."""
    content = read_state(path)
    expected = state.state_dict().keys()
    if not isinstance(content, Mapping) or content.keys() != expected:
        raise CheckpointError(f"{path}: not a training state, which has {', '.join(expected)}")
    try:
        state.load_state_dict(dict(content))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the state is of another model or optimizer: {error}") from error


def read_state(path: Path) -> Any:
    """The content of a checkpoint file, tensors on the CPU; nothing in the file is executed."""
    return read_pickle(path)


# --------------------------------------------------------------------------------------------- exported models


def export(directory: Path, config: Architecture, ema: Weights, raw: Weights, projector: Weights) -> None:
    """Write `config.json` and three files of weights into `directory`: `ema` and `raw` of the denoiser, and the REPA
    head `projector` (empty if there was none), which only a later training stage needs."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"denoiser": kind_of(config), "config": plain(config)}, indent=2)
    (directory / "config.json").write_text(text + "\n")
    for name, weights in (("ema", ema), ("raw", raw), ("projector", projector)):
        save_file({k: v.detach().float().cpu().contiguous() for k, v in weights.items()},
                  directory / f"{name}.safetensors")


def read_config(directory: Path) -> Architecture:
    """The architecture of an exported model."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: not an exported model: there is no config.json. `pixelgen convert` makes "
                              "one from a published .ckpt; training writes one when it ends")
    try:
        described = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(described, Mapping) or "config" not in described:
        raise CheckpointError(f"{path}: not the description of an exported model, which has denoiser and config")
    denoiser = Denoiser.of(str(described.get("denoiser")), f"{path}: denoiser")
    return load(denoiser.architecture, described["config"], f"{path}: config")


def load_denoiser(directory: Path, weights: str = "ema") -> DenoiserNetwork:
    """The exported model of `directory`, in eval mode on the CPU. `weights`: ema or raw."""
    config, file = read_config(directory), directory / f"{weights}.safetensors"
    if file.is_file() and 4 * config.least_weights > file.stat().st_size:  # before memory is taken for it
        raise CheckpointError(f"{file}: too small for the model that {directory / 'config.json'} describes")
    model = config.build()
    load_weights(model, file)
    return model.eval().requires_grad_(False)


def start_from(state: "TrainState", directory: Path) -> None:
    """Begin training where the exported model of `directory` ended: its weights, averaged weights and REPA head.

    The optimizer stays fresh. The position table is kept as it is built for the image size of `state`; whatever
    else does not fit is an error.
    """
    read_config(directory)
    for model, name in ((state.model.denoiser, "raw"), (state.ema, "ema")):
        load_weights(model, directory / f"{name}.safetensors", rebuilt=("pos_embed",))
    if state.model.projector is not None:
        load_weights(state.model.projector, directory / "projector.safetensors")


def load_weights(model: nn.Module, file: Path, rebuilt: Sequence[str] = ()) -> None:
    """Fill `model` from a safetensors file that fits it exactly, but for the entries that `model` has `rebuilt`."""
    state = read_safetensors(file)
    state |= {k: v for k, v in model.state_dict().items() if k in rebuilt and k in state}
    check_weights(model, state, str(file))
    model.load_state_dict(state)


def check_weights(model: nn.Module, weights: Weights, source: str) -> None:
    """CheckpointError that lists every missing, extra and misshaped entry, unless `weights` fit `model` exactly."""
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    missing = sorted(expected.keys() - weights.keys())
    extra = sorted(weights.keys() - expected.keys())
    misshaped = [f"{k}: {tuple(weights[k].shape)} instead of {expected[k]}"
                 for k in sorted(expected.keys() & weights.keys()) if tuple(weights[k].shape) != expected[k]]
    problems = [f"{what} ({len(keys)}): {', '.join(keys)}"
                for what, keys in (("missing", missing), ("extra", extra), ("misshaped", misshaped)) if keys]
    if problems:
        raise CheckpointError(f"{source}: the weights do not fit the model. " + "; ".join(problems))


# ------------------------------------------------------------------------------------ the published checkpoints


def read_published(path: Path, in_context_start: int | None = None) -> tuple[Architecture, Weights, Weights, Weights]:
    """Read a Lightning `.ckpt` of the reference implementation -> architecture, EMA, raw, REPA head's weights.

    The file holds `denoiser.*`, `ema_denoiser.*` and `diffusion_trainer.proj.*`, the head. Anything else, and
    anything that does not fit the inferred architecture, is an error. `in_context_start` leaves no trace in the
    weights: it is known for the published sizes, and has to be given for any other.
    """
    content = read_state(path)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: not a Lightning checkpoint: there is no state_dict of tensors")
    state = check_state(state, path)
    groups: dict[str, Weights] = {"denoiser": {}, "ema_denoiser": {}, "diffusion_trainer.proj": {}}
    extra = []
    for key, value in state.items():
        for prefix, weights in groups.items():
            if key.startswith(f"{prefix}."):
                weights[key[len(prefix) + 1:]] = value
                break
        else:
            extra.append(key)
    empty = [name for name in ("denoiser", "ema_denoiser") if not groups[name]]
    if extra or empty:
        raise CheckpointError(f"{path}: extra ({len(extra)}): {', '.join(sorted(extra)) or 'none'}; "
                              f"without any entry: {', '.join(empty) or 'none'}")
    config = infer_config(groups["ema_denoiser"], str(path), in_context_start)
    with torch.device("meta"):
        model = config.build()
    for name in ("ema_denoiser", "denoiser"):
        check_weights(model, groups[name], f"{path}: {name}")
    return config, groups["ema_denoiser"], groups["denoiser"], groups["diffusion_trainer.proj"]


def infer_config(weights: Weights, source: str, in_context_start: int | None = None) -> Architecture:
    """The architecture whose weights these are, read off their shapes."""
    shapes = Shapes({name: tuple(weight.shape) for name, weight in weights.items()})
    architectures = [Denoiser.of(kind).architecture for kind in Denoiser.kinds]
    fitting = [architecture for architecture in architectures if architecture.mark in shapes]
    if not fitting:
        raise CheckpointError(f"{source}: not a denoiser: there is none of {', '.join(a.mark for a in architectures)}")
    try:
        return fitting[0].infer(shapes, in_context_start)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    except (ConfigError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: no denoiser has weights of these shapes: {error}") from error
