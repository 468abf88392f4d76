"""Every command of ``docs/launch.md`` is run, against the stand-ins of the launchers.

A block is one script. It is run as it stands, but for the folders of mounted storage,
which lie in a folder of the test: once well, and what trains also stopped and failing.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.scripts import gpu_test, queued_test, slurm_test, xpk_test

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "launch.md").read_text()
BLOCKS = [
    (PAGE.count("\n", 0, match.start()) + 1, textwrap.dedent(match[1]))
    for match in re.finditer(r"```bash\n(.*?)\n *```", PAGE, re.S)
]
STOPPED = {"say": "x: stopped and saved at step 7 of 9; the same command resumes."}

DISTILLJAX = """
import fcntl, pathlib
path = pathlib.Path({root!r}) / "world.json"
lock = open(path.with_name("lock"), "w")
fcntl.flock(lock, fcntl.LOCK_EX)
world = json.loads(path.read_text())
# Of several processes the first is told, and the others end as it does.
process = argv[argv.index("--process-id") + 1] if "--process-id" in argv else "0"
plan = world["plan"].get("train", [])
effect = plan.pop(0) if plan and process == "0" else {{}}
new = path.with_name("new")
new.write_text(json.dumps(world))
new.rename(path)
lock.close()
folder = pathlib.Path(argv[argv.index("--workdir") + 1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "results.json").touch()
print(effect.get("say", "finished"))
sys.exit(effect.get("code", 0))
"""

# Words are checked against the files that they name.
DOCKER = """
import pathlib, re
if argv[0] == "build":
    file, context = argv[argv.index("-f") + 1], argv[-1]
    text = pathlib.Path(file).read_text()
    given = argv[argv.index("--build-arg") + 1].partition("=")[0]
    known = re.findall(r"^ARG (\\w+)", text, re.M)
    copied = re.findall(r"^COPY (?!--)(.*) \\S+$", text, re.M)
    missing = [w for words in copied for w in words.split()
               if not (pathlib.Path(context) / w).exists()]
    sys.exit(given not in known or bool(missing))
"""

SKY = """
sys.path.append({site!r})
import yaml
if argv[:2] == ["jobs", "launch"]:
    task = yaml.safe_load(open(argv[2]))
    given = dict(argv[i + 1].split("=", 1) for i, w in enumerate(argv) if w == "--env")
    assert set(given) <= set(task["envs"]), given
    env = task["envs"] | given
    assert None not in env.values(), env
    env |= dict(SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_RANK="0", SKYPILOT_NODE_IPS="i")
    env = dict(os.environ) | env
    subprocess.run(["bash", "-c", task["setup"]], env=env, check=True)
    while True:
        code = subprocess.run(["bash", "-c", task["run"]], env=env).returncode
        if code not in task["resources"]["job_recovery"]["recover_on_exit_codes"]:
            sys.exit(code)
"""


@pytest.fixture
def world(stage):
    """A checkout, and around it all that the page speaks to."""
    root = str(stage.root)
    checkout = stage.root / "checkout"
    for name in ("scripts", "constraints", "configs"):
        shutil.copytree(REPOSITORY / name, checkout / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, checkout)
    (checkout / "distilljax").mkdir()
    (checkout / ".gitignore").write_text("/runs/\n.venv\n")
    subprocess.run(["git", "init", "--quiet", checkout], check=True)
    image = stage.root / "image" / "distilljax"
    for folder in (checkout, image):
        venv = folder / ".venv" / "bin"
        stage.add("python", "print('py312')", folder=venv)
        stage.add("distilljax", DISTILLJAX.format(root=root), folder=venv)
    stage.add("distilljax", DISTILLJAX.format(root=root))
    (stage.root / "homes").mkdir()

    site = str(Path(yaml.__file__).parents[1])
    gcloud = queued_test.GCLOUD.format(root=root)
    stage.add("gcloud", f"if argv[2:4] != ['tpu-vm', 'versions']:\n    if argv[0] == "
              f"'compute':\n{textwrap.indent(gcloud, ' ' * 8)}")  # fmt: skip
    for tool in ("xpk", "kubectl"):
        body = {"root": root, "tool": tool, "app": str(checkout), "site": site}
        stage.add(tool, xpk_test.CLUSTER.format(**body))
    stage.add("sbatch", slurm_test.SBATCH.format(root=root))
    stage.add("srun", slurm_test.SRUN)
    stage.add("scontrol", slurm_test.SCONTROL.format(root=root))
    stage.add("ssh", gpu_test.SSH)
    stage.add("docker", DOCKER)
    stage.add("sky", SKY.format(site=site))
    for name in ("ssh-add", "squeue", "scancel", "sudo", "curl", "sleep"):
        stage.add(name)
    stage.add("stat", "print(1 if argv[-1] == '/' else 2)")

    def arrange(block: str, *train: dict):
        """What the block needs to be there: the slice or workload it goes on with."""
        text = {
            "plan": {"train": list(train)}, "refuses": False, "first": "ACTIVE",
            "hosts": 1, "request": None, "slices": {}, "jobset": None, "pods": [],
            "created": 0,
        }  # fmt: skip
        if re.search(r"tpu_vm.sh (watch|wait|delete) --queued", block):
            text["request"] = {
                "state": "ACTIVE",
                "label": "launcher",
                "ids": ["distil"],
            }
            text["slices"] = {"distil": "READY"}
            shutil.copytree(stage.root / "image", stage.root / "homes" / "distil")
        if " watch " in block:
            over = {"request": {"state": "SUSPENDED"}}
            text["plan"]["queued-resources describe"] = [{}, over]
        if "xpk.sh delete" in block:
            text["jobset"] = {
                "label": "launcher", "uid": "u", "restarts": 0, "conditions": [],
            }  # fmt: skip
        (stage.root / "world.json").write_text(json.dumps(text))

    def run(block: str):
        moved = re.sub(r"(?<![\w:])/(mnt|shared)/", f"{stage.root}/\\1/", block)
        # Over ssh, the checkout lies where it lies here.
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", moved],
            cwd=checkout,
            env={"PATH": f"{stage.bin}:/usr/bin:/bin", "HOME": str(stage.home)}
            | allocation(block),
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    stage.arrange = arrange
    stage.play = run
    return stage


def allocation(block: str) -> dict[str, str]:
    """The step that runs inside an allocation of SLURM does so."""
    if not block.startswith("scripts/gpu.sh --"):
        return {}
    inside = "--hosts" not in block
    return gpu_test.slurm(2) if inside else {}


def trained(block: str) -> list[list[str]]:
    """The words of distilljax in a block, without what launchers add."""
    found = []
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        words = shlex.split(line)
        if "train" in words:
            found.append(words[words.index("train") :])
        for word in words:
            if word.startswith("COMMAND="):
                found.append(shlex.split(word.partition("=")[2]))
    return found


TRAIN = [(line, block) for line, block in BLOCKS if trained(block)]
# One block is a list of steps, after each of which one would look.
ALONE = [(line, block) for line, block in TRAIN if "tpu_vm.sh create" not in block]


def ids(value: object) -> str:
    return f"line {value}" if isinstance(value, int) else ""


@pytest.mark.parametrize(("line", "block"), BLOCKS, ids=ids)
def test_each_step_does_what_it_says(world, line, block):
    world.arrange(block)

    done = world.play(block)

    assert done.returncode == 0, done.stdout + done.stderr
    runs = world.calls("distilljax")
    for words in trained(block):
        moved = [
            re.sub(r"(^|=)/(mnt|shared)/", rf"\1{world.root}/\2/", word)
            for word in words
        ]
        assert any(run[: len(moved)] == moved for run in runs), runs
    assert bool(runs) == bool(trained(block))


@pytest.mark.slow
@pytest.mark.parametrize(("line", "block"), ALONE, ids=ids)
def test_a_step_that_trains_goes_on_when_it_was_stopped(world, line, block):
    world.arrange(block, STOPPED)
    before = "gpu.sh" in block or "xpk.sh submit" in block

    done = world.play(block)
    runs = len([c for c in world.calls("distilljax") if "1" not in c[-1:]])

    if before:  # these leave it to you
        again = world.play(block)
        assert done.returncode in (0, 75), done.stdout + done.stderr
        assert again.returncode == 0, again.stderr
        runs = len(world.calls("distilljax"))
    assert done.returncode in (0, 75), done.stdout + done.stderr
    assert runs >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("line", "block"), ALONE, ids=ids)
def test_a_step_that_trains_says_when_it_failed(world, line, block):
    world.arrange(block, *[{"code": 3}] * 2)

    done = world.play(block)

    if "slurm.sh" in block:  # the job is submitted; its own code says it
        assert (world.root / "code").read_text() == "3"
        assert world.calls("scontrol") == [["show", "hostnames", "n[1-2]"]]
    else:
        assert done.returncode == 3, done.stdout + done.stderr


def test_a_block_has_a_launcher_or_a_tool_that_is_played(world):
    """A command that nothing plays would be run for real."""
    for _, block in BLOCKS:
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            name = shlex.split(line)[0]
            assert name.startswith("scripts/") or (world.bin / name).exists(), name


def test_every_launcher_has_a_step_on_the_page():
    text = "\n".join(block for _, block in BLOCKS)
    for script in ("tpu_vm.sh", "gpu.sh", "xpk.sh", "slurm.sh", "sky.yaml"):
        assert f"scripts/{script}" in text
    source = (REPOSITORY / "scripts" / "tpu_vm.sh").read_text()
    verbs = re.search(r"^        (create .*)\)$", source, re.M)
    assert verbs is not None
    for verb in set(verbs[1].split(" | ")) - {"all"}:
        assert f"scripts/tpu_vm.sh {verb} " in text, verb
