"""From a config file and ``--dotted.key=value`` to the configs of one command."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from distilljax._checks import fail
from distilljax.config import Config, Experiment, load_experiment


@dataclass(frozen=True)
class Planned:
    """One run of a command: an arm, a seed, and the config with all overrides."""

    arm: str
    seed: int
    config: Config


def make_parser(verb: str, description: str) -> ArgumentParser:
    """A parser for what is not a field of the config; those are left to `override`."""
    parser = ArgumentParser(
        prog=f"distilljax {verb}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        epilog="Every field of the config can be set: --dotted.key=value. "
        f"`distilljax {verb} CONFIG --help` lists them.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="Python file of the config")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, help="seed of a single run (default: 0)")
    parser.add_argument(
        "--multihost",
        action="store_true",
        help="this is one of several processes: start jax.distributed",
    )
    parser.add_argument(
        "--coordinator", help="HOST:PORT of process 0 (found by itself on TPU, SLURM)"
    )
    parser.add_argument("--num-processes", type=int, help="how many processes there are")
    parser.add_argument("--process-id", type=int, help="which of them this is, from 0")
    return parser


def parse(
    parser: ArgumentParser, argv: Sequence[str]
) -> tuple[Namespace, Experiment, list[str]]:
    """The verb's own flags, the config file, and the overrides that are left."""
    wants_help = any(a in ("-h", "--help") for a in argv)
    argv = [a for a in argv if a not in ("-h", "--help")]
    if wants_help:
        parser.print_help()
        if argv and not argv[0].startswith("-"):
            print("\nFields of the config, with their values in this file:\n")
            override(load_experiment(argv[0]).config(0), ["--help"], parser.prog)
        raise SystemExit(0)
    known, overrides = parser.parse_known_args(argv)
    return known, load_experiment(known.config), overrides


def override(config: Config, overrides: Sequence[str], prog: str) -> Config:
    """The config with fields replaced; unknown keys exit with a suggestion."""
    if not overrides:
        return config
    return tyro.cli(
        type(config),
        default=config,
        args=list(overrides),
        prog=prog,
        config=(tyro.conf.AvoidSubcommands,),
    )


def plan(
    experiment: Experiment,
    overrides: Sequence[str],
    *,
    seeds: Sequence[int],
    arms: Sequence[str] | None,
    prog: str,
) -> list[Planned]:
    """Every run of the command: all arms of one seed, then of the next."""
    known = experiment.arms(0)
    for arm in arms or ():
        if arm not in known:
            fail(
                "train",
                "--arms",
                f"be of the arms of {experiment.path}: {', '.join(known) or 'none'}",
                repr(arm),
                "Arms are what arms(seed) in the config file returns.",
            )
    planned = []
    for seed in seeds:
        variants = (
            {"default": experiment.config(seed)}
            if arms is None
            else {arm: experiment.arms(seed)[arm] for arm in arms}
        )
        for arm, config in variants.items():
            planned.append(Planned(arm, seed, override(config, overrides, prog)))
    return planned


def parse_seeds(text: str) -> list[int]:
    """Seeds as ``0..4`` (both ends) or ``0,3,7``.

    Example:
      >>> parse_seeds("0..4"), parse_seeds("3,7")
      ([0, 1, 2, 3, 4], [3, 7])
    """
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = int(match[1]), int(match[2])
        if first <= last:
            return list(range(first, last + 1))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        return [int(part) for part in text.split(",")]
    fail("train", "--seeds", "be like 0..4 or 0,3,7", repr(text), "Both ends count.")
