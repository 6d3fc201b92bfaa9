"""The `pixelgen` command: use a trained model without the pipeline."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pixelgen", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    convert = commands.add_parser("convert", help="turn a published .ckpt into a model directory")
    convert.add_argument("checkpoint", type=Path)
    convert.add_argument("out", type=Path)
    convert.add_argument("--in-context-start", type=int, help="needed only for a model of no published size")

    draw = commands.add_parser("sample", help="draw images of given classes into one picture")
    draw.add_argument("model", help="directory of an exported model, or a Hub repository owner/name")
    draw.add_argument("out", type=Path, help="the PNG to write")
    draw.add_argument("--labels", type=int, nargs="+", required=True)
    draw.add_argument("--seed", type=int, default=0, help="image i of the picture has seed SEED + i")
    draw.add_argument("--sampler", choices=["euler", "heun", "adams_bashforth"], default="heun")
    draw.add_argument("--steps", type=int, default=50)
    draw.add_argument("--guidance", type=float, default=1.0)
    draw.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"))
    draw.add_argument("--timeshift", type=float, default=1.0)
    draw.add_argument("--order", type=int, help="of adams_bashforth")
    draw.add_argument("--device", default="cpu")
    draw.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")

    evaluate = commands.add_parser("evaluate", help="score generated images")
    benchmarks = evaluate.add_subparsers(dest="benchmark", required=True)
    geneval = benchmarks.add_parser("geneval", help="GenEval, for images in its own layout; goes on where it stopped")
    geneval.add_argument("directory", type=Path, help="00000/metadata.jsonl, 00000/samples/0000.png and so on")
    geneval.add_argument("--detector", type=Path, required=True, metavar="PATH",
                         help="mmdet's Mask2Former Swin-S .pth, or a directory of transformers' with one")
    geneval.add_argument("--clip", type=Path, required=True, metavar="PATH", help="directory of CLIP ViT-L/14")
    geneval.add_argument("--out", type=Path, default=Path("results.jsonl"), help="metrics.json is put beside it")
    geneval.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    try:
        return {"convert": _convert, "sample": _sample, "evaluate": _evaluate_geneval}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"pixelgen {args.command}: {error}", file=sys.stderr)
        return 1


def _convert(args: argparse.Namespace) -> int:
    from pixelgen.checkpoint import export, read_published

    config, ema, raw = read_published(args.checkpoint, args.in_context_start)
    export(args.out, config, ema, raw)
    print(f"{args.out}: {config}")
    return 0


def _sample(args: argparse.Namespace) -> int:
    from pixelgen.config import SamplerConfig
    from pixelgen.generate import PixelGen
    from pixelgen.images import grid

    sampler = SamplerConfig(args.sampler, args.steps, args.guidance, tuple(args.interval), args.timeshift, args.order)
    model = PixelGen.from_pretrained(args.model, device=args.device, precision=args.precision)
    images = model.generate(args.labels, range(args.seed, args.seed + len(args.labels)), sampler)
    grid(images, columns=min(8, len(images))).save(args.out)
    return 0


def _evaluate_geneval(args: argparse.Namespace) -> int:
    import json

    from tqdm import tqdm

    from pixelgen.metrics.colors import load_colors
    from pixelgen.metrics.detector import load_detector
    from pixelgen.metrics.geneval import TAGS, Rules, evaluate_folder, list_images

    list_images(args.directory)  # before the slow loading
    detector, colors = load_detector(args.detector, args.device), load_colors(args.clip, args.device)
    figures = evaluate_folder(args.directory, detector, colors, Rules(), args.out,
                              progress=lambda left: tqdm(left, unit="image"))
    args.out.with_name("metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{figures['images']} images of {figures['prompts']} prompts, by {detector.name} and {colors.name}")
    for tag in (*TAGS, "overall"):
        print(f"{tag:<14} {figures[tag]:.4f}" if tag in figures else f"{tag:<14} no image")
    return 0
