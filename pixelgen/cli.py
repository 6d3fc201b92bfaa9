"""The `pixelgen` command: train, and use a trained model, without the pipeline."""

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from pixelgen.config import ConfigError, MemoryConfig, comments, load, require
from pixelgen.errors import UserError
from pixelgen.prompts import LAYOUTS, check_layout, read_prompts, write_images
from pixelgen.recipe import read_recipe
from pixelgen.samplers import Sampler

if TYPE_CHECKING:
    from pixelgen.generate import PixelGen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pixelgen", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a denoiser on shards, alone or as one of torchrun's processes")
    train.add_argument("config", type=Path, help="YAML of a recipe, or a params.yaml with --key")
    train.add_argument("shards", type=Path, help="folder of a sharded dataset: out/shard/…")
    train.add_argument("out", type=Path, help="folder of checkpoints, curve, grids and model; goes on where it was")
    train.add_argument("--key", help="of the recipe under train in a params.yaml")
    train.add_argument("--networks", type=Path, default=Path("out/networks"), help="folder of the frozen networks")
    train.add_argument("--init", type=Path, help="exported model to begin with")
    train.add_argument("--readers", type=int, help="processes that decode images for each rank; 0: the rank itself")
    train.add_argument("--lanes-per-pass", type=int, help="of a rank's lanes, how many share a forward pass; left out: "
                       "as many as fit into a GPU, one on a CPU")
    train.add_argument("--recomputed-blocks", type=int, default=0,
                       help="of the denoiser, how many are computed again in the backward pass, to save memory")
    train.add_argument("--averages-on-cpu", action="store_true", help="to save memory at the cost of time")
    train.add_argument("--threads", type=int, help="of torch in each rank; on a CPU the last bits depend on it")

    convert = commands.add_parser("convert", help="turn a published .ckpt into a model directory")
    convert.add_argument("checkpoint", type=Path)
    convert.add_argument("out", type=Path)
    convert.add_argument("--in-context-start", type=int, help="needed only for a model of no published size")

    sample = commands.add_parser("sample", help="draw images of classes into one picture, or of prompts into a folder")
    sample.add_argument("model", help="directory of an exported model, or a Hub repository owner/name")
    sample.add_argument("out", type=Path, help="the PNG, or the folder, to write")
    asked = sample.add_mutually_exclusive_group(required=True)
    asked.add_argument("--labels", type=int, nargs="+")
    asked.add_argument("--prompts", type=Path, help="GenEval's metadata.jsonl, a prompt a line, or a folder of texts")
    sample.add_argument("--layout", choices=LAYOUTS, default="geneval", help="of the folder: who is to read it")
    sample.add_argument("--per-prompt", type=int, default=4)
    sample.add_argument("--negative", default="", help="prompt that guidance leads away from")
    sample.add_argument("--text-encoder", type=Path, help="folder of the encoder that the model was trained with")
    sample.add_argument("--seed", type=int, default=0, help="image i has seed SEED + i")
    _add_sampler(sample)
    _add_device(sample)
    _add_precision(sample)

    app = commands.add_parser("app", help="draw in the browser, on this machine")
    app.add_argument("model", help="directory of an exported model, or a Hub repository owner/name")
    app.add_argument("--text-encoder", type=Path, help="folder of the encoder that the model was trained with")
    _add_device(app)
    _add_precision(app)
    app.add_argument("--port", type=int, default=7860)

    evaluate = commands.add_parser("evaluate", help="score generated images")
    benchmarks = evaluate.add_subparsers(dest="benchmark", required=True)
    geneval = benchmarks.add_parser("geneval", help="GenEval, for images in its own layout; goes on where it stopped")
    geneval.add_argument("directory", type=Path, help="00000/metadata.jsonl, 00000/samples/0000.png and so on")
    geneval.add_argument("--detector", type=Path, required=True, metavar="PATH",
                         help="mmdet's Mask2Former Swin-S .pth, or a directory of transformers' with one")
    geneval.add_argument("--clip", type=Path, required=True, metavar="PATH", help="directory of CLIP ViT-L/14")
    geneval.add_argument("--out", type=Path, default=Path("results.jsonl"), help="metrics.json is put beside it")
    _add_device(geneval)
    args = parser.parse_args(arguments)
    try:
        return COMMANDS[args.command](args)
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and not _given(error, args):
            raise
        print(f"pixelgen {args.command}: {error}", file=sys.stderr)
        return 1


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N; left out: a GPU if there is one")


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="left out: bf16 on a GPU, fp32 on a CPU")


def _add_sampler(parser: argparse.ArgumentParser) -> None:
    """--sampler, and an option for each that one of the samplers has, as `sampler.NAME` among what is parsed."""
    parser.add_argument("--sampler", choices=[*Sampler.kinds], default="heun")
    having: dict[str, dict[str, Any]] = {}  # samplers by option and kind
    for kind in Sampler.kinds:
        for field in dataclasses.fields(cls := Sampler.of(kind)):
            having.setdefault(field.name, {})[kind] = cls
    for name, samplers in having.items():
        cls = next(iter(samplers.values()))
        of = "" if len(samplers) == len(Sampler.kinds) else f" (of {', '.join(samplers)})"
        hint, about = get_type_hints(cls)[name], (comments(cls).get(name, "") + of).replace("%", "%%")
        shape: Any = {"type": value_of}
        if get_origin(hint) is tuple:
            shape |= {"nargs": len(get_args(hint)), "metavar": ("LOW", "HIGH")[:len(get_args(hint))]}
        parser.add_argument(f"--{name}", dest=f"sampler.{name}", help=about, **({"metavar": name.upper()} | shape))


def value_of(text: str) -> Any:
    """A number, true, false or null as such, anything else as text: whether it fits is for `load` to say."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _sampler(args: argparse.Namespace) -> Sampler:
    """The sampler of the command line. ConfigError for an option that it does not have."""
    given = {name.removeprefix("sampler."): value for name, value in vars(args).items()
             if name.startswith("sampler.") and value is not None}
    return load(Sampler, {args.sampler: given}, "--sampler")  # type: ignore[type-abstract]


def _device(args: argparse.Namespace) -> str:
    """The device to work on. ConfigError if it is not there."""
    import torch

    gpus = torch.cuda.device_count()
    device = args.device or ("cuda" if gpus else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device!r}: cpu, cuda or cuda:N") from None
    require(parsed.type != "cuda" or (parsed.index or 0) < gpus, f"--device {device}: torch sees {gpus} GPUs here")
    return device


def _model(args: argparse.Namespace) -> "PixelGen":
    """The model of the command line, on its device; says in what precision, which figures depend on."""
    from pixelgen.generate import PixelGen
    from pixelgen.precision import preferred

    device = _device(args)
    precision = args.precision or preferred(device)
    print(f"drawing in {precision} on {device}", file=sys.stderr)
    return PixelGen.from_pretrained(args.model, device=device, precision=precision, text_encoder=args.text_encoder)


def _given(error: OSError, args: argparse.Namespace) -> bool:
    """Whether the system has refused a path of the command line, one above or one below: the user can mend that."""
    refused, given = str(error.filename), [str(value) for value in vars(args).values() if isinstance(value, Path)]
    return any(refused.startswith(path) or path.startswith(refused) for path in given)


def _train(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.config, args.key, args.init is not None)  # before the slow loading
    memory = MemoryConfig(args.lanes_per_pass, args.recomputed_blocks, args.averages_on_cpu)
    for name, least in (("readers", 0), ("threads", 1)):
        given = getattr(args, name)
        require(given is None or given >= least, f"--{name} {given}: at least {least}")
    import torch

    from pixelgen.standalone import train_here

    if args.threads:
        torch.set_num_threads(args.threads)
    told = train_here(recipe, args.shards, args.out, args.networks, args.init, args.readers, memory)
    if told:
        print(f"stopped: {told}, the same command goes on from there", file=sys.stderr)
        return 128 + signal.SIGTERM
    return 0


def _convert(args: argparse.Namespace) -> int:
    from pixelgen.checkpoint import export, read_published

    config, *states = read_published(args.checkpoint, args.in_context_start)
    export(args.out, config, *states)
    print(f"{args.out}: {config}")
    return 0


def _sample(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from pixelgen.images import grid

    sampler = _sampler(args)
    prompts = read_prompts(args.prompts) if args.prompts else []
    if prompts:
        check_layout(args.layout, args.per_prompt)
        require(args.per_prompt >= 1, f"--per-prompt {args.per_prompt}: at least 1")
        require(not args.out.exists(), f"{args.out} exists: name a new folder, images of two runs are never mixed")
    else:
        require(args.out.suffix == ".png", f"{args.out}: images of --labels go into one picture: name a .png")
    model = _model(args)
    if not prompts:
        images = model.generate(args.labels, range(args.seed, args.seed + len(args.labels)), sampler)
        grid(images, columns=min(8, len(images))).save(args.out)
        return 0
    args.out.mkdir(parents=True)
    for n, prompt in enumerate(tqdm(prompts)):
        first = args.seed + n * args.per_prompt
        images = model.generate([prompt.text] * args.per_prompt, range(first, first + args.per_prompt), sampler,
                                negative=args.negative)
        write_images(args.layout, args.out, prompt, images)
    return 0


def _app(args: argparse.Namespace) -> int:
    from pixelgen.app import serve

    serve(_model(args), args.model, args.port)
    return 0


def _evaluate_geneval(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from pixelgen.metrics.colors import load_colors
    from pixelgen.metrics.detector import load_detector
    from pixelgen.metrics.geneval import TAGS, Rules, evaluate_folder, list_images

    list_images(args.directory)  # before the slow loading
    device = _device(args)
    detector, colors = load_detector(args.detector, device), load_colors(args.clip, device)
    figures = evaluate_folder(args.directory, detector, colors, Rules(), args.out,
                              progress=lambda left: tqdm(left, unit="image"))
    args.out.with_name("metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{figures['images']} images of {figures['prompts']} prompts, by {detector.name} and {colors.name}")
    for tag in (*TAGS, "overall"):
        print(f"{tag:<14} {figures[tag]:.4f}" if tag in figures else f"{tag:<14} no image")
    return 0


COMMANDS = {"train": _train, "convert": _convert, "sample": _sample, "app": _app, "evaluate": _evaluate_geneval}
