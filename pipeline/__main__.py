"""`python -m pipeline`: the stages of the workflow, and what can be asked of it beside running them."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from ruamel.yaml.error import YAMLError

from pipeline import describe, older, stage
from pipeline.cluster import read_cluster
from pipeline.params import PARAMS, SECTIONS, Params, read_params, resolve
from pipeline.runs import run_stage
from pipeline.storage import other_versions
from pixelgen.config import ConfigError, require
from pixelgen.errors import UserError
from pixelgen.manifest import read_manifest
from pixelgen.store import write_atomic

TFLOPS, UTILISATION, MEMORY, PRICE = 989.0, 0.35, 80.0, 2.5


def arguments_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, section in SECTIONS.items():
        one = commands.add_parser(name, help=f"the stage {name}, on a key of {section} in {PARAMS}" if section else
                                    f"the stage {name}")
        if section:
            one.add_argument("key", metavar="KEY")
    params = commands.add_parser("params", help="parameters: what they are, where they come from, how files differ")
    actions = params.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="every value with its origin, and what it means")
    show.add_argument("key", nargs="?", help="of one parameter, or of all below it, as train.c2i.fit")
    show.add_argument("--file", type=Path, default=PARAMS, help=f"{PARAMS}, or a preset")
    diff = actions.add_parser("diff", help="the values in which two files differ, defaults included")
    diff.add_argument("one", type=Path)
    diff.add_argument("other", type=Path)
    actions.add_parser("kinds", help="every kind of source, network, denoiser, sampler, metric, with its options")
    actions.add_parser("schema", help="a JSON Schema of the file, for editors")
    migrate = actions.add_parser("migrate", help="a file of an earlier version in today's form")
    migrate.add_argument("file", type=Path)
    migrate.add_argument("--write", action="store_true", help="rewrite the file; otherwise the new one is printed")
    commands.add_parser("check", help="outputs that were made under other versions than those installed")
    commands.add_parser("adopt", help="keep the outputs of an earlier version")
    estimate = commands.add_parser("estimate", help="operations, memory, hours and dollars of trainings and samplings")
    estimate.add_argument("keys", nargs="*", metavar="KEY", help="train.KEY or sample.KEY of params.yaml; none: all")
    estimate.add_argument("--gpus", type=int, help="of all nodes together; left out: the workers of the cluster file")
    estimate.add_argument("--tflops", type=float, default=TFLOPS,
                          help=f"what a GPU can do at most, in bf16 without sparsity; {TFLOPS:g} is an H100's")
    estimate.add_argument("--utilisation", type=float, default=UTILISATION,
                          help=f"share of that which is reached; {UTILISATION:g}: see benchmarks/README.md")
    estimate.add_argument("--memory", type=float, default=MEMORY, help=f"GB of a GPU; {MEMORY:g} is an H100's")
    estimate.add_argument("--price", type=float, default=PRICE, help=f"dollars an hour for a GPU; {PRICE:g} is a guess")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = arguments_of().parse_args(arguments)
    if args.command in SECTIONS:
        key = args.key if SECTIONS[args.command] else ""
        run_stage(args.command, lambda: stage.run(args.command, key))
    try:
        for line in COMMANDS[args.command](args):
            print(line, flush=True)
    except UserError as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def params(args: argparse.Namespace) -> Iterable[str]:
    if args.action == "show":
        return describe.show(args.file, args.key)
    if args.action == "diff":
        return describe.diff(args.one, args.other)
    if args.action == "kinds":
        return describe.kinds()
    if args.action == "schema":
        return [json.dumps(describe.schema(), indent=2)]
    try:
        new = older.migrated(args.file, Params)
    except (OSError, YAMLError) as error:
        raise ConfigError(f"{args.file}: {error}") from error
    if not args.write:
        return new.splitlines()
    write_atomic(args.file, new.encode())
    return [f"{args.file} is rewritten: {len(new.splitlines())} lines"]


def check(_: argparse.Namespace) -> Iterable[str]:
    """A line for each output, with what was installed otherwise when it was made."""
    for folder in older.outputs():
        if changed := other_versions(read_manifest(folder, None).get("versions", {})):
            yield f"{folder}: {changed}"


def adopt(_: argparse.Namespace) -> Iterable[str]:
    read_params()  # a mistake there comes first
    yield from older.adopt()
    resolve()
    finished = " ".join(["params", *older.finished_stages(SECTIONS)])
    yield f"now run `dvc commit --force {finished}`, which takes them up as they are"


def estimate(args: argparse.Namespace) -> Iterable[str]:
    for name, value in (("gpus", args.gpus), ("tflops", args.tflops), ("memory", args.memory), ("price", args.price)):
        require(value is None or value > 0, f"--{name} {value}: must be more than 0")
    require(0 < args.utilisation <= 1, f"--utilisation {args.utilisation}: must be in (0, 1]")
    whole, cluster = read_params(), read_cluster()
    from pipeline.estimate import report  # imports torch: what is above is checked before
    from pixelgen.estimate import USABLE

    return report(whole, args.keys, args.gpus or cluster.actors, cluster.memory, USABLE * args.memory * 1e9,
                  args.tflops * 1e12 * args.utilisation, args.price)


COMMANDS = {"params": params, "check": check, "adopt": adopt, "estimate": estimate}

if __name__ == "__main__":
    sys.exit(main())
