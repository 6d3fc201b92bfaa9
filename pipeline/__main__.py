"""`python -m pipeline`: what can be asked of the workflow beside running it."""

import argparse
import sys

from pipeline.cluster import read_cluster
from pipeline.params import read_params
from pixelgen.config import require
from pixelgen.errors import UserError

TFLOPS, UTILISATION, MEMORY, PRICE = 989.0, 0.35, 80.0, 2.5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    estimate = commands.add_parser("estimate", help="operations, memory, hours and dollars of trainings and samplings")
    estimate.add_argument("keys", nargs="*", metavar="KEY", help="train.KEY or sample.KEY of params.yaml; none: all")
    estimate.add_argument("--gpus", type=int, help="of all nodes together; left out: the workers of the cluster file")
    estimate.add_argument("--tflops", type=float, default=TFLOPS,
                          help=f"what a GPU can do at most, in bf16 without sparsity; {TFLOPS:g} is an H100's")
    estimate.add_argument("--utilisation", type=float, default=UTILISATION,
                          help=f"share of that which is reached; {UTILISATION:g}: see benchmarks/README.md")
    estimate.add_argument("--memory", type=float, default=MEMORY, help=f"GB of a GPU; {MEMORY:g} is an H100's")
    estimate.add_argument("--price", type=float, default=PRICE, help=f"dollars an hour for a GPU; {PRICE:g} is a guess")
    args = parser.parse_args(arguments)
    try:
        for name, value in (("gpus", args.gpus), ("tflops", args.tflops), ("memory", args.memory),
                            ("price", args.price)):
            require(value is None or value > 0, f"--{name} {value}: must be more than 0")
        require(0 < args.utilisation <= 1, f"--utilisation {args.utilisation}: must be in (0, 1]")
        whole, cluster = read_params(), read_cluster()
        from pipeline.estimate import report  # imports torch: what is above is checked before
        from pixelgen.estimate import USABLE

        for line in report(whole, args.keys, args.gpus or cluster.actors, cluster.memory, USABLE * args.memory * 1e9,
                           args.tflops * 1e12 * args.utilisation, args.price):
            print(line, flush=True)
    except UserError as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
