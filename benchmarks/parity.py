"""Our losses against those of other packages: values and gradients, loss by loss.

    python benchmarks/parity.py                    # in a temporary environment
    python benchmarks/parity.py --env .venv-peers  # kept, and used again
    python benchmarks/parity.py --page             # docs/parity.md from the JSON alone

Makes an environment for the peers, with the versions below, lets `parity_peers` answer
there, and compares. The reference is the peer in float64 where its formula is that of
its paper, and the paper's formula in NumPy where it is not, or where there is no peer.
Prints the tables, and writes benchmarks/results/parity.json and docs/parity.md. The
exit status is 1 if a pair that should agree does not, or if one that should differ
agrees.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import parity_features
import parity_logits
import parity_page
from parity_cases import Case, inputs_of
from parity_papers import central_differences

from distilljax.metrics import write_atomically
from distilljax.workdir import machine, today, versions

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "parity.json"
PAGE = REPOSITORY / "docs" / "parity.md"
WORKER = REPOSITORY / "benchmarks" / "parity_peers.py"

CASES: tuple[Case, ...] = (*parity_logits.CASES, *parity_features.CASES)
EXEMPT = {
    "LinearHead": "a form of logits; `fused_divergence` is compared on heads",
    "SparseLogits": "a form of logits; the tail buckets are compared on it",
    "SampledLogits": "a form of logits, for an estimator that no peer has",
    "MemoryQueue": "the state of `contrastive` from step to step, and no loss",
    "masked_mean": "the reduction with which every row here is computed",
    "masked_sum": "the reduction under `masked_mean`",
}

# Torch from an index of CPU builds is enough; which index pip asks is its own affair.
INSTALLS = (
    ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0"),
    ("--no-deps", "torchdistill==1.1.5"),  # the rest is for data and models of images
)

SEEDS = (0, 1, 2)
DTYPES = ("float64", "float32")
# 2^-19 is 16 units in the last place of float32. A compiled sum may run in order, and
# then one of a thousand terms is off by some of them.
TOLERANCE = {"float64": 1e-10, "float32": 2.0**-19}


class Result(NamedTuple):
    """A value and its gradients, or what the peer raised instead."""

    value: float
    gradients: dict[str, np.ndarray]
    error: str | None = None

    def times(self, factor: float) -> Result:
        """In other units."""
        scaled = {name: factor * grad for name, grad in self.gradients.items()}
        return Result(factor * self.value, scaled)


@contextlib.contextmanager
def environment(path: Path | None) -> Iterator[Path]:
    """The interpreter of an environment that has the peers, made if it is not there."""
    with contextlib.ExitStack() as stack:
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python, stamp = path / "bin" / "python", path / "peers.json"
        wanted = json.dumps(INSTALLS)
        if not stamp.exists() or stamp.read_text() != wanted:
            if path.exists() and not stamp.exists() and any(path.iterdir()):
                raise ValueError(
                    "environment: path must be new or an environment of this script, "
                    f"got {str(path)!r}, which holds other files. Name another folder."
                )
            # As the Makefile: Debian's Python cannot put a pip into an environment.
            make = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(path)]
            subprocess.run(make, check=True)
            write_atomically(stamp, "unfinished")
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
            for packages in INSTALLS:
                subprocess.run([*pip, "--quiet", *packages], check=True)
            write_atomically(stamp, wanted)
        yield python


def ask(
    python: Path, cases: Sequence[Case]
) -> tuple[dict[tuple[str, int, str], Result], dict[str, str]]:
    """The peers' results by name of the case, seed and dtype, and their versions."""
    asked = [
        (case, seed, dtype)
        for case in cases
        if case.peer is not None
        for seed in SEEDS
        for dtype in DTYPES
    ]
    requests = [
        {
            "peer": case.peer,
            "options": {**case.options, **case.theirs},
            "inputs": f"{case.inputs}/{seed}",
            "dtype": dtype,
        }
        for case, seed, dtype in asked
    ]
    arrays = {
        f"{name}/{seed}/{key}": array
        for name in sorted({case.inputs for case in cases})
        for seed in SEEDS
        for key, array in inputs_of(name, seed).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "requests.json").write_text(json.dumps(requests))
        np.savez(root / "inputs.npz", **arrays)
        subprocess.run([str(python), str(WORKER), folder], check=True)
        found = json.loads((root / "answers.json").read_text())
        with np.load(root / "gradients.npz") as file:
            gradients = {key: file[key].astype(np.float64) for key in file.files}
    results = {}
    for number, (case, seed, dtype) in enumerate(asked):
        answer, start = found["answers"][number], f"{number}/"
        own = [key for key in gradients if key.startswith(start)]
        results[case.name, seed, dtype] = Result(
            answer.get("value", float("nan")),
            {key.removeprefix(start): gradients[key] for key in own},
            answer.get("error"),
        )
    return results, found["versions"]


def students_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The names of the arrays that get a gradient."""
    return [name for name in arrays if name.startswith("student")]


@functools.cache
def program(number: int) -> Any:
    """Value and gradient of one of `CASES`, compiled once for all seeds."""
    case = CASES[number]

    def value(students: Any, others: Any) -> Any:
        return case.ours({**others, **students}, **case.options, **case.own)

    return jax.jit(jax.value_and_grad(value))


def ours(case: Case, seed: int, dtype: str) -> Result:
    """What `distilljax.losses` gives."""
    arrays = inputs_of(case.inputs, seed)
    with jax.enable_x64(True):
        x = {
            name: jnp.asarray(a, dtype if a.dtype.kind == "f" else a.dtype)
            for name, a in arrays.items()
        }
        students = {name: x.pop(name) for name in students_of(arrays)}
        value, gradients = program(CASES.index(case))(students, x)
        assert value.dtype == dtype, f"{case.name}: {value.dtype}"
    grads = {name: np.asarray(g, np.float64) for name, g in gradients.items()}
    return Result(float(value), grads)


def paper(case: Case, seed: int) -> Result:
    """What the paper's formula gives, in float64."""
    assert case.paper is not None
    arrays = inputs_of(case.inputs, seed)
    formula = functools.partial(case.paper, **case.options)
    if case.paper_gradient is not None:
        gradients = case.paper_gradient(arrays, **case.options)
    else:
        gradients = central_differences(formula, arrays)
    return Result(formula(arrays), gradients)


def gap(found: Result, reference: Result) -> dict[str, float]:
    """Differences of value and gradient, relative to the reference (or its largest)."""
    gradients = []
    for name, wanted in reference.gradients.items():
        size = np.max(np.abs(wanted)) or 1.0
        gradients.append(np.max(np.abs(found.gradients[name] - wanted)) / size)
    value = abs(found.value - reference.value) / (abs(reference.value) or 1.0)
    return {"value": float(value), "gradient": float(max(gradients))}


def slope(gradients: Mapping[str, np.ndarray], seed: int) -> float:
    """The derivative along one random direction: a gradient in one number."""
    rng = np.random.RandomState(1000 + seed)
    total = 0.0
    for name in sorted(gradients):
        direction = rng.standard_normal(gradients[name].shape)
        total += float(np.sum(gradients[name] * direction))
    return total


def worst(gaps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest over the seeds."""
    return {key: max(g[key] for g in gaps) for key in ("value", "gradient")}


def judge(case: Case, theirs: Mapping[tuple[str, int, str], Result]) -> dict[str, Any]:
    """All numbers of one comparison, and whether they are as the case says."""
    gaps: dict[str, list[dict[str, float]]] = {}
    examples, error = [], None
    for seed in SEEDS:
        peer = theirs.get((case.name, seed, "float64"))
        reference = peer if case.paper is None else paper(case, seed)
        assert reference is not None, case.name
        found = {d: ours(case, seed, d).times(case.factor.value) for d in DTYPES}
        example = {"seed": seed, "ours": found["float64"].value}
        if reference.error is None:
            for dtype in DTYPES:
                gaps.setdefault(dtype, []).append(gap(found[dtype], reference))
            example["reference"] = reference.value
            example["slope"] = slope(reference.gradients, seed)
        if peer is not None and peer.error is not None:
            error = peer.error
        elif peer is not None:
            dtype = "float32" if case.paper is None else "float64"
            other = theirs[case.name, seed, dtype]
            gaps.setdefault("peer", []).append(gap(other, reference))
            example["peer"] = peer.value
        examples.append(example)
    sizes = {key: worst(found) for key, found in gaps.items()}
    return {
        "name": case.name,
        "loss": case.loss,
        "peer": case.peer,
        "options": dict(case.options),
        "theirs": dict(case.theirs),
        "own": dict(case.own),
        "factor": case.factor.text,
        "factor_value": case.factor.value,
        "why": case.why,
        "differs": case.differs,
        "verdict": verdict(case, sizes, error),
        "error": error,
        "gaps": sizes,
        "examples": examples,
    }


def verdict(case: Case, sizes: dict[str, dict[str, float]], error: str | None) -> str:
    """In words; what begins with "not" is not as the case says."""
    exact = TOLERANCE["float32" if case.single else "float64"]
    limits = {"float64": exact, "float32": TOLERANCE["float32"]}
    close = all(
        dtype in sizes and max(sizes[dtype].values()) <= limit
        for dtype, limit in limits.items()
    )
    if case.peer is None:
        return "no peer; agrees with the paper" if close else "not the paper's"
    if case.paper is None:
        return "agrees" if close else "not in agreement"
    if (error is not None) != case.raises:
        return "not as the peer used to answer"
    if error is None and max(sizes["peer"].values()) <= exact:
        return "not different from the paper any more"
    return "differs from the paper; ours agrees" if close else "not the paper's"


def collect(env: Path | None) -> dict[str, Any]:
    """Run all, and put it into one record."""
    jax.config.update("jax_platforms", "cpu")  # float64, on any machine
    with environment(env) as python:
        theirs, peers = ask(python, CASES)
    return {
        "date": today(),
        "machine": machine(),
        "versions": versions() | peers,
        "tolerance": TOLERANCE,
        "seeds": list(SEEDS),
        "cases": [judge(case, theirs) for case in CASES],
        "exempt": EXEMPT,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and write; or write the page again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env", type=Path, help="keep the peers' environment here")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    args = parser.parse_args(argv)
    if args.page:
        results = json.loads(RESULTS.read_text())
    else:
        results = collect(args.env)
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(RESULTS, text)
    page = parity_page.render(results)
    write_atomically(PAGE, page)
    print(page)
    wrong = [c["name"] for c in results["cases"] if c["verdict"].startswith("not ")]
    for name in wrong:
        print(f"NOT AS EXPECTED: {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
