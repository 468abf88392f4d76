"""What the proofs run and what they may claim, written down before the results.

Directions of effects come from the papers. Nothing here was chosen by a test number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distilljax.config import load_experiment

REPOSITORY = Path(__file__).resolve().parents[1]

MIN_PAIRS = 3
# That all of n pairs have one sign happens by chance once in 2^(n - 1): 32 for 6.
MIN_PAIRS_FOR_SIGNS = 6
SIGNIFICANT = 0.01

HINTON = "Hinton, Vinyals and Dean 2015, section 3"
BEYER = "Beyer et al. 2022, figure 3, on other data"

# What the missing class adds: students after a shift of one bias (proofs_calibration).
CALIBRATED = " + label-free bias"
ORACLE = " + oracle bias"


@dataclass(frozen=True)
class Claim:
    """One arm against another, paired by seed, and the direction that is expected."""

    text: str
    arm: str
    baseline: str
    expected: int
    """-1: the arm has less of the measure; +1: more; 0: nothing is expected."""
    measure: str = "errors"
    """Key of a run in the results: `errors`, `focus_recall` (of the missing class), or
    `errors_other_classes`."""
    source: str = ""


@dataclass(frozen=True)
class Bound:
    """A number that every run of an arm, or every pair of two, should keep."""

    text: str
    arm: str
    measure: str
    at_most: float | None = None
    at_least: float | None = None
    over: str | None = None
    """Arm to divide by, seed by seed."""


@dataclass(frozen=True)
class Proof:
    """One `distilljax train` command and what is read out of it."""

    name: str
    """Its config is configs/NAME.py, its folder runs/NAME."""
    seeds: str | None = None
    """As the command line takes them; None for a single run without arms."""
    seeds_per_split: int | None = None
    """Seed s is of split s // this; None: all of split 0."""
    claims: tuple[Claim, ...] = ()
    bounds: tuple[Bound, ...] = ()
    hard_labels: Mapping[str, str] | None = None
    """The arm with labels alone, for each arm that has a teacher."""
    calibrate: tuple[str, ...] = ()
    """Arms whose missing class gets its bias back."""

    @property
    def config(self) -> Path:
        """The config file."""
        return REPOSITORY / "configs" / f"{self.name}.py"

    @property
    def command(self) -> str:
        """The command that trains all of its runs."""
        seeds = "" if self.seeds is None else f" --seeds {self.seeds}"
        return (
            f"distilljax train configs/{self.name}.py --workdir runs/{self.name}{seeds}"
        )

    def expected_runs(self) -> list[tuple[str, int]]:
        """(arm, seed) of every run, from the config file itself."""
        if self.seeds is None:
            return [("default", 0)]
        first, last = map(int, self.seeds.split(".."))
        experiment = load_experiment(self.config)
        arms = list(experiment.arms(0)) or ["default"]
        return [(arm, seed) for arm in arms for seed in range(first, last + 1)]

    def folder(self, runs: Path, arm: str, seed: int) -> Path:
        """Where the command leaves a run."""
        root = runs / self.name
        return root if self.seeds is None else root / arm / f"seed_{seed}"

    def split(self, seed: int) -> int:
        """Which draw of the training images a seed has."""
        return 0 if self.seeds_per_split is None else seed // self.seeds_per_split


def teachers(dataset: str) -> Proof:
    """One teacher for each split."""
    return Proof(f"{dataset}/teacher", "0..2", seeds_per_split=1)


def soft_targets(dataset: str) -> Proof:
    """Hinton's students on three splits of 5,000 images."""
    source = f"{HINTON}: 146 to 74 errors on MNIST"
    return Proof(
        f"{dataset}/soft_targets",
        "0..8",
        seeds_per_split=3,
        hard_labels={"kd_t4": "hard_labels", "soft_t20": "hard_labels"},
        claims=(
            Claim(
                "Soft targets at temperature 20, without a label, make fewer errors "
                "than hard labels",
                "soft_t20",
                "hard_labels",
                -1,
                source=source,
            ),
            Claim(
                "Labels and the teacher at temperature 4 make fewer errors than hard "
                "labels",
                "kd_t4",
                "hard_labels",
                -1,
                source=source,
            ),
            Claim(
                "A wide student: temperatures 20 (alone) and 4 (with labels) differ",
                "soft_t20",
                "kd_t4",
                0,
                source=f"{HINTON}: from 300 units on, temperatures over 8 are alike",
            ),
        ),
        bounds=(
            Bound(
                "errors with soft targets / with hard labels, worst pair",
                "soft_t20",
                "errors",
                at_most=0.8,
                over="hard_labels",
            ),
        ),
    )


def missing_class(dataset: str) -> Proof:
    """No example of class 3 in the transfer set; then one bias is given back."""
    soft, hard = "soft_t20", "hard_labels"
    return Proof(
        f"{dataset}/missing_class",
        "0..8",
        seeds_per_split=3,
        hard_labels={soft: hard},
        calibrate=(hard, soft),
        claims=_claims_of_the_missing_class(soft, hard),
        bounds=(
            Bound(
                "recall before calibration, worst run",
                soft,
                "focus_recall",
                at_least=0.7,
            ),
            Bound(
                "recall after calibration, worst run",
                soft + CALIBRATED,
                "focus_recall",
                at_least=0.85,
            ),
            Bound(
                "recall with hard labels, best run", hard, "focus_recall", at_most=0.02
            ),
        ),
    )


def _claims_of_the_missing_class(soft: str, hard: str) -> tuple[Claim, ...]:
    source = (
        f"{HINTON}: 877 of 1,010 threes right, 996 after a bias chosen on test data"
    )
    return (
        Claim(
            "The teacher teaches a class that the student never sees",
            soft,
            hard,
            +1,
            "focus_recall",
            source,
        ),
        Claim(
            "Label-free bias calibration raises its recall",
            soft + CALIBRATED,
            soft,
            +1,
            "focus_recall",
            source,
        ),
        Claim(
            "Label-free bias calibration lowers the errors on all classes",
            soft + CALIBRATED,
            soft,
            -1,
            source=source,
        ),
        Claim(
            "Label-free bias calibration changes the errors on the other classes",
            soft + CALIBRATED,
            soft,
            0,
            "errors_other_classes",
        ),
        Claim(
            "The label-free bias and the oracle's differ in errors",
            soft + CALIBRATED,
            soft + ORACLE,
            0,
        ),
        Claim(
            "With hard labels, label-free bias calibration changes the errors",
            hard + CALIBRATED,
            hard,
            0,
        ),
        Claim(
            "Calibrated, the distilled student makes fewer errors than the calibrated "
            "control",
            soft + CALIBRATED,
            hard + CALIBRATED,
            -1,
        ),
    )


def temperature() -> Proof:
    """Students of three widths at several temperatures, one teacher."""
    claims = []
    hard_labels = {
        f"w{width}_t{t}": f"w{width}_hard"
        for width in (10, 30, 300)
        for t in (1, 2, 3, 4, 8, 20)
    }
    for width in (10, 30):
        w = f"w{width}"
        claims += [
            Claim(
                f"{width} units: temperature {t} makes more errors than 3",
                f"{w}_t{t}",
                f"{w}_t3",
                +1,
                source=f"{HINTON}: with 30 units, temperatures of 2.5 to 4 are best",
            )
            for t in (1, 8, 20)
        ]
    claims.append(
        Claim(
            "300 units: temperatures 20 and 8 differ",
            "w300_t20",
            "w300_t8",
            0,
            source=f"{HINTON}: from 300 units on, temperatures over 8 are alike",
        )
    )
    return Proof(
        "mnist/temperature", "0..5", claims=tuple(claims), hard_labels=hard_labels
    )


def patient_teacher() -> Proof:
    """What the teacher sees, for a short and for a long time."""
    order = (
        ("consistent", "fixed_target", "The same view for both beats a fixed target"),
        ("fixed_target", "independent", "A fixed target beats independent views"),
        ("independent", "hard_labels", "Independent views beat labels"),
        ("hard_labels", "no_augmentation", "Labels with shifts beat no augmentation"),
    )
    claims = [
        Claim(text, arm, base, -1, source="" if "hard_labels" in (arm, base) else BEYER)
        for arm, base, text in order
    ]
    claims += [
        Claim(
            "Consistent views: ten times the updates make fewer errors",
            "consistent",
            "consistent_short",
            -1,
            source=BEYER,
        ),
        Claim(
            "In a short time too, the same view beats a fixed target",
            "consistent_short",
            "fixed_target_short",
            -1,
            source=BEYER,
        ),
    ]
    taught = ("fixed_target", "independent", "consistent")
    # The labels that the arm without shifts is compared with have none either.
    plain = {f"no_augmentation{t}": f"hard_labels_plain{t}" for t in ("", "_short")}
    return Proof(
        "mnist/patient_teacher",
        "0..5",
        claims=tuple(claims),
        hard_labels=plain
        | {
            f"{arm}{time}": f"hard_labels{time}"
            for time in ("", "_short")
            for arm in taught
        },
    )


def full() -> Proof:
    """All 60,000 images, once."""
    return Proof(
        "mnist/full",
        "0..0",
        hard_labels={"soft_t20": "hard_labels"},
        claims=(
            Claim(
                "Soft targets at temperature 20 make fewer errors than hard labels",
                "soft_t20",
                "hard_labels",
                -1,
                source=f"{HINTON}: 146 to 74 errors, teacher 67",
            ),
        ),
    )


FULL_TEACHER = Proof(
    "mnist/full_teacher",
    bounds=(Bound("errors of the teacher", "default", "errors", at_most=90),),
)

# In this order, because students need their teachers.
PROOFS = (
    teachers("mnist"),
    soft_targets("mnist"),
    missing_class("mnist"),
    patient_teacher(),
    FULL_TEACHER,
    full(),
    temperature(),
    teachers("fashion_mnist"),
    missing_class("fashion_mnist"),
    soft_targets("fashion_mnist"),
)

# Numbers of the paper, for tables and figures; all on the 10,000 MNIST test images.
ANCHORS = {
    "full": {
        "source": HINTON,
        "teacher": 67,
        "hard_labels": 146,
        "soft_t20": 74,
    },
    "missing_class": {
        "source": HINTON,
        "errors": 206,
        "errors_oracle": 109,
        "recall": 877 / 1010,
        "recall_oracle": 996 / 1010,
    },
}
