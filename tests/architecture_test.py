"""The shape of the house: who may import whom, and how large things may grow.

It reads the sources, and so it also sees imports inside functions. A limit is raised by
an argument in the commit that raises it; a new exception needs its reason beside it.
"""

from __future__ import annotations

import ast
import io
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "distilljax"

# From the ground up. A part imports parts of the layers below its own.
LAYERS = [
    {"typing", "_checks", "_functional", "patience"},
    {"_hub", "together", "saved_arrays"},
    {"losses"},
    {"terms", "state"},
    {"_objective", "_schedules"},
    {"_capture"},
    {"_in_place"},
    {"distill"},
    {
        "objectives", "teachers", "students", "rollouts", "models", "data", "config",
        "metrics", "optimizers", "sharding", "checkpoints", "manifests", "chips",
    },
    {"resume", "not_finite", "events", "throughput", "tracing", "trackers",
     "learnable"},
    {"train", "run", "programs", "pair", "frozen", "vocabulary", "workdir",
     "evaluation", "asking", "caching", "describing",
     "verifying", "observing", "results", "resuming", "watching"},
    {"planning"},
    {"cli"},
    {"__init__", "__main__"},
]  # fmt: skip

# Parts of one layer do not import each other, but for these.
SIBLINGS = {
    ("config", "optimizers"): "a config's default optimizer is a real one",
    ("config", "sharding"): "a config holds the rules by which parameters are placed",
    ("models", "sharding"): "a model says how its parameters lie on a mesh",
    ("objectives", "students"): "an objective over features owns its projections",
    ("students", "models"): "a student is made of a decoder's parts",
    ("students", "sharding"): "a config's teacher is called with rules",
    ("teachers", "data"): "a stored signal belongs to an example of a source",
    ("teachers", "sharding"): "a teacher has a mesh, and its head lies by rules",
    ("teachers", "metrics"): "simulated devices run one program at a time there too",
    ("checkpoints", "manifests"): "a checkpoint is verified file by file",
    ("manifests", "metrics"): "a manifest is written whole or not at all",
    ("asking", "programs"): "a teacher is loaded as for a run",
    ("caching", "asking"): "a store is what a teacher answers",
    ("caching", "programs"): "several stores share a loaded teacher",
    ("caching", "describing"): "a store says what it was written from",
    ("describing", "asking"): "a store is what a teacher answers",
    ("caching", "verifying"): "a store says what its coding costs",
    ("verifying", "asking"): "a store is compared with its teacher's answers",
    ("verifying", "programs"): "several stores share a loaded teacher",
    ("caching", "workdir"): "a store is written by one command at a time",
    ("train", "run"): "the loop is the order in which the parts of a run act",
    ("train", "programs"): "the loop shares the programs of several runs",
    ("train", "results"): "the loop ends in what is measured",
    ("train", "resuming"): "a folder may be refused, or another run gone on from",
    ("run", "resuming"): "a run may begin where another one was",
    ("resuming", "workdir"): "another run must have the same config",
    ("results", "run"): "a run is measured with what it was trained with",
    ("results", "workdir"): "results say what they were measured on",
    ("run", "observing"): "a run says what it does",
    ("run", "pair"): "a run counts what its models take",
    ("run", "programs"): "a run uses the programs that are compiled there",
    ("run", "workdir"): "a run describes itself in its working directory",
    ("train", "workdir"): "the loop claims and describes its working directory",
    ("train", "vocabulary"): "a run is evaluated over the classes it was trained on",
    ("run", "vocabulary"): "a run begins by asking what its tokens are",
    ("vocabulary", "programs"): "the models of a run say how many classes they have",
    ("programs", "pair"): "a step is compiled for the two models of a run",
    ("programs", "workdir"): "a state is placed as a checkpoint of it will be",
    ("pair", "evaluation"): "the evaluator is one of the compiled programs",
    ("pair", "frozen"): "a student is measured beside its teacher",
    ("frozen", "workdir"): "a teacher has the fingerprint that results name",
}

# What every part may import from outside: the core dependencies, and what jax brings.
CORE = {"jax", "jaxlib", "flax", "optax", "jaxtyping", "numpy", "scipy"}
# The mathematics is arrays in, arrays out.
LOSSES_MAY_IMPORT = {"jax", "jaxtyping"}
# What costs seconds to import, or does not come with the core: here and nowhere else.
HEAVY = {
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "array_record": {"data"},
    "absl": {"data"},
    "sklearn": {"data"},
    "orbax": {"checkpoints"},
    "tyro": {"cli", "config"},
    "rich": {"cli", "metrics"},
    "tensorboardX": {"metrics"},
    "matplotlib": {
        "evaluation.plots",
        "evaluation.plot_layout",
        "evaluation.plots_cost",
        "evaluation.plots_speed",
        "evaluation.report",
    },
    "jinja2": {"evaluation.report", "data.text"},
    "tokenizers": {"models.pretrained", "data.text"},
    "sentencepiece": {"data.text"},
    "pyarrow": {"data.text"},
    "safetensors": {"models.pretrained"},
    "gguf": {"models.pretrained", "data.text"},
    "huggingface_hub": {"_hub"},
    "qwix": {"students"},
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PUBLIC_NAMES = 20


def sources(*folders: str) -> list[Path]:
    return sorted(
        path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")
    )


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


PACKAGE_FILES = sources("distilljax")
OUTSIDE_FILES = sources("configs", "scripts", "notebooks", "benchmarks")
OUR_FILES = PACKAGE_FILES + OUTSIDE_FILES


def part_of(path: Path) -> str:
    """``losses`` for ``distilljax/losses/_kl.py``, ``train`` for ``.../train.py``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, relative ones resolved."""
    package = path.relative_to(REPOSITORY).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def layer_of(part: str) -> int:
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    pytest.fail(f"distilljax/{part} is in no layer: say in LAYERS where it belongs")


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_imports_point_down(path: Path):
    part = part_of(path)
    layer = layer_of(part)
    wrong = []
    for line, imported in imports_of(path):
        top, *rest = imported.split(".")
        # What `distilljax` itself exports lies at the very top.
        other = rest[0] if rest and exists_in_package(rest[0]) else "__init__"
        if top != "distilljax" or other == part:
            continue
        if layer_of(other) > layer:
            wrong.append(f"line {line}: {imported} lies above {part}")
        elif layer_of(other) == layer and (part, other) not in SIBLINGS:
            wrong.append(f"line {line}: {imported} lies beside {part}")
    assert not wrong, (
        f"{name_of(path)} must import from the layers below only. {'; '.join(wrong)}. "
        "Move what both need down, pass it as an argument, or give SIBLINGS a reason."
    )


def exists_in_package(part: str) -> bool:
    return (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()


def test_every_exception_is_in_use():
    used = {
        (part_of(path), imported.split(".")[1])
        for path in PACKAGE_FILES
        for _, imported in imports_of(path)
        if imported.startswith("distilljax.")
    }
    assert set(SIBLINGS) <= used, f"remove {set(SIBLINGS) - used} from SIBLINGS"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_heavy_packages_stay_where_they_belong(path: Path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    wrong = []
    for line, imported in imports_of(path):
        top = imported.split(".")[0]
        if top in sys.stdlib_module_names or top == "distilljax":
            continue
        if part_of(path) == "losses":
            allowed = top in LOSSES_MAY_IMPORT
        elif top in CORE:
            allowed = True
        else:
            homes = HEAVY.get(top, set())
            allowed = any(module == h or module.startswith(f"{h}.") for h in homes)
        if not allowed:
            wrong.append(f"line {line}: {imported}")
    assert not wrong, (
        f"{name_of(path)} must not import {', '.join(wrong)}. Put the code where that "
        "package belongs (HEAVY), or list the new package there and in pyproject.toml."
    )


@pytest.mark.parametrize("path", OUTSIDE_FILES, ids=name_of)
def test_what_stands_outside_uses_public_names_only(path: Path):
    """What a config or a script needs, its readers will need in theirs."""
    wrong = [
        f"line {line}: {imported}"
        for line, imported in imports_of(path)
        if imported.split(".")[0] == "distilljax"
        and any(word.startswith("_") for word in imported.split("."))
    ]
    assert not wrong, f"{name_of(path)} must import public names only, got {wrong}"


@pytest.mark.parametrize("path", OUR_FILES, ids=name_of)
def test_files_are_short_enough_to_read(path: Path):
    text = path.read_text().splitlines()
    if path.parent.name == "notebooks":  # the text between cells is that of a page
        text = [line for line in text if line and not line.startswith("#")]
    lines = len(text)
    assert lines <= MAX_FILE_LINES, (
        f"{name_of(path)} has {lines} lines, and {MAX_FILE_LINES} is the limit. Take "
        "out the part that has a name of its own."
    )


@pytest.mark.parametrize("path", OUR_FILES, ids=name_of)
def test_functions_fit_on_a_screen(path: Path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = code_lines(node, text)
            assert lines <= MAX_FUNCTION_LINES, (
                f"{name_of(path)}:{node.lineno}: {node.name} has {lines} lines of "
                f"code, and {MAX_FUNCTION_LINES} is the limit. Give its steps names."
            )


def code_lines(function: ast.AST, text: str) -> int:
    """Lines with code on them: without docstrings, comments and blank lines."""
    first, last = function.lineno, function.end_lineno  # pyright: ignore
    docstrings = set()
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = node.body[0]
            if isinstance(found, ast.Expr) and isinstance(found.value, ast.Constant):
                docstrings |= set(range(found.lineno, (found.end_lineno or 0) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
    skipped |= {tokenize.DEDENT, tokenize.ENDMARKER}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len((code - docstrings) & set(range(first, last + 1)))


def test_lines_of_code_are_counted_as_said():
    text = '''
def f(
    x,  # two lines so far
):
    """Not counted,

    none of it.
    """
    # not counted

    return """a
    b""" + x
'''
    assert code_lines(ast.parse(text).body[0], text) == 5


def test_the_top_level_can_be_learnt_by_heart():
    names = {
        (alias.asname or alias.name)
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    public = sorted(name for name in names if not name.startswith("_"))
    assert len(public) <= MAX_PUBLIC_NAMES, (
        f"distilljax exports {len(public)} names, and {MAX_PUBLIC_NAMES} is the limit: "
        f"{public}. Leave the new one in its module."
    )


def test_no_file_is_a_drawer_for_everything():
    drawers = ("utils.py", "util.py", "helpers.py", "common.py", "misc.py")
    found = [name_of(p) for p in sources("distilljax", "tests") if p.name in drawers]
    assert not found, (
        f"{found}: name the file after what is in it, and split it if needed"
    )


# What jax, flax and optax load themselves is not ours to answer for.
LIGHT_IMPORT = """
import sys
import jax, flax.nnx, optax
before = set(sys.modules)
import distilljax
print(*({name for name in sys.argv[1:] if name in sys.modules} - before))
"""


def test_importing_the_package_is_light():
    """`import distilljax` is paid by everyone, for the losses alone too."""
    loaded = run_python(sys.executable, LIGHT_IMPORT, *HEAVY, "tensorflow", "torch")
    assert not loaded.split(), f"import these where they are used: {loaded}"


CORE_ALONE = """
from importlib import metadata
import jax.numpy as jnp, optax
from flax import nnx
from distilljax import losses, make_distill_step, objectives

kl = losses.forward_kl(jnp.log(jnp.array([.25, .75])), jnp.log(jnp.array([.5, .5])))
assert abs(float(kl) - 0.1438) < 1e-4, kl
student, teacher = (nnx.Linear(4, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
optimizer = nnx.Optimizer(student, optax.adam(0.1), wrt=nnx.Param)
step = make_distill_step(objectives.LogitKD(ce_weight=0.0), teacher)
kls = [step(student, optimizer, {"inputs": jnp.eye(4)})["kl"].value for _ in range(50)]
assert kls[-1] < 0.1 * kls[0], kls
print(*sorted(d.metadata["Name"].lower() for d in metadata.distributions()))
"""


@pytest.mark.slow
def test_the_core_alone_has_the_losses_and_the_step(tmp_path: Path):
    """``pip install distilljax``, with no extra, in an environment of its own."""
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()  # a build writes beside the sources
    shutil.copytree(PACKAGE, source / "distilljax")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pins = "py311.txt" if sys.version_info < (3, 12) else "py312.txt"
    # Debian's Python can make no environment with pip in it; ours installs into it.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = str(venv / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    constraints = ["-c", str(REPOSITORY / "constraints" / pins)]
    subprocess.run([*pip, *constraints, str(source)], check=True)

    installed = run_python(python, CORE_ALONE, cwd=tmp_path).split()

    assert "distilljax" in installed
    # flax brings orbax-checkpoint; nothing else that only an extra names may be there.
    extras = {"grain", "tensorflow-datasets", "scikit-learn", "tyro", "matplotlib"}
    assert not extras & set(installed)


def run_python(python: str, code: str, *words: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [python, "-c", code, *words], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
