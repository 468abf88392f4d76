"""What the page of benchmarks shows of each results file: numbers, and their goals."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Found = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A number that was measured."""

    what: str
    value: str
    goal: str = ""
    met: bool | None = None
    """None where no goal was set."""
    plain: bool = False
    """Whether it is a ratio to a hand-written JAX step or loss."""


def row(
    what: str,
    number: float,
    form: str = "{:.2f}",
    most: float | None = None,
    least: float | None = None,
    plain: bool = False,
) -> Row:
    """With the goal in the same form."""
    value = form.format(number)
    if most is not None:
        return Row(what, value, f"at most {form.format(most)}", number <= most, plain)
    if least is not None:
        goal = f"at least {form.format(least)}"
        return Row(what, value, goal, number >= least, plain)
    return Row(what, value, plain=plain)


def megabytes(number: float) -> str:
    """10^6 bytes."""
    return f"{number / 1e6:,.1f} MB"


def step(found: Found) -> Iterable[Row]:
    """The step and the loop."""
    for name, case in found["step"].items():
        at = name.replace("_", " ")
        yield row(f"{at}: time", case["time_ratio"], most=1.05, plain=True)
        yield row(f"{at}: temporary memory", case["temp_ratio"], most=1.0, plain=True)
        yield row(f"{at}: compilations", case["compilations"], "{}", most=1)
        added = case["nnx_adapter_overhead_us"]
        yield row(f"{at}: what the NNX layer adds to a step", added, "{:,.0f} µs")
    for name, case in found["end_to_end"].items():
        what = f"{name.replace('_', ' ')}: rate of `train` over that of its bare step"
        yield row(what, case["ratio"], least=0.8 if "convnet" in name else None)
    extra = found["import_seconds"]["extra"]
    yield row("the import, beyond that of flax.nnx", extra, "{:.2f} s", most=0.3)


ALLOCATORS = {"stock": "as it is", "huge_pages": "with huge pages"}


def loss(found: Found) -> Iterable[Row]:
    """The fused loss."""
    for setting, at in ALLOCATORS.items():
        case = found[setting]
        most = {"stock": 0.95, "huge_pages": 0.58}[setting]
        yield row(f"{at}: time", case["ratio"]["fused"], most=most, plain=True)
        yield row(f"{at}: CPU time", case["cpu_ratio"], plain=True)
        products = case["ratio"]["products"]
        yield row(f"{at}: time of the products alone", products, plain=True)
        yield row(f"{at}: peak memory", case["peak_ratio"], most=0.4, plain=True)
    for tokens, case in found["temp_bytes"].items():
        at, held = f"{int(tokens):,} positions", case["fused"]["logit_arrays"]
        yield row(f"{at}: memory, in arrays of logits", held, most=0.15)
        yield row(f"{at}: the same of plain JAX", case["plain"]["logit_arrays"])
    rounded = found["bfloat16"]
    yield row("bfloat16: error of the KL, nats", rounded["kl_error"], "{:.0e}", 1e-3)
    error = rounded["gradient_error_of_largest"]
    yield row("bfloat16: error of the gradient, of its largest", error, "{:.0e}", 1e-2)


def loss_plan(found: Found) -> Iterable[Row]:
    """Of TPUs; where plain JAX does not fit there is no ratio."""
    for case in found["plan"]:
        at = f"{case['topology']}, {case['dtype']}, {case['tokens']:,} positions"
        what = f"{at}: temporary memory"
        if isinstance(case["plain"], str):
            held = megabytes(case["fused"])
            yield Row(what, f"{held}, and plain JAX does not fit", plain=True)
            continue
        most = 0.2 if case["tokens"] == 32768 else 1.0
        ratio = case["fused"] / case["plain"]
        yield row(what, ratio, most=most, plain=True)


def lm(found: Found) -> Iterable[Row]:
    """Ours in every setting; the others are in `peers`."""
    for shape, case in found["exact"].items():
        most = 0.5 if shape == "vocabulary" else None
        what = f"{shape}: temporary memory of the program"
        yield row(what, case["temp_ratio"], most=most, plain=True)
    goals = {
        "vocabulary, as it is": {"time": 0.5, "peak": 0.55},
        "vocabulary, with huge pages": {"cpu": 0.58, "peak": 0.55},
        "body, as it is": {"cpu": 1.0},
    }
    for at, case in settings(found):
        ours, most = case["ours"], goals[at].get
        yield row(f"{at}: time", ours["time_ratio"], most=most("time"), plain=True)
        yield row(f"{at}: CPU time", ours["cpu_ratio"], most=most("cpu"), plain=True)
        peak = ours["peak_ratio"]
        yield row(f"{at}: peak memory", peak, most=most("peak"), plain=True)
        peak = ours["peak_trimmed_ratio"]
        yield row(f"{at}: peak memory, what was freed given back", peak, plain=True)
    own, other = (found["vocabulary"]["stock"][name] for name in ("ours", "plain"))
    first = own["first_step_cpu_seconds"] / other["first_step_cpu_seconds"]
    what = "vocabulary, as it is: CPU time of the first step, which compiles"
    yield row(what, first, most=1.2, plain=True)
    loaded = found["loading"]["ratio"]
    yield row("peak of loading a checkpoint, over its size", loaded, most=1.3)
    run = found["whole_run"]["ratio"]
    yield row("rate of `train` over that of its bare step", run, least=0.85)


def settings(found: Found) -> Iterable[tuple[str, Found]]:
    """Shapes and allocators of `lm`, in words."""
    for shape in ("vocabulary", "body"):
        for setting, case in found[shape].items():
            yield f"{shape}, {ALLOCATORS[setting]}", case


def lm_gpu(found: Found) -> Iterable[Row]:
    """Ours, for each pair of models; the others are in `peers`."""
    for name, pair in found["pairs"].items():
        ours, beside = (pair["variants"][who] for who in ("ours", "plain"))
        if "error" in ours:
            yield Row(name, ours["error"])
            continue
        for key, what in (("seconds", "time"), ("peak_bytes", "peak memory")):
            if "error" in beside:
                yield Row(
                    f"{name}: {what}", "hand-written JAX does not run", plain=True
                )
            else:
                yield row(f"{name}: {what}", ours[key] / beside[key], plain=True)
        yield row(f"{name}: tokens per second", ours["tokens_per_second"], "{:,}")


def teacher(found: Found) -> Iterable[Row]:
    """What is sent, and what is hidden."""
    words = {
        "inline": "one program, one sharding",
        "own_sharding": "one program, two shardings",
        "two_programs": "two programs",
    }
    for case in found["programs"].values():
        meshes = f"student {case['student_mesh']}, teacher {case['teacher_mesh']}"
        for key, word in words.items():
            sent = megabytes(case[key]["collective_bytes"])
            yield Row(f"{meshes}, {word}: sent by one device in a step", sent)
    for case in found["overlap"]["waiting"]:
        at = (
            f"teacher {case['teacher_sleeps_ms']} ms, student "
            f"{case['student_sleeps_ms']} ms, no core busy"
        )
        share = case["streamed_to_ideal"]
        yield row(f"{at}: time over that of the slower one", share, most=1.03)
    share = found["overlap"]["threads"]["streamed_to_ideal"]
    yield row("on two busy cores: time over that of the slower one", share)


def store(found: Found) -> Iterable[Row]:
    """Bytes and speed."""
    limits = {
        "sampled": (34, 200_000),
        "top32_log8": (110, 200_000),
        "top128_log8": (330, 50_000),
    }
    for kind, (most, least) in limits.items():
        case = found["coding"][kind]["long"]
        size, speed = case["bytes_per_token"], case["decode_tokens_per_sec"]
        what = f"{kind}: bytes per token, without the file's own"
        yield row(what, size, "{:.1f}", most=most)
        yield row(f"{kind}: tokens decoded per second", speed, "{:,.0f}", least=least)
    for length, kinds in found["disk"].items():
        for kind, case in kinds.items():
            what = f"{kind}, whole stores of {length} rows: bytes per token"
            yield row(what, case["bytes_per_position"], "{:.1f}")
    waiting = found["waiting"]["share"]
    yield row("share of a step spent on waiting for a batch", waiting, "{:.1%}", 0.02)
    kills = found["kills"]
    same = "the same bytes" if kills["byte_identical"] else "other bytes"
    what = f"of {kills['kills']} killed writers, each store was finished and compared:"
    yield Row(what, same, "the same bytes", kills["byte_identical"])


def sparse_targets(found: Found) -> Iterable[Row]:
    """What is learnt of each form, and the bias of drawn targets."""
    for name, arm in found["arms"].items():
        kl = statistics.mean(arm["kl"])
        yield row(f"{name}: KL from the teacher, nats", kl, "{:.2g}")
        if name.startswith("sampled"):
            bias = arm["l1_bias"]
            yield row(f"{name}: bias of the targets", bias, "{:.3f}", most=0.01)


def resume(found: Found) -> Iterable[Row]:
    """Checkpoints and restarts."""
    start = found["restart"]
    for cost in (found["checkpoints"], found["longer_steps"]):
        every = f"a checkpoint every {cost['every_steps']} steps"
        every = f"{every} of {cost['step_ms']:.0f} ms"
        yield row(f"{every}: rate over that without", cost["ratio"][1], least=0.97)
        share = cost["share_checkpoint"]
        yield row(f"{every}: share of the host's time", share, "{:.1%}", most=0.03)
        low, middle, high = cost["checkpoint_ms"]
        one = f"{middle:.0f} ms (quartiles {low:.0f} to {high:.0f})"
        yield Row(f"{every}: time for one", one)
    yield row("load of the machine before", found["load_before"], "{:.1f}")
    to_warm = start["to_warm"]
    yield row("restart to first step, over a warm first start", to_warm, most=1.5)
    yield row("restart to first step, over a cold first start", start["to_cold"])


def host(found: Found) -> Iterable[Row]:
    """What a step costs the thread of the loop."""
    middle = found["middle_us"]
    for devices, micros in middle["ours"].items():
        plain = middle["plain"][devices]
        what = f"{devices} devices: CPU time of the loop's thread for a step"
        yield Row(what, f"{micros:,.0f} µs, by hand {plain:,.0f} µs")
    yield row("64 devices over one", found["ours_64_to_1"], most=1.5)
    yield row("64 devices over one, by hand", found["plain_64_to_1"])
    yield row("8 devices over one", middle["ours"]["8"] / middle["ours"]["1"])


def scale(found: Found) -> Iterable[Row]:
    """Whether what was compiled fits, and by how much."""
    for name, case in found["cases"].items():
        compiled = case["programs"]["step"]
        goal = {} if case["plain"] else {"goal": "fits", "met": compiled["fits"]}
        memory = compiled["memory"]
        if memory is None:
            yield Row(name, "does not fit", **goal)
            continue
        fits = "fits" if compiled["fits"] else "does not fit"
        yield Row(name, f"{fits}, peak {megabytes(memory['peak'])} on a chip", **goal)
        error = abs(memory["predicted_peak"] / memory["peak"] - 1)
        yield row(f"{name}: error of the predicted peak", error, "{:.1%}", most=0.05)
        yield row(f"{name}: planned in", case["plan_seconds"], "{:.0f} s", most=300)


def parity(found: Found) -> Iterable[Row]:
    """How many pairs agree."""
    verdicts = [case["verdict"] for case in found["cases"]]
    wrong = sum(verdict.startswith("not ") for verdict in verdicts)
    yield row("pairs that were compared", len(verdicts), "{}")
    yield row("pairs that are not as they should be", wrong, "{}", most=0)
    differ = sum(bool(case["differs"]) for case in found["cases"])
    yield row("peers that differ from their paper", differ, "{}")


def proofs(found: Found) -> Iterable[Row]:
    """Claims by verdict, and the bounds that were set before."""
    experiments = found["experiments"]
    verdicts = [c["verdict"] for case in experiments.values() for c in case["claims"]]
    for verdict, count in Counter(verdicts).most_common():
        yield row(f'claims judged "{verdict}"', count, "{}")
    for name, case in experiments.items():
        for bound in case["bounds"]:
            most, least = bound["at_most"], bound["at_least"]
            what = f"{name}: {bound['text']}"
            yield row(what, bound["worst"], "{:.4g}", most=most, least=least)


def encoders(found: Found) -> Iterable[Row]:
    """Each student on the held-out glosses."""
    for arm, case in found["embedding"]["arms"].items():
        cosine = statistics.mean(seed["glosses"]["cosine"] for seed in case["seeds"])
        yield row(f"embeddings, {arm}: cosine with the teacher", cosine, "{:.3f}")
    classes = found["supersense"]
    yield row("classes, teacher: accuracy", classes["teacher"]["accuracy"], "{:.3f}")
    for arm, case in classes["arms"].items():
        right = statistics.mean(seed["accuracy"] for seed in case["seeds"])
        yield row(f"classes, {arm}: accuracy", right, "{:.3f}")


def smollm2_austen(found: Found) -> Iterable[Row]:
    """Perplexities of the teacher and its students."""
    yield row("teacher: perplexity", found["teacher"]["test"]["perplexity"], "{:.1f}")
    for arm, case in found["arms"].items():
        seeds = [seed["test"]["perplexity"] for seed in case["seeds"].values()]
        what = f"{arm.replace('_', ' ')}: perplexity"
        yield row(what, statistics.mean(seeds), "{:.1f}")


ROWS: dict[str, Callable[[Found], Iterable[Row]]] = {
    function.__name__: function
    for function in (
        step, loss, loss_plan, lm, lm_gpu, teacher, store, sparse_targets, resume,
        host, scale, parity, proofs, encoders, smollm2_austen,
    )
}  # fmt: skip
