"""Weights on disk: the training state whole, exported models, and the import of the published checkpoints.

Nothing here executes code from a file: states are read with `weights_only`, models are safetensors and JSON.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelgen.config import ConfigError, DenoiserConfig, TextDenoiserConfig, choose, load
from pixelgen.errors import CheckpointError
from pixelgen.files import atomic
from pixelgen.models import KINDS, SIZES, build_denoiser, hidden_width
from pixelgen.models.jit import JiT
from pixelgen.models.jit_t2i import JiTText
from pixelgen.tensors import check_state, read_pickle, read_safetensors

if TYPE_CHECKING:  # whoever draws from a model has nothing to do with its training
    from pixelgen.train import TrainState

Weights = dict[str, Tensor]
Config = DenoiserConfig | TextDenoiserConfig


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


def export(directory: Path, config: Config, ema: Weights, raw: Weights, projector: Weights) -> None:
    """Write `config.json` and three files of weights into `directory`: `ema` and `raw` of the denoiser, and the REPA
    head `projector` (empty if there was none), which only a later training stage needs."""
    directory.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, cls in KINDS.items() if isinstance(config, cls))
    text = json.dumps({"denoiser": kind, "config": dataclasses.asdict(config)}, indent=2)
    (directory / "config.json").write_text(text + "\n")
    for name, weights in (("ema", ema), ("raw", raw), ("projector", projector)):
        save_file({k: v.detach().float().cpu().contiguous() for k, v in weights.items()},
                  directory / f"{name}.safetensors")


def read_config(directory: Path) -> Config:
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
    kind, config = choose(str(described.get("denoiser")), list(KINDS), f"{path}: denoiser"), described["config"]
    if isinstance(config, dict):
        config = {"mlp_ratio": 4.0} | config  # models exported before it was written down had no other
    return load(KINDS[kind], config, f"{path}: config")


def load_denoiser(directory: Path, weights: str = "ema") -> JiT | JiTText:
    """The exported model of `directory`, in eval mode on the CPU. `weights`: ema or raw."""
    config, file = read_config(directory), directory / f"{weights}.safetensors"
    check_claims(config, file)
    model = build_denoiser(config)
    load_weights(model, file)
    return model.eval().requires_grad_(False)


def check_claims(config: Config, file: Path) -> None:
    """CheckpointError if the model of `config` is larger than the file of its weights, so that none is built that
    would not fit into memory."""
    sizes = [size for size in dataclasses.astuple(config) if isinstance(size, int)]
    grid = config.image_size // config.patch_size
    inside = (config.width + hidden_width(config)) * config.depth
    least = 4 * config.width * (grid**2 + inside + sum(sizes) - config.image_size)
    if file.is_file() and least > file.stat().st_size:
        raise CheckpointError(f"{file}: too small for the model that {file.parent / 'config.json'} describes")


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


def read_published(path: Path, in_context_start: int | None = None) -> tuple[Config, Weights, Weights, Weights]:
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
        model = build_denoiser(config)
    for name in ("ema_denoiser", "denoiser"):
        check_weights(model, groups[name], f"{path}: {name}")
    return config, groups["ema_denoiser"], groups["denoiser"], groups["diffusion_trainer.proj"]


def infer_config(weights: Weights, source: str, in_context_start: int | None = None) -> Config:
    """The architecture whose weights these are, read off their shapes."""
    def shape(key: str) -> torch.Size:
        if key not in weights:
            raise CheckpointError(f"{source}: not a denoiser: {key} is missing")
        return weights[key].shape

    def count(prefix: str) -> int:
        return len({k.split(".")[1] for k in weights if k.startswith(f"{prefix}.")})

    try:
        proj, width, depth = shape("x_embedder.proj1.weight"), shape("blocks.0.norm1.weight")[0], count("blocks")
        hidden = shape("blocks.0.mlp.w3.weight")[1]
        heads = width // shape("blocks.0.attn.q_norm.weight")[0]
        grid = round(shape("pos_embed")[1] ** 0.5)
        if "y_pos_embedding" in weights:
            patch = round((proj[1] / 3) ** 0.5)
            return with_hidden(hidden, TextDenoiserConfig(
                image_size=grid * patch, patch_size=patch, width=width, depth=depth, heads=heads, bottleneck=proj[0],
                text_depth=count("text_refine_blocks"), text_width=shape("y_embedder.proj.weight")[1],
                text_length=shape("y_pos_embedding")[1]))
        patch = proj[-1]
        known = [s for s in SIZES.values() if (s["width"], s["depth"], s["patch_size"]) == (width, depth, patch)]
        if in_context_start is None:
            if not known:
                raise CheckpointError(f"{source}: width {width}, depth {depth}, patch {patch} is no named size, so "
                                      "the block at which the in-context tokens enter is unknown: give "
                                      "in_context_start")
            in_context_start = int(known[0]["in_context_start"])
        return with_hidden(hidden, DenoiserConfig(
            image_size=grid * patch, patch_size=patch, width=width, depth=depth, heads=heads,
            bottleneck=proj[0] if "x_embedder.proj2.weight" in weights else None,
            in_context_start=in_context_start, in_context_len=shape("in_context_posemb")[1],
            dropout=0.0, num_classes=shape("y_embedder.embedding_table.weight")[0] - 1))
    except (ConfigError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: no denoiser has weights of these shapes: {error}") from error


def with_hidden(hidden: int, config: Config) -> Config:
    """`config` with the mlp_ratio that gives its SwiGLU this hidden width. As the width is rounded down there are many:
    the fraction with the smallest denominator, which finds 4, 3 or 2.5 again. ConfigError if `hidden` is 0."""
    least = Fraction(hidden, config.width) / (Fraction(2, 3) if isinstance(config, DenoiserConfig) else 1)
    fractions = (dataclasses.replace(config, mlp_ratio=math.ceil(least * q) / q) for q in itertools.count(1))
    return next(c for c in fractions if hidden_width(c) == hidden)
