"""``distilljax cache CONFIG --out DIR``, and ``verify`` and ``info`` of a store."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from distilljax._checks import fail
from distilljax._objective import temperatures_of
from distilljax.cli.multihost import initialize
from distilljax.cli.overrides import make_parser, parse, plan

DESCRIPTION = """\
Ask the teacher of a config about its training data once, and keep what it says in a
store. Students are then trained from it, without the teacher in memory:

  distilljax cache CONFIG --out runs/store --kind sampled
  distilljax train CONFIG2 --workdir W      # with teacher=CachedTeacher("runs/store")

A job that was killed goes on where it was: run the same command again. With several
processes each writes its own shards.

  --kind sampled   draws from the teacher: unbiased, 30 to 45 bytes per token; forward
                   KL and soft cross-entropy at temperature 1
  --kind top_k     the k likeliest classes and the mass of the others; 350 bytes for 128
  --kind hidden    the last hidden states: exact, for any divergence; width times dtype
  --kind dense     all logits: exact; for images and small vocabularies
  --kind none      features alone

  distilljax cache verify DIR     compare every file, and ask the teacher again
  distilljax cache info DIR       what is in a store
"""


def main(argv: Sequence[str]) -> int:
    """Write a store, or look at one."""
    if argv and argv[0] == "verify":
        return _verify(argv[1:])
    if argv and argv[0] == "info":
        return _info(argv[1:])
    parser = _parser()
    args, experiment, overrides = parse(parser, argv)
    initialize(args)
    seeds, arms = [args.seed or 0], [args.arm] if args.arm else None
    (run,) = plan(experiment, overrides, seeds=seeds, arms=arms, parser=parser)
    import jax

    from distilljax.caching import cache

    manifest = cache(
        run.config,
        args.out,
        logits=_kind(args, run.config),
        features=_features(args, run.config),
        shard_rows=args.shard_rows,
    )
    if jax.process_index() == 0:
        if manifest.get("already_finished"):
            print("already finished")
        print("\n".join(_lines(manifest)))
        print(f"distilljax cache verify {args.out}   # ask the teacher again, compare")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("cache", DESCRIPTION, workdir=False, processes=True)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder of the store")
    add("--arm", help="the arm whose teacher and data are meant")
    kinds = ("sampled", "top_k", "hidden", "dense", "none")
    add("--kind", choices=kinds, required=True, help="what is kept of the logits")
    add(
        "--features",
        default=None,
        metavar="A,B",
        help="features that are kept too (default: those the objective reads)",
    )
    add(
        "--num-samples",
        type=int,
        metavar="N",
        help="sampled: draws per position (default: 50)",
    )
    add(
        "--k",
        type=int,
        metavar="K",
        help="top_k: classes per position (default: 128)",
    )
    add(
        "--temperatures",
        metavar="T,U",
        help="top_k: the grid that losses may use (default: 1 and the objective's)",
    )
    add(
        "--values",
        choices=("log8", "bfloat16", "float32"),
        help="top_k: how log-probabilities are stored (default: log8)",
    )
    add(
        "--hidden-dtype",
        choices=("same", "int8"),
        help="hidden: as computed, or in 8 bits (default: same)",
    )
    add(
        "--shard-rows",
        type=int,
        metavar="N",
        help="rows in a file (default: a 64th of them, in files of 1 to 64 MiB)",
    )
    return parser


# The options that a kind reads.
_READ = {
    "sampled": ("num_samples",),
    "top_k": ("k", "temperatures", "values"),
    "hidden": ("hidden_dtype",),
}


def _check_read(args: argparse.Namespace) -> None:
    """What would be ignored is an error."""
    for kind, names in _READ.items():
        for name in names:
            if kind != args.kind and (value := getattr(args, name)) is not None:
                fail(
                    "cache",
                    f"--{name.replace('_', '-')}",
                    f"be given with --kind {kind} alone",
                    f"{value} with --kind {args.kind}",
                    "Leave it out, or choose that kind.",
                )


def _kind(args: argparse.Namespace, config: Any) -> Any:
    from distilljax import teachers

    _check_read(args)
    found = {name: getattr(args, name) for name in _READ.get(args.kind, ())}
    given: Any = {name: value for name, value in found.items() if value is not None}
    if args.kind == "sampled":
        return teachers.Sampled(**given, seed=config.seed)
    if args.kind == "top_k":
        own = temperatures_of(config.objective)
        grid = {1.0, *(float(t) for t in own if not callable(t))}
        if args.temperatures is not None:
            try:
                grid = {float(t) for t in args.temperatures.split(",")}
            except ValueError:
                fail(
                    "cache",
                    "--temperatures",
                    "be numbers, such as 1,2",
                    repr(args.temperatures),
                    "It is the grid that losses may use.",
                )
        given.pop("temperatures", None)
        return teachers.TopK(temperatures=tuple(sorted(grid)), **given)
    if args.kind == "hidden":
        return teachers.Hidden(args.hidden_dtype or "same")
    return teachers.Dense() if args.kind == "dense" else None


def _features(args: argparse.Namespace, config: Any) -> tuple[str, ...]:
    if args.features is not None:
        return tuple(name for name in args.features.split(",") if name)
    return tuple(getattr(config.objective, "teacher_features", ()))


def _verify(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distilljax cache verify",
        description="Compare the checksum of every file of a store, load the teacher, "
        "ask it again about some of the rows, and compare its answers with what is "
        "stored. Exits with 1 if they differ by more than another machine explains.",
    )
    parser.add_argument("store", metavar="DIR", help="folder of the store")
    parser.add_argument(
        "--rows", type=int, default=32, metavar="N", help="how many rows (default: 32)"
    )
    parser.add_argument(
        "--mesh", help='devices, such as "data=8" (default: as it was written)'
    )
    parser.add_argument(
        "--eval-batch-size",
        type=int,
        metavar="N",
        help="rows that the teacher reads at once (default: as it was written)",
    )
    args = parser.parse_args(list(argv))
    from distilljax.verifying import verify

    found = verify(
        args.store,
        num_rows=args.rows,
        mesh=args.mesh,
        eval_batch_size=args.eval_batch_size,
    )
    print(json.dumps(found, indent=1))
    return 0 if found["same"] else 1


def _info(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distilljax cache info",
        description="What is in a store. Exits with 1 if a file of it is missing or "
        "has another size; `distilljax cache verify` reads them.",
    )
    parser.add_argument("store", metavar="DIR", help="folder of the store")
    parser.add_argument("--json", action="store_true", help="the whole manifest")
    args = parser.parse_args(list(argv))
    from distilljax.teachers.store import SignalStore, read_manifest

    manifest = read_manifest(args.store)
    shown = json.dumps(manifest, indent=1) if args.json else None
    print(shown or "\n".join(_lines(manifest)), flush=True)
    SignalStore(args.store, verify=False)
    return 0


def _lines(manifest: dict[str, Any]) -> list[str]:
    """A store in a few lines."""
    counts, logits = manifest["counts"], manifest["signal"]["logits"]
    signal = "none"
    if logits is not None:
        options = ", ".join(f"{k}={v}" for k, v in logits["options"].items())
        signal = f"{logits['kind']} ({options}) of {logits['num_classes']:,} classes"
    features = ", ".join(manifest["signal"]["features"]) or "none"
    head = manifest["head"]
    head_size = "" if head is None else f", and the head's {head['bytes'] / 1e6:.1f} MB"
    each = counts["bytes"] / max(counts["positions"], 1)
    tokenizer = manifest["tokenizer"] or {}
    lines = [
        f"signal      {signal}",
        f"features    {features}",
        f"teacher     {manifest['teacher']['fingerprint']}",
        f"data        {counts['units']:,} units in {counts['rows']:,} rows, "
        f"{counts['positions']:,} positions",
        f"size        {counts['bytes'] / 1e6:.1f} MB in {len(manifest['shards'])} "
        f"files, {each:.1f} bytes per position{head_size}",
        f"tokenizer   {tokenizer.get('fingerprint', 'none')}",
        f"written     {manifest['date']}, by {manifest['versions']['distilljax']}",
    ]
    if manifest["coding_kl"]:
        found = ", ".join(
            f"{value:.2e} at T = {t}" for t, value in manifest["coding_kl"].items()
        )
        lines.insert(1, f"coding      costs {found} nats of KL (mean of a sample)")
    if manifest["licenses"]:
        lines += [f"licence     {k}: {v}" for k, v in manifest["licenses"].items()]
    return lines
