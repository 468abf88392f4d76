"""``distilljax evaluate CONFIG --workdir W --split test``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from distilljax.cli.multihost import initialize
from distilljax.cli.overrides import make_parser, parse, plan

DESCRIPTION = """\
Measure the best checkpoint of a run on a split: accuracy, KL to the teacher,
calibration, cost. Prints JSON. The run itself is not changed.
"""


def main(argv: Sequence[str]) -> int:
    """Evaluate one run."""
    parser = make_parser("evaluate", DESCRIPTION)
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="which data (default: test)",
    )
    parser.add_argument("--arm", help="the arm, where the run is of one")
    args, experiment, overrides = parse(parser, argv)
    initialize(args)
    seeds, arms = [args.seed or 0], [args.arm] if args.arm else None
    (run,) = plan(experiment, overrides, seeds=seeds, arms=arms, parser=parser)
    import jax

    from distilljax.train import evaluate

    found = evaluate(run.config, args.workdir, split=args.split)
    if jax.process_index() == 0:
        json.dump(found, sys.stdout, indent=1)
        print()
    return 0
