"""From a config file and ``--dotted.key=value`` to the configs of one command."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import types
import typing
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
)

from distilljax._checks import fail
from distilljax.config import Config, Experiment, load_experiment


@dataclass(frozen=True)
class Planned:
    """One run of a command: an arm, a seed, and the config with all overrides."""

    arm: str
    seed: int
    config: Config


# --- the verb's own flags -------------------------------------------------------------


def make_parser(
    verb: str,
    description: str,
    *,
    workdir: bool = True,
    processes: bool | None = None,
) -> ArgumentParser:
    """A parser for what is not a field of the config; those are left to `override`.

    Args:
      verb: Of which command.
      description: What it does.
      workdir: False for a command that has no run.
      processes: Whether it may be one of several processes; None: if it has a run.
    """
    where = "--workdir W " if workdir else ""
    parser = ArgumentParser(
        prog=f"distilljax {verb}",
        usage=f"distilljax {verb} CONFIG {where}[options] [--dotted.key=value]...",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="Python file of the config")
    if workdir:
        parser.add_argument(
            "--workdir", required=True, metavar="W", help="folder of the run"
        )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of a single run (default: 0)"
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this, and the config's fields"
    )
    if not (workdir if processes is None else processes):
        return parser
    several = parser.add_argument_group("several processes (TPU slices, GPU nodes)")
    several.add_argument(
        "--multihost",
        action="store_true",
        help="this is one of several processes: start jax.distributed",
    )
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0 (found by itself on TPU and SLURM)",
    )
    several.add_argument(
        "--num-processes", type=int, metavar="N", help="how many there are"
    )
    several.add_argument(
        "--process-id", type=int, metavar="I", help="which of them this is, from 0"
    )
    several.add_argument(
        "--connect-timeout-secs",
        type=int,
        default=300,
        metavar="S",
        help="how long to wait for the others (default: 300)",
    )
    several.add_argument(
        "--peer-timeout-secs",
        type=int,
        default=60,
        metavar="S",
        help="end this process when another is silent for so long (default: 60)",
    )
    return parser


def parse(
    parser: ArgumentParser, argv: Sequence[str]
) -> tuple[Namespace, Experiment, list[str]]:
    """The verb's own flags, the config file, and the overrides that are left."""
    if any(a in ("-h", "--help") for a in argv):
        _help(parser, next((a for a in argv if a.endswith(".py")), None))
    known, overrides = parser.parse_known_args(argv)
    return known, load_experiment(known.config), overrides


def _help(parser: ArgumentParser, path: str | None) -> NoReturn:
    parser.print_help()
    if path is None:
        config = _example()
        print(
            "\nThe fields of a config, with their defaults. Those of its parts (a.b) "
            "are of an\nexample here; pass a CONFIG to see the parts and values of "
            "yours.\n"
        )
    else:
        experiment = load_experiment(path)
        config = experiment.config(0)
        if arms := experiment.arms(0):
            print(f"\nArms of {path}:")
            for name, arm in arms.items():
                print(f"  {name:20} {arm.description}")
        print(f"\nFields of {path}, with their values there:\n")
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _parse_fields(config, ["--help"], parser.prog)
    # its first two paragraphs are usage and description, which were said above
    fields = text.getvalue().split("\n\n", 2)[2]
    fields = re.sub(r" *-h, --help *\n.*\n", "", fields)
    # defaults are quoted for a shell, and nobody pastes them into one
    fields = fields.replace("'\"'\"'", "'").replace("'()'", "()")
    print("\n".join(line.rstrip() for line in fields.splitlines()))
    raise SystemExit(0)


def _example() -> Config:
    from distilljax import data, models, objectives
    from distilljax.workdir import TrainedRun

    return Config(
        name="example",
        student=models.MLP(num_features=64, hidden=(64,), num_classes=10),
        teacher=TrainedRun("runs/digits/teacher"),
        objective=objectives.LogitKD(),
        data=data.Tfds("digits", "train"),
        validation=data.Tfds("digits", "validation"),
        loader=data.Loader(batch_size=100),
        steps=1000,
    )


# --- the fields of the config ---------------------------------------------------------

# tyro cannot parse a function, nor an empty tuple of dataclasses; a number or a
# schedule it can, if it is told to try.
REGISTRY = ConstructorRegistry()


def _is_callable(annotation: Any) -> bool:
    return typing.get_origin(annotation) is Callable


def _is_schedule(annotation: Any) -> bool:
    """A number or a function: `float | Schedule`."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return union and any(_is_callable(part) for part in typing.get_args(annotation))


@REGISTRY.primitive_rule
def _functions_stay(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if _is_schedule(info.type):
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda words: float(words[0]),
            is_instance=lambda x: True,
            str_from_instance=lambda x: [str(x)],
        )
    if _is_callable(info.type_origin) or info.type_origin is Callable:
        return _only_in_the_file("a function", callable)
    if _is_tuple_of_parts(info.type):
        return _only_in_the_file("a tuple", lambda x: isinstance(x, tuple))
    return None


def _is_tuple_of_parts(annotation: Any) -> bool:
    """A tuple of dataclasses, such as `tuple[Rule, ...]`."""
    arguments = typing.get_args(annotation)
    return typing.get_origin(annotation) is tuple and any(
        dataclasses.is_dataclass(part) for part in arguments
    )


def _only_in_the_file(
    what: str, accepts: Callable[[Any], bool]
) -> PrimitiveConstructorSpec:
    def refuse(words: list[str]) -> NoReturn:
        raise ValueError(f"it is {what}, which only the config file can change")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="(in the file)",
        instance_from_str=refuse,
        is_instance=accepts,
        str_from_instance=lambda f: [getattr(f, "__name__", repr(f))],
    )


def override(
    config: Config, overrides: Sequence[str], prog: str, flags: Sequence[str] = ()
) -> Config:
    """The config with fields replaced; unknown keys exit with a suggestion.

    Args:
      config: The config.
      overrides: ``--dotted.key=value``, or ``--dotted.key value``.
      prog: Who asks, for messages.
      flags: Other flags of the command, for suggestions.
    """
    if not overrides:
        return config
    known = list(_keys(config))
    for word in overrides:
        if not re.match(r"--[A-Za-z_]", word):
            continue
        key = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if key not in known:
            _unknown(key, known, flags, prog)
    return _parse_fields(config, overrides, prog)


def _parse_fields(config: Config, words: Sequence[str], prog: str) -> Config:
    return tyro.cli(
        type(config),
        default=config,
        args=list(words),
        prog=prog,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        registry=REGISTRY,
    )


def _keys(part: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields and named parts, as the command line has them."""
    if isinstance(part, Mapping):
        named = {str(name): (value, None) for name, value in part.items()}
    else:
        hints = typing.get_type_hints(type(part))
        fields = (field.name for field in dataclasses.fields(part))
        named = {name: (getattr(part, name), hints[name]) for name in fields}
    for field, (value, hint) in named.items():
        name = prefix + field.replace("_", "-")
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        parts = isinstance(value, Mapping) and len(value) > 0
        if (nested and not _is_schedule(hint)) or parts:
            yield from _keys(value, f"{name}.")
        else:
            yield name


def _unknown(
    key: str, known: Sequence[str], flags: Sequence[str], prog: str
) -> NoReturn:
    inside = [k for k in known if k.startswith(f"{key}.")]
    group, dot, last = key.rpartition(".")
    siblings = [k for k in known if k.startswith(group + dot)]
    # the shared beginning would make everything in the group look alike
    names = {k[len(group + dot) :]: k for k in siblings}
    names |= {} if dot else {flag.lstrip("-"): flag.lstrip("-") for flag in flags}
    near = [k for k in known if k.rpartition(".")[2] == last]
    near += [names[name] for name in difflib.get_close_matches(last, names)]
    if inside:
        hint = (
            "It is a part of the config, and only the file can replace it or leave it "
            f"out. Its fields are --{', --'.join(inside)}."
        )
    elif near:
        hint = f"Did you mean --{', --'.join(dict.fromkeys(near))}?"
    else:
        shown = siblings if dot and siblings else [k for k in known if "." not in k]
        hint = f"There are --{', --'.join(shown)}."
    print(
        f"error: {prog}: --{key} is no option of this config. {hint}\n"
        f"({prog} CONFIG --help describes all of them.)",
        file=sys.stderr,
    )
    raise SystemExit(2)


# --- arms and seeds -------------------------------------------------------------------


def plan(
    experiment: Experiment,
    overrides: Sequence[str],
    *,
    seeds: Sequence[int],
    arms: Sequence[str] | None,
    parser: ArgumentParser,
) -> list[Planned]:
    """Every run of the command: all arms of one seed, then of the next."""
    known = experiment.arms(0)
    for arm in arms or ():
        if arm not in known:
            near = difflib.get_close_matches(arm, known, n=1)
            fail(
                parser.prog,
                "the arm",
                f"be one of {experiment.path}: {', '.join(known) or '(it has none)'}",
                repr(arm),
                f"Did you mean {near[0]}?"
                if near
                else "Arms are what arms(seed) in the config file returns.",
            )
    flags = [word for action in parser._actions for word in action.option_strings]
    planned = []
    for seed in seeds:
        variants = (
            {"default": experiment.config(seed)}
            if arms is None
            else {arm: experiment.arms(seed)[arm] for arm in arms}
        )
        for arm, config in variants.items():
            if config.seed != seed:
                fail(
                    parser.prog,
                    str(experiment.path),
                    f"pass its seed on, Config(..., seed=seed), for seed {seed}",
                    f"a config with seed {config.seed}",
                    "All runs would be the same.",
                )
            try:
                config = override(config, overrides, parser.prog, flags)
            except SystemExit as stop:
                if stop.code and arms is not None:
                    print(
                        f"(This is the config of the arm {arm!r}. If the override is "
                        "meant for others only, name them with --arms.)",
                        file=sys.stderr,
                    )
                raise
            planned.append(Planned(arm, seed, config))
    return planned


def parse_seeds(text: str) -> list[int]:
    """Seeds as ``0..4`` (both ends) or ``0,3,7``.

    Example:
      >>> parse_seeds("0..4"), parse_seeds("3,7")
      ([0, 1, 2, 3, 4], [3, 7])
    """
    found: list[int] = []
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        found = list(range(int(match[1]), int(match[2]) + 1))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        found = [int(part) for part in text.split(",")]
    if not found or len(set(found)) < len(found):
        fail(
            "distilljax train",
            "--seeds",
            "be like 0..4 (both ends count) or 0,3,7, each once",
            repr(text),
            "Seeds count from 0.",
        )
    return found
