"""``distilljax train CONFIG --workdir W``."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilljax._checks import fail
from distilljax.cli.multihost import initialize
from distilljax.cli.overrides import Planned, make_parser, parse, parse_seeds, plan
from distilljax.config import Config
from distilljax.evaluation.arms import Metric, quality_of
from distilljax.evaluation.statistics import paired_difference, spread
from distilljax.tracing import Steps

DESCRIPTION = """\
Train the student of a config, or resume: a run that was stopped, killed or preempted
goes on from its last checkpoint, and a finished one says so. `distilljax watch W` shows
how it is doing.

With --seeds, every arm of the config file is trained with every seed in this process,
each in W/ARM/seed_N, and compared at the end; `distilljax report W` writes the report.

  distilljax train configs/digits/teacher.py --workdir runs/digits/teacher
  distilljax train configs/digits/few_labels.py --workdir runs/few --seeds 0..4
  distilljax train configs/digits/few_labels.py --workdir runs/hot --steps=200 \\
      --objective.temperature=8
"""


def main(argv: Sequence[str]) -> int:
    """Train one run, or all arms and seeds of a comparison."""
    parser = make_parser("train", DESCRIPTION)
    parser.add_argument(
        "--seeds", help="several runs, such as 0..4 (both ends) or 0,3,7"
    )
    parser.add_argument(
        "--arms", help="variants that the file names, such as a,b (default: all)"
    )
    _add_options(parser)
    args, experiment, overrides = parse(parser, _with_values(argv))
    if args.seed is not None and args.seeds is not None:
        parser.error("--seed is for a single run, --seeds for several: give one")
    initialize(args)
    single = args.seeds is None and args.arms is None
    seeds = parse_seeds(args.seeds) if args.seeds is not None else [args.seed or 0]
    arms = None
    if args.arms is not None:
        arms = list(dict.fromkeys(args.arms.split(",")))
    elif not single:
        arms = list(experiment.arms(0)) or None
    planned = plan(experiment, overrides, seeds=seeds, arms=arms, parser=parser)
    for note in dict.fromkeys(note for run in planned if (note := _about(run.config))):
        _say(note, error=True)
    _check_profile(args.profile, max(run.config.steps for run in planned))
    root = Path(args.workdir)
    if not single and (root / "config.json").exists():
        fail(
            "train",
            "--workdir",
            "hold no single run where there are --seeds or --arms",
            repr(args.workdir),
            "Choose another folder: each run gets one of its own in it.",
        )
    if not single and isinstance(args.resume, Path):
        parser.error("--resume PATH is for a single run: each goes on from its own")
    options = {"profile": args.profile, "resume": args.resume, "trackers": args.log}
    return _train_all(planned, root, single, options)


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        type=lambda x: x if x in ("auto", "never") else Path(x),
        default="auto",
        metavar="auto|never|PATH",
        help="auto: go on from the newest good checkpoint in W, if there is one; "
        "never: refuse a W that holds a run; PATH: begin a new W with the state and "
        "the position in the data of another run (its folder, or one of its "
        "checkpoints/STEP), whose config differs in what a resumed run may change",
    )
    parser.add_argument(
        "--profile",
        type=_steps,
        default=False,
        metavar="FIRST:LAST",
        help="write an XProf trace of these steps, both ends count (what lies beyond "
        "the last step is left out); alone: of 10. "
        "While it runs, `touch W/PROFILE` or SIGUSR1 asks for 10 more",
    )
    parser.add_argument(
        "--log",
        type=lambda x: tuple(filter(None, x.split(","))),
        default=(),
        metavar="wandb,trackio",
        help="trackers to log to, besides metrics.jsonl and TensorBoard",
    )


def _with_values(argv: Sequence[str]) -> list[str]:
    """The words, with a value for a --profile that stands alone."""
    words = list(argv)
    for i, word in enumerate(words):
        after = words[i + 1] if i + 1 < len(words) else "-"
        if word == "--profile" and (after.startswith("-") or after.endswith(".py")):
            words[i] = "--profile=some"
    return words


def _steps(text: str) -> Steps:
    if text == "some":
        return True
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentTypeError(
            f"must be FIRST:LAST, such as 100:110, of steps that are counted from 1, "
            f"got {text!r}"
        )
    return int(match[1]), int(match[2])


def _check_profile(steps: Steps, last: int) -> None:
    """Some step that is to be traced is one of a run; earlier ones may be done."""
    if isinstance(steps, tuple) and steps[0] > last:
        fail(
            "train",
            "--profile",
            f"begin with a step of the run, which has {last}",
            f"{steps[0]}:{steps[1]}",
            "Choose earlier steps; without FIRST:LAST, ten of them are traced.",
        )


def _about(config: Config) -> str | None:
    """What is allowed, and more often than not a mistake."""
    schedule = getattr(config.optimizer, "learning_rate", None)
    end = getattr(schedule, "num_steps", config.steps)
    if end == config.steps:
        return None
    return (
        f"note: the learning rate's schedule ends at step {end}, and training at "
        f"{config.steps}. To end them together, add "
        f"--optimizer.learning-rate.num-steps={config.steps}"
    )


def _train_all(
    planned: Sequence[Planned], root: Path, single: bool, options: dict[str, Any]
) -> int:
    from distilljax.programs import Programs
    from distilljax.together import StopSignal
    from distilljax.train import train

    programs = Programs()
    found = []
    with StopSignal() as stop:
        for number, run in enumerate(planned, start=1):
            workdir = root if single else root / run.arm / f"seed_{run.seed}"
            title = run.config.name
            if not single:
                title = f"[{number}/{len(planned)}] {title} {run.arm} seed {run.seed}"
            results = train(
                run.config,
                workdir,
                programs=programs,
                title=title,
                arm=run.arm,
                stop=stop,
                **options,
            )
            if "stopped_at" in results:
                _say(
                    f"{title}: stopped and saved at step {results['stopped_at']} of "
                    f"{run.config.steps}; the same command resumes."
                )
                return 0
            found.append(results)
            _say(f"{title}: {_one_line(results)}  ({workdir})")
            if stop.requested and number < len(planned):
                _say(f"stopped after {number} of {len(planned)} runs")
                return 0
    if not single:
        _compare(found)
        _say(f"distilljax report {root}   # tables, plots, what was gained and lost")
    return 0


def _one_line(results: dict[str, Any]) -> str:
    done = "already finished, " if results.get("already_finished") else ""
    if "student" not in results:
        return done + "trained; the config has no test data to measure it on"
    student, teacher = results["student"], results.get("teacher")
    metric = _headline(results)
    parts = [f"{metric.label} {_number(metric, student)}"]
    if metric.key == "accuracy":
        count = results["num_examples"]
        errors = round((1 - student["accuracy"]) * count)
        parts = [f"test {parts[0]} ({errors} errors of {count})"]
    if student.get("perplexity") is not None:
        parts.append(f"perplexity {student['perplexity']:.2f}")
    if student.get("kl_to_teacher") is not None:
        parts.append(f"KL to the teacher {student['kl_to_teacher']:.4f} nats")
    if metric.read(teacher) is not None:
        parts.append(f"teacher {_number(metric, teacher)}")
    return done + ", ".join(parts)


def _headline(results: dict[str, Any]) -> Metric:
    """What models of this kind are compared by."""
    return quality_of([results["student"]], [results.get("headline")])[0]


def _number(metric: Metric, evaluated: dict[str, Any] | None) -> str:
    value = metric.read(evaluated)
    return "unknown" if value is None else f"{value:.4f}"


def _compare(found: list[dict[str, Any]]) -> None:
    """Arms beside each other, and each against its baseline, paired by seed."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for results in found:
        if "student" in results:
            by_arm.setdefault(results["arm"], {})[results["seed"]] = results
    for arm, runs in by_arm.items():
        metric = _headline(next(iter(runs.values())))
        values = {
            seed: value
            for seed, r in runs.items()
            if (value := metric.read(r["student"])) is not None
        }
        if not values:
            continue
        found_spread = spread(list(values.values()))
        line = f"{arm:24} {metric.label} {found_spread.mean:.4f}"
        if found_spread.sd is not None:
            line += f" +- {found_spread.sd:.4f}"
        baseline = by_arm.get(next(iter(runs.values()))["baseline"] or "", {})
        theirs = {s: metric.read(r["student"]) for s, r in baseline.items()}
        pairs = [
            (values[s], other)
            for s, other in sorted(theirs.items())
            if s in values and other is not None
        ]
        if len(pairs) > 1:
            difference = paired_difference(*map(list, zip(*pairs, strict=True)))
            line += (
                f"   against its baseline {difference.mean:+.4f} "
                f"[{difference.low:+.4f}, {difference.high:+.4f}] "
                f"(95 %, {len(pairs)} pairs)"
            )
        _say(line)


def _say(line: str, *, error: bool = False) -> None:
    import jax

    if jax.process_index() == 0:
        print(line, file=sys.stderr if error else sys.stdout, flush=True)
