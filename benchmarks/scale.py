"""The pod recipes, compiled for the slices that they name: what fits, and what is sent.

    pip install "distilljax[plan]"
    python benchmarks/scale.py                 # half an hour on two cores
    python benchmarks/scale.py --only llama    # some of it
    python benchmarks/scale.py --page          # the tables of docs/scale.md alone

What was compiled from these sources with these versions is kept: `source` in the
results is the digest of what a step is made of. Writes benchmarks/results/scale.json
after each case, and the tables between the marks of docs/scale.md. Nothing is executed:
memory, what is sent and operations are those of the compiled program, times are those
of a roofline.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from distilljax.config import Config, load_experiment
from distilljax.data import Loader
from distilljax.metrics import write_atomically
from distilljax.planning import Plan, plan
from distilljax.planning.hlo import Program, Shape
from distilljax.planning.words import gib, seconds
from distilljax.workdir import machine, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/scale.json"
PAGE = ROOT / "docs/scale.md"


@dataclass(frozen=True)
class Case:
    """A recipe on a slice, with a context, a batch, and how its loss is computed."""

    name: str
    recipe: str
    topology: str
    context: int
    batch: int
    accumulate: int
    mesh: str
    plain: bool = False

    def config(self) -> Config:
        """The recipe with what the case changes."""
        config = load_experiment(ROOT / f"configs/lm/{self.recipe}.py").config(0)
        config = replace(
            config,
            mesh=self.mesh,
            accumulate=self.accumulate,
            loader=Loader(batch_size=self.batch),
            eval_batch_size=self.batch,
            data=replace(config.data, context=self.context),
        )
        if not self.plain:
            return config
        return replace(config, student_forward=logits_of, teacher_forward=logits_of)


def logits_of(model: Any, batch: Any) -> jax.Array:
    """The logits of all positions, as a plain loss has them in memory."""
    outputs = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    return outputs.logits.logits()


def _recipe(key: str, recipe: str, topology: str, mesh: str, *rows: Any) -> list[Case]:
    return [
        Case(f"{key}, {context:,}{', plain' if plain else ''}", recipe, topology,
             context, batch, accumulate, mesh, plain)
        for context, batch, accumulate, plain in rows
    ]  # fmt: skip


# 3,840 is no width of any of these models, as 4,096 is of some: there an array of
# [time, time] can be told from a kernel.
CASES = [
    *_recipe(
        "gemma", "gemma2_9b_to_2b", "v5e:8x8", "fsdp=16,tensor=4",
        (4_096, 512, 4, False), (8_192, 256, 4, False), (3_840, 512, 4, False),
        (4_096, 512, 4, True),
    ),
    *_recipe(
        "qwen", "qwen3_32b_to_0.6b", "v6e:8x8", "fsdp=16,tensor=4",
        (4_096, 512, 4, False), (32_768, 64, 4, False), (4_096, 512, 4, True),
    ),
    *_recipe(
        "llama", "llama_70b_to_8b", "v5p:4x4x8", "fsdp=32,tensor=4",
        (4_096, 512, 4, False), (32_768, 128, 4, False), (3_840, 512, 4, False),
        (4_096, 512, 4, True),
    ),
]  # fmt: skip
# The model-parallel group of 16 chips stays, and more of them share the batch.
WEAK = [
    Case(f"weak, {chips:,} chips", "llama_70b_to_8b", topology, 4_096, chips, 1,
         f"data={chips // 16},fsdp=4,tensor=4")
    for chips, topology in (
        (16, "v5p:2x2x4"), (64, "v5p:4x4x4"), (256, "v5p:4x8x8"), (1_024, "v5p:8x8x16"),
    )
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="cases whose name begins so")
    parser.add_argument("--again", action="store_true", help="those that are kept too")
    parser.add_argument("--page", action="store_true", help="write the tables alone")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    for case in [] if args.page else [*CASES, *WEAK]:
        done = is_of_now(found["cases"].get(case.name)) and not args.again
        if done or not case.name.startswith(args.only or ""):
            continue
        print(f"{case.name}: compiling for {case.topology}", flush=True)
        result = measured(case)
        found["cases"][case.name] = result
        write_atomically(RESULTS, json.dumps(found, indent=1) + "\n")
        print(f"  {'fits' if result['fits'] else 'does not fit'}", flush=True)
    write_page(found["cases"])


# What a compiled step, and what is read from it, are made of.
SOURCES = (
    "distilljax/*.py", "distilljax/losses", "distilljax/models",
    "distilljax/objectives", "distilljax/planning", "distilljax/students",
    "distilljax/teachers", "configs/lm",
)  # fmt: skip


def source() -> str:
    """The digest of these files."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        found = ROOT.glob(pattern) if "*" in pattern else (ROOT / pattern).rglob("*.py")
        for path in sorted(found):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def is_of_now(case: dict[str, Any] | None) -> bool:
    """Whether it was compiled from these sources, with these versions."""
    if case is None or case.get("source") != source():
        return False
    now = versions()
    return all(now.get(name, v) == v for name, v in case["versions"].items())


def measured(case: Case) -> dict[str, Any]:
    """The plan of a case, and what is not in its program."""
    load = os.getloadavg()[0]
    begun = time.perf_counter()
    made = plan(case.config(), case.topology)
    result = made.to_json() | {
        "source": source(),
        "plan_seconds": round(time.perf_counter() - begun, 1),
        "compiled_on": machine(),
        "load_before": load,
    }
    for program in result["programs"].values():
        kinds = sorted(program["collectives"].items(), key=lambda kv: kv[0])
        program["collectives"] = dict(kinds)
    step = result["programs"]["step"]
    step["loss_bytes"] = sum(
        one.bytes_per_step
        for one in made.programs["step"].sent
        if "fused_loss" in one.op_name and "data" not in one.axes
    )
    result |= {"context": case.context, "plain": case.plain, "facts": facts(case, made)}
    return result


def facts(case: Case, made: Plan) -> dict[str, Any]:
    """What must not be in a program of a pod: counted, with an example."""
    step = made.programs["step"]
    if step.memory is None:
        return {}
    module = load_experiment(ROOT / f"configs/lm/{case.recipe}.py").module
    shapes = module.TEACHER_SHAPE, module.STUDENT_SHAPE
    sizes = {
        n for s in shapes for n in (s.width, s.ffn_width, s.num_heads * s.head_dim)
    }
    tensor = step.mesh.get("tensor", 1)
    rows = case.batch // case.accumulate
    for axis in ("data", "fsdp"):
        rows //= step.mesh.get(axis, 1)
    classes = {shapes[0].vocab_size, shapes[0].vocab_size // tensor}
    widths = {n for s in shapes for n in (s.width, s.width // step.mesh["fsdp"])}
    logits = rows * case.context * shapes[0].vocab_size // tensor
    arrays = list(arrays_of(Program(step.text)))
    square = [x for x in arrays if sum(n == case.context for n in x.dims) > 1]
    gathered = [c for c in step.sent if c.kind == "all-gather"]
    largest = max((s for c in gathered for s in c.shapes), key=lambda s: s.size)
    return {
        # where a width equals the context, [time, width] looks the same
        "time_time": None if case.context in sizes else _some(square),
        "tokens_vocabulary": _some(
            x for x in arrays if classes & set(x.dims) and x.size >= logits
        ),
        # a kernel has a width, and logits have none
        "gathered_logits": _some(
            s
            for c in gathered
            for s in c.shapes
            if classes & set(s.dims) and not widths & set(s.dims)
        ),
        "largest_gather": str(largest),
        # of the largest kernel of a layer, or of the unembedding, along `tensor`
        "largest_gather_of_kernel": largest.size / (_largest_kernel(shapes) // tensor),
    }


def arrays_of(program: Program) -> Iterator[Shape]:
    """Every array that some kernel of the program writes to memory."""
    for name in program.times:
        if name not in program.inside_fusions:
            for one in program.computations[name].instructions.values():
                yield from (s for s in one.shapes if not s.on_chip)


def _some(shapes: Any) -> list[str]:
    return sorted({str(shape) for shape in shapes})[:5]


def _largest_kernel(shapes: Any) -> int:
    return max(s.width * max(s.vocab_size, s.ffn_width) for s in shapes)


def write_page(cases: dict[str, Any]) -> None:
    """The tables of the page, between its marks."""
    text = PAGE.read_text()
    tables = {
        "versions": compiled_with(cases),
        "recipes": recipes(cases),
        "collectives": collectives(cases),
        "weak": weak(cases),
    }
    for mark, lines in tables.items():
        body = "\n".join(lines)
        text = re.sub(
            rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
            lambda m, body=body: f"{m[1]}{body}\n{m[2]}",
            text,
            flags=re.S,
        )
    write_atomically(PAGE, text)


def compiled_with(cases: dict[str, Any]) -> list[str]:
    """Versions and dates, as far as they differ."""
    found: dict[str, list[str]] = {}
    for name, case in cases.items():
        said = ", ".join(f"{n} {case['versions'][n]}" for n in VERSIONS)
        on = case["compiled_on"]
        words = f"{said}, on {case['date']}, {on['cpu']}, {on['cpu_cores']} cores"
        found.setdefault(words, []).append(name)
    if len(found) == 1:
        return [f"All were compiled with {next(iter(found))}."]
    return [f"- {words}: {'; '.join(names)}." for words, names in found.items()]


VERSIONS = ("jax", "jaxlib", "libtpu", "flax", "optax", "python")
KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip


def collectives(cases: dict[str, Any]) -> list[str]:
    """What a device sends in a step, by kind; and of that, what the loss does."""
    out = [
        f"| recipe, context | {' | '.join(KINDS)} | of it, for the loss |",
        "|---|" + "---:|" * (len(KINDS) + 1),
    ]
    for case in CASES:
        step = cases.get(case.name, {"programs": {"step": {"memory": None}}})
        step = step["programs"]["step"]
        if step["memory"] is None:
            continue
        sent: Counter[str] = Counter()
        for key, row in step["collectives"].items():
            sent[key.split(" over ")[0]] += row["bytes_per_step"]
        assert sent.keys() <= set(KINDS), sent
        cells = [gib(sent[kind]) for kind in KINDS]
        loss = gib(step["sent_by_part"]["loss"])
        out.append(f"| {case.name} | {' | '.join(cells)} | {loss} |")
    return out


def recipes(cases: dict[str, Any]) -> list[str]:
    """Memory, what is sent and the roofline of each recipe."""
    out = [
        "| recipe, context | chips | parts | set aside | peak: walk, compiler | fits "
        "| sent per step | compute / memory / interconnect | MFU at most "
        "| planned in |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for case in CASES:
        if (result := cases.get(case.name)) is None:
            continue
        step = result["programs"]["step"]
        parts = result["batch"]["accumulate"]
        start = f"| {case.name} | {case.topology} | {parts} |"
        if step["memory"] is None:
            no = f"no, of {gib(step['limit'])}"
            out.append(f"{start} {gib(step['needs'])} | | {no} | | | | |")
            continue
        memory, line = step["memory"], step["roofline"]
        sent = sum(row["bytes_per_step"] for row in step["collectives"].values())
        out.append(
            f"{start} {gib(memory['allocated'])} | "
            f"{gib(memory['predicted_peak'])} / {gib(memory['peak'])} | "
            f"{'yes' if step['fits'] else 'no'}, {gib(step['headroom'])} left | "
            f"{gib(sent)} | {seconds(line['compute'])} / {seconds(line['memory'])} / "
            f"{seconds(line['interconnect'])} | {line['mfu'][1]:.2f} | "
            f"{result['plan_seconds']:.0f} s |"
        )
    return _with_missing(out, CASES, cases)


def _with_missing(
    table: list[str], wanted: list[Case], cases: dict[str, Any]
) -> list[str]:
    """A table, if it has rows, and under it what has not been compiled yet."""
    names = [case.name for case in wanted if case.name not in cases]
    missing = ["", f"Not compiled yet: {'; '.join(names)}."] if names else []
    return (table if len(table) > 2 else []) + missing


def weak(cases: dict[str, Any]) -> list[str]:
    """The same group of chips, more and more often."""
    out = [
        "| chips | mesh | set aside | peak | sent over fsdp and tensor by the loss "
        "| sent over data |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for case in WEAK:
        if (result := cases.get(case.name)) is None:
            continue
        step = result["programs"]["step"]
        memory = step["memory"]
        over_data = sum(
            row["bytes_per_step"]
            for kind, row in step["collectives"].items()
            if "data" in kind
        )
        out.append(
            f"| {result['num_devices']:,} | {case.mesh} | {gib(memory['allocated'])} | "
            f"{gib(memory['peak'])} | {gib(step['loss_bytes'])} | {gib(over_data)} |"
        )
    return _with_missing(out, WEAK, cases)


if __name__ == "__main__":
    main()
