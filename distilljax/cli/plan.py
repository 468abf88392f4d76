"""``distilljax plan CONFIG --topology v5p:4x4x8``."""

from __future__ import annotations

import gzip
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilljax._checks import fail
from distilljax.cli.overrides import make_parser, parse, plan
from distilljax.config import Config, to_json

DESCRIPTION = """\
Compile the training step of a config for a TPU slice that need not be there, and say
what it needs: memory of each device by owner, what is sent between devices, operations,
and how long a step takes at least. No weights are read; of text, no data.

  pip install "distilljax[plan]"        # the TPU's compiler; it runs on any CPU
  distilljax plan configs/lm/llama_70b_to_8b.py --topology v5p:4x4x8
  distilljax plan configs/lm/llama_70b_to_8b.py --topology v5p:4x4x8 \\
      --mesh=fsdp=16,tensor=8 --loader.batch-size=256 --accumulate=2
  distilljax plan configs/digits/teacher.py             # for this machine

Fields of the config are overridden as for `train`. A step that does not fit is an
answer too, and ends with exit code 3. Of a CPU no limit is known: it is said what the
step needs, with exit code 0. Times are those of a roofline, not measured.
"""

SUGGESTION = (
    "It does not fit as it is: --search compiles other meshes, chunk sizes, "
    "accumulations and remat policies, and ranks those that do."
)


def main(argv: Sequence[str]) -> int:
    """Plan one run; 3 if it is known not to fit, else 0."""
    parser = make_parser("plan", DESCRIPTION, workdir=False)
    add = parser.add_argument
    add(
        "--topology",
        default="local",
        metavar="T",
        help="generation and shape, such as v5e:2x4, v6e:8x8, v5p:4x4x8; cpu:N for N "
        "simulated devices; local for this machine's (default)",
    )
    add("--arm", help="the arm to plan (default: the file's config)")
    add(
        "--out",
        metavar="DIR",
        help="write plan.json, plan.html and the compiled programs there",
    )
    add(
        "--search",
        action="store_true",
        help="compile other meshes, chunk sizes, accumulations and remat policies too, "
        "and rank them",
    )
    add(
        "--search-limit",
        type=int,
        metavar="N",
        help="how many of them to compile (default: 8)",
    )
    args, experiment, overrides = parse(parser, argv)
    seeds, arms = [args.seed or 0], [args.arm] if args.arm else None
    (run,) = plan(experiment, overrides, seeds=seeds, arms=arms, parser=parser)
    if args.search_limit is not None and not args.search:
        parser.error("--search-limit is for --search: add it, or leave this out")
    if args.search_limit is not None and args.search_limit < 1:
        parser.error("--search-limit is how many variants to compile: at least 1")
    if args.topology != "local":
        import jax

        jax.config.update("jax_platforms", "cpu")  # the compiler is all that runs
    return _plan(run.config, args)


def _plan(config: Config, args: Namespace) -> int:
    from distilljax.planning import open_topology
    from distilljax.planning import plan as compile_plan
    from distilljax.planning.search import search
    from distilljax.planning.words import lines, ranking

    folder = None if args.out is None else _folder(args.out)
    topology = open_topology(args.topology)
    found = compile_plan(config, topology)
    print("\n".join(lines(found)), flush=True)
    result = found.to_json() | {"config": to_json(config)}
    if folder is not None:
        _write(folder, result, found.programs)
    if found.fits is False and not args.search:
        print(f"\n{SUGGESTION}", flush=True)
    if args.search:
        print("\nsearch:", flush=True)
        tried = search(config, topology, found, limit=args.search_limit or 8, say=print)
        print("\n".join(ranking(tried)))
        result["search"] = tried
        if folder is not None:
            _write(folder, result, found.programs)
    if folder is not None:
        print(f"wrote {folder / 'plan.json'}, plan.html and the compiled programs")
    return 3 if found.fits is False else 0


def _folder(path: str) -> Path:
    """Made before anything is compiled."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(
            "plan",
            "--out",
            "be a folder that can be written",
            f"{path!r} ({error.strerror})",
            "Choose another.",
        )
    return folder


def _write(folder: Path, result: Any, programs: Any) -> None:
    from distilljax.metrics import write_atomically
    from distilljax.planning.page import page

    write_atomically(folder / "plan.json", json.dumps(result, indent=1) + "\n")
    write_atomically(folder / "plan.html", page(result))
    for name, program in programs.items():
        packed = gzip.compress(program.text.encode())
        write_atomically(folder / f"{name.replace(' ', '_')}.hlo.gz", packed)
