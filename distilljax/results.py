"""What a run has come to: the selected checkpoint on test data, `results.json`."""

from __future__ import annotations

import json
from typing import Any

import jax

from distilljax.metrics import write_atomically
from distilljax.run import ONLY_REPORTED, Run
from distilljax.workdir import machine, today, versions


def results_of(run: Run, state: Any) -> dict[str, Any]:
    """Measure the best checkpoint on test data, and write it down.

    Args:
      run: The run, whose loop has ended.
      state: Its state after the last step.
    """
    config = run.config
    run.checkpoints.wait()
    best_step, value = run.checkpoints.best() or (config.steps, None)
    if best_step != int(state.step):
        state, _ = run.checkpoints.restore(best_step, run.training.like)
    results = {
        "format": 1,
        "name": config.name,
        "arm": run.arm,
        "seed": config.seed,
        **{name: run.saved[name] for name in ONLY_REPORTED},
        "steps": config.steps,
        "examples_seen": config.steps * config.loader.batch_size,
        "train_seconds": run.seconds(),
        "teacher_fingerprint": run.taught_by,
        "teacher_bytes_per_token": getattr(run.provider, "bytes_per_token", None),
        "selected": {
            "step": best_step,
            "metric": None if value is None else f"validation/{config.select}",
            "value": value,
        },
        "throughput": run.observer.summary(),
        "versions": versions(),
        "machine": machine(),
        "date": today(),
    }
    if run.origin is not None:
        results["origin"] = run.origin
    if config.licenses:
        results["licenses"] = dict(config.licenses)
    predictions = None
    arrays = run.evaluated(state)
    if config.test is not None:
        source = run.open(config.test)
        measured, predictions = run.student.measure(config, *arrays, source)
        results |= {"split": "test", **measured}
    if config.probes:
        for who, found in run.student.probe(config, *arrays).items():
            results[who] = {**(results.get(who) or {}), "probes": found}
    for name, part in (config.other_tests or {}).items():
        found = run.student.quality(config, *arrays, run.open(part))
        results.setdefault("other_tests", {})[name] = found
    if jax.process_index() == 0:
        if predictions is not None:
            write_atomically(run.workdir / "predictions.npz", predictions)
        text = json.dumps(results, indent=1) + "\n"
        write_atomically(run.workdir / "results.json", text)
    return results
