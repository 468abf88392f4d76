"""The step of language models of real sizes on a GPU: ours, plain JAX, and Liger.

    python benchmarks/lm_gpu.py --out benchmarks/results/lm_gpu.json --peers ENV
    python benchmarks/lm_gpu.py --small     # on any machine, a minute or two

Teachers of 1B and 7B parameters, students of 0.5B, vocabularies beyond 128,000, all in
bfloat16. Each variant is a process of its own, one after the other, with the same
weights and tokens; their first losses must agree. Time is the median of steps after two
that warm up. MFU counts the teacher's forward pass once and the student's thrice, with
attention and logits, over the peak of the device. Peak memory is what the allocator of
the device says; `program_bytes` is what the compiler plans. A variant that does not
run, for want of memory as a rule, is an answer. ENV has torch and liger-kernel.

`--small` traces all of them by shapes, for which no array is allocated, and runs a pair
of tiny models, which says whether all works and nothing of any speed.
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

import lm_gpu_steps
from lm_gpu_steps import PAIRS, SMALL, Pair
from lm_worker import Worker, serve

from distilljax.metrics import write_atomically
from distilljax.workdir import machine, today, versions

HERE = Path(__file__).resolve().parent
TORCH = ("liger", "pytorch")
WARM = 2
ALL = PAIRS | {"small": SMALL}
TOLERANCE = 2e-2
"""Of first losses, relative: bfloat16 has 8 bits, and sums run in other orders."""


def environment() -> dict[str, str]:
    """JAX takes memory as it needs it, so that the peak is what was needed."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return settings | {"PYTHONPATH": os.pathsep.join(paths)}


def commands(name: str, weights: Path, peers: Path | None) -> dict[str, list[str]]:
    """How each variant is started."""
    own = [sys.executable, __file__, "--pair", name, "--serve"]
    found = {step: [*own, step] for step in lm_gpu_steps.STEPS}
    if peers is not None:
        python, script = str(peers / "bin/python"), str(HERE / "lm_gpu_torch.py")
        found |= {one: [python, script, one, str(weights)] for one in TORCH}
    return found


def tell(pair: Pair, path: Path) -> None:
    """What another package needs to build the same: names, shapes, tokens."""
    models = {"student": pair.student, "teacher": pair.teacher}
    shapes = {
        key: list(shape)
        for who, config in models.items()
        for key, shape in lm_gpu_steps.names_of(
            lm_gpu_steps.abstract(config), who
        ).items()
    }
    heads = {who: config.head_dim for who, config in models.items()}
    tokens = lm_gpu_steps.tokens_of(pair).tolist()
    path.write_text(json.dumps({"shapes": shapes, "heads": heads, "tokens": tokens}))


def measured(command: list[str], rounds: int) -> dict[str, Any]:
    """A variant, or why it did not run."""
    try:
        worker = Worker(command, environment())
    except (RuntimeError, OSError, KeyError) as error:
        return {"error": f"does not run: {error}"[:300]}
    try:
        for _ in range(rounds + WARM - 1):
            worker.steps.append(worker.step())
        sizes = worker.end()
    except (RuntimeError, OSError) as error:
        return {"error": f"does not run: {error}"[:300]}
    finally:
        worker.kill()
    steps = [step["seconds"] for step in worker.steps[WARM:]]
    return worker.facts | sizes | {
        "seconds": statistics.median(steps),
        "seconds_least": min(steps),
        "first_step_seconds": worker.steps[0]["seconds"],
        "first_loss": worker.steps[0]["loss"],
    }  # fmt: skip


def compare(name: str, args: Any) -> dict[str, Any]:
    """All variants of a pair, one after the other."""
    pair, peak = ALL[name], lm_gpu_steps.peak_flops()
    flops, tokens = lm_gpu_steps.model_flops(pair), pair.batch * pair.time
    found: dict[str, Any] = {"parameters": lm_gpu_steps.sizes(pair)}
    found |= {"tokens": tokens, "classes": pair.student.vocab_size}
    found |= {"model_flops": flops, "variants": {}}
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        tell(pair, told)
        for variant, command in commands(name, told, args.peers).items():
            print(f"{name}: {variant}", file=sys.stderr, flush=True)
            case = measured(command, args.rounds)
            if "error" not in case:
                case["tokens_per_second"] = round(tokens / case["seconds"])
                rate = flops / case["seconds"]
                case["mfu"] = None if peak is None else rate / peak
            found["variants"][variant] = case
    check_equal(name, found["variants"], found["parameters"])
    return found


def check_equal(name: str, variants: dict[str, Any], parameters: list[int]) -> None:
    """Those that ran had as many parameters, and the same first loss."""
    ran = {v: case for v, case in variants.items() if "error" not in case}
    losses = {variant: case["first_loss"] for variant, case in ran.items()}
    for variant, case in ran.items():
        if case["parameters"] != parameters:
            raise ValueError(f"{name}, {variant}: {case['parameters']} parameters")
    if losses and max(losses.values()) > (1 + TOLERANCE) * min(losses.values()):
        raise ValueError(f"{name}: first losses differ, {losses}")


def traced() -> dict[str, Any]:
    """All pairs and our steps, by their shapes."""
    return {
        name: {
            "parameters": lm_gpu_steps.sizes(pair),
            "model_flops": lm_gpu_steps.model_flops(pair),
        }
        | {step: lm_gpu_steps.traced(step, pair) for step in lm_gpu_steps.STEPS}
        for name, pair in PAIRS.items()
    }


def main() -> None:
    """Run or trace, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--peers", type=Path, help="environment with torch and Liger")
    parser.add_argument("--small", action="store_true", help="nothing of real size")
    parser.add_argument("--pair", choices=ALL, help="this pair alone")
    parser.add_argument("--serve", help="this process only makes steps of a variant")
    args = parser.parse_args()
    if args.serve is not None:
        pair = ALL[args.pair]
        ready = lm_gpu_steps.ready_step
        serve(lambda: ready(args.serve, pair), lm_gpu_steps.device_peak)
        return
    found: dict[str, Any] = {"date": today(), "machine": machine()}
    found["versions"] = versions()
    if args.small:
        found["traced_only"] = traced()
        found["pairs"] = {"small": compare("small", args)}
    elif found["machine"]["platform"] == "cpu":
        parser.error("JAX finds no accelerator: --small runs tiny models")
    else:
        names = PAIRS if args.pair is None else [args.pair]
        found["pairs"] = {name: compare(name, args) for name in names}
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()
