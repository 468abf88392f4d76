"""The step of a small language model: ours, hand-written JAX, and other packages.

    python benchmarks/lm.py                    # prints JSON: ours and plain JAX
    python benchmarks/lm.py --out benchmarks/results/lm.json --peers ENV --tunix ENV
    python benchmarks/lm.py --small --rounds 1 --steps 4   # tiny models: does it work?

Every variant is a process of its own with the same weights, tokens and optimizer. They
are alive at once and make their steps in turn; a ratio is the median over rounds of the
ratio to plain JAX within a round, so that a busy machine slows both. Parameters, losses
and the FLOPs of the products must agree, or it stops. Peak memory is the growth of the
resident size over its level after the imports, the first step's, which compiles, left
out; its time is reported by itself. What compilers have freed and the allocator keeps
is in it; `peak_trimmed` is that of a step after `malloc_trim`. ENV is an environment
with torch, liger-kernel and trl, and another with google-tunix and the jax and flax of
here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_steps
import lm_whole
from lm_worker import Worker, serve

from distilljax.metrics import write_atomically
from distilljax.workdir import machine, today, versions

HERE = Path(__file__).resolve().parent
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
TORCH = ("torch_compile", "liger", "pytorch", "trl_gkd", "trl_chunked")
FEW = ("plain", "ours", "ours_bare", "liger", "pytorch")
"""Those that are compared in more than one setting."""


def commands(shape: str, weights: Path, args: Any) -> dict[str, list[str]]:
    """How each variant is started."""
    small = ["--small"] if args.small else []
    own = [sys.executable, str(HERE / "lm.py"), *small, "--shape", shape, "--serve"]
    found = {name: [*own, name] for name in lm_steps.STEPS}
    if args.peers is not None:
        python, script = str(args.peers / "bin/python"), str(HERE / "lm_peers.py")
        found |= {name: [python, script, name, str(weights)] for name in TORCH}
    if args.tunix is not None:
        script = str(HERE / "lm_tunix.py")
        found["tunix"] = [str(args.tunix / "bin/python"), script, shape, *small]
    return found


def environment() -> dict[str, str]:
    """What all processes have: a CPU, threads that sleep, and this repository."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    # Threads of OpenMP would spin while they wait, and take the CPU time of others.
    settings = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE"}
    settings["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # or a first step is none
    return settings | {"PYTHONPATH": path}


def compare(
    shape: str, env: dict[str, str], args: Any, names: Any = None
) -> dict[str, Any]:
    """Variants of a shape, by name or all, with one setting of the allocator."""
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        lm_steps.export(shape, weights)
        try:
            for name, command in commands(shape, weights, args).items():
                if names is not None and name not in names:
                    continue
                print(f"{shape} {env}: {name}", file=sys.stderr, flush=True)
                workers[name] = Worker(command, environment() | env)
            for _ in range(args.rounds + 1):
                for worker in workers.values():
                    worker.steps.append(worker.step())
            check_equal(workers)
            found = {name: summary(name, workers) for name in workers}
            for name, worker in workers.items():
                found[name] |= worker.end()
        finally:
            for worker in workers.values():
                worker.kill()
    for case in found.values():
        for key in ("peak", "peak_trimmed"):
            share = case[f"{key}_bytes"] / found["plain"][f"{key}_bytes"]
            case[f"{key}_ratio"] = round(share, 3)
    return found


def check_equal(workers: dict[str, Worker]) -> None:
    """Parameters are as many, and losses the same, also after some updates."""
    plain = workers["plain"]
    for name, worker in workers.items():
        if worker.facts["parameters"] != plain.facts["parameters"]:
            raise ValueError(f"{name} has {worker.facts['parameters']} parameters")
        for number, bound in ((0, 2e-5), (2, 1e-3)):
            own, other = (x.steps[number]["loss"] for x in (worker, plain))
            if abs(own - other) > bound * other:
                raise ValueError(f"{name}: loss {number} is {own}, and plain {other}")


def summary(name: str, workers: dict[str, Worker]) -> dict[str, Any]:
    """Medians of times, and of ratios within rounds; the first two steps warm up."""
    worker, plain = workers[name], workers["plain"]

    def of(which: Worker, key: str) -> list[float]:
        return [step[key] for step in which.steps[2:]]

    def ratio(key: str) -> float:
        pairs = zip(of(worker, key), of(plain, key), strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    first = worker.steps[0]
    found = {
        "seconds": round(statistics.median(of(worker, "seconds")), 3),
        "seconds_least": round(min(of(worker, "seconds")), 3),
        "cpu_seconds": round(statistics.median(of(worker, "cpu_seconds")), 3),
        "time_ratio": ratio("seconds"),
        "cpu_ratio": ratio("cpu_seconds"),
        "first_step_seconds": round(first["seconds"], 2),
        "first_step_cpu_seconds": round(first["cpu_seconds"], 2),
        "first_loss": first["loss"],
    }
    return found | {
        key: worker.facts[key] for key in ("version",) & worker.facts.keys()
    }


def exact(shape: str) -> dict[str, Any]:
    """What does not depend on how busy the machine is."""
    temp = {name: lm_steps.temp_bytes(name, shape) for name in lm_steps.STEPS}
    flops = {name: lm_steps.product_flops(name, shape) for name in lm_steps.STEPS}
    if abs(flops["ours"] / flops["plain"] - 1) > 0.01:
        raise ValueError(f"{shape}: the products differ, {flops}")
    ratio = round(temp["ours"] / temp["plain"], 3)
    return {"temp_bytes": temp, "temp_ratio": ratio, "product_flops": flops}


def measure(args: Any) -> dict[str, Any]:
    """Everything."""
    before = os.getloadavg()
    found: dict[str, Any] = {"date": today(), "machine": machine()}
    found["versions"] = versions()
    found["shapes"] = lm_steps.SHAPES | {"batch": lm_steps.BATCH, "time": lm_steps.TIME}
    found["rounds"] = args.rounds
    found["exact"] = {shape: exact(shape) for shape in lm_steps.SHAPES}
    found["vocabulary"] = {
        "stock": compare("vocabulary", {}, args),
        "huge_pages": compare("vocabulary", HUGE_PAGES, args, FEW),
    }
    found["body"] = {"stock": compare("body", {}, args, FEW)}
    env = {**os.environ, **environment()}
    found["loading"] = lm_whole.loading(env, args.small)
    found["whole_run"] = lm_whole.whole_run(args.steps, 1 if args.small else 3)
    found["load_average"] = {"before": before, "after": os.getloadavg()}
    return found


def main() -> None:
    """Run all, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=24, help="of a whole run")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--peers", type=Path, help="environment with torch and others")
    parser.add_argument("--tunix", type=Path, help="environment with google-tunix")
    parser.add_argument("--shape", default="vocabulary", choices=lm_steps.SHAPES)
    parser.add_argument("--small", action="store_true", help="models that are tiny")
    parser.add_argument("--serve", help="this process only makes steps of a variant")
    args = parser.parse_args()
    if args.small:
        lm_steps.SHAPES.update(lm_steps.SMALL)
    if args.serve is not None:
        serve(lambda: lm_steps.ready_step(args.serve, args.shape))
        return
    text = json.dumps(measure(args), indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()
