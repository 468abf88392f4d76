"""Jobs of SLURM, against an ``sbatch`` that runs them at once, and again if requeued.

It copies the script before it runs it, as SLURM does, and may preempt the job: SIGTERM
to its processes and to its script. ``srun`` starts them, ``scontrol`` requeues.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

SBATCH = """
import pathlib, shutil, signal, time
root = pathlib.Path({root!r})
path = root / "world.json"
world = json.loads(path.read_text())
if world["refuses"]:
    print("sbatch: error: invalid partition specified", file=sys.stderr)
    sys.exit(1)
print("Submitted batch job 7")
words = list(argv)
options = {{}}
while words[0].startswith("-"):
    name, _, value = words.pop(0).partition("=")
    options[name] = value
script = words.pop(0)
# What is set on the command line goes before what stands in the script.
for line in pathlib.Path(script).read_text().splitlines():
    if line.startswith("#SBATCH "):
        name, _, value = line.split()[1].partition("=")
        options.setdefault(name, value)
(root / "options.json").write_text(json.dumps(options))
spooled = root / "spool"
shutil.copy(script, spooled)
nodes = options["--nodes"]
env = dict(os.environ) | dict(
    SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES=nodes, SLURM_JOB_NODELIST="n[1-%s]" % nodes)
if "--cpus-per-task" in options:
    env["SLURM_CPUS_PER_TASK"] = options["--cpus-per-task"]
for turn in range(50):
    if turn:
        env["SLURM_RESTART_COUNT"] = str(turn)
    with open(root / "out", "a") as out:
        job = subprocess.Popen(
            ["bash", spooled, *words], env=env, cwd=options.get("--chdir"),
            stdout=out, stderr=out, start_new_session=True)
    preempted = root / "preempted"
    while job.poll() is None:
        if preempted.exists():
            preempted.unlink()
            # as SLURM may: to every process of the job
            os.killpg(job.pid, signal.SIGTERM)
        time.sleep(0.05)
    code = job.returncode
    (root / "code").write_text(str(code))
    requeued = root / "requeued"
    if not requeued.exists():
        break
    requeued.unlink()
"""

SRUN = """
import signal
signal.signal(signal.SIGTERM, lambda *_: None)  # handed on to its processes
command = argv[next(i for i, word in enumerate(argv) if word[:2] != "--"):]
count = int(next(a for a in argv if a.startswith("--ntasks=")).split("=")[1])
codes = []
for process in range(count):
    env = dict(os.environ) | dict(SLURM_LOCALID="0", SLURM_PROCID=str(process))
    codes.append(subprocess.run(command, env=env).returncode)
sys.exit(max(codes))
"""

SCONTROL = """
import pathlib
if argv[0] == "requeue":
    (pathlib.Path({root!r}) / "requeued").write_text(argv[1])
else:
    print("n1", "n2", sep="\\n")
"""

DISTILLJAX = """
import pathlib
path = pathlib.Path({root!r}) / "world.json"
world = json.loads(path.read_text())
plan = world["plan"]
effect = plan.pop(0) if plan else {{}}
names = ("NOTE", "XLA_FLAGS", "SRUN_CPUS_PER_TASK")
world["seen"] = {{k: v for k, v in os.environ.items() if k in names}}
path.write_text(json.dumps(world))
if effect.get("preempted"):
    import signal, time
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    new = path.with_name("new")
    new.write_text(str(os.getpid()))
    new.rename(path.with_name("preempted"))
    while not told:
        time.sleep(0.05)
    time.sleep(0.5)  # what it takes to save
print(effect.get("say", "finished"))
sys.exit(effect.get("code", 0))
"""

STOPPED = {"say": "few: stopped and saved at step 7 of 9; the same command resumes."}
AWKWARD = ["train", "a b.py", '--note=it\'s "so"', "$HOME `id` \\ ; *", "", "ä\n"]
COMMAND = ["--", "train", "configs/x.py", "--workdir", "/shared/x"]


@pytest.fixture
def cluster(stage):
    root = str(stage.root)
    stage.repository = stage.root / "the checkout"
    shutil.copytree(REPOSITORY / "scripts", stage.repository / "scripts")
    venv = stage.repository / ".venv" / "bin"
    stage.add("distilljax", DISTILLJAX.format(root=root), folder=venv)
    stage.add("sbatch", SBATCH.format(root=root))
    stage.add("srun", SRUN)
    stage.add("scontrol", SCONTROL.format(root=root))

    def arrange(*plan, refuses=False):
        text = json.dumps({"plan": plan, "refuses": refuses})
        (stage.root / "world.json").write_text(text)

    arrange()
    stage.arrange = arrange
    stage.output = lambda: (stage.root / "out").read_text()
    stage.code = lambda: int((stage.root / "code").read_text())
    return stage


def test_a_job_is_submitted_and_runs_from_the_checkout(cluster):
    done = cluster.run(
        "slurm.sh", "--nodes=2", "--gpus=8", "--time=04:00:00", "--partition=spare",
        "--name=few", "--output=log", "--cpus=96", "--sbatch-flag=--account=me",
        *COMMAND,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout == "Submitted batch job 7\n"
    scripts = cluster.repository / "scripts"
    assert cluster.calls("sbatch") == [
        [
            "--job-name=few", "--nodes=2", "--gpus-per-node=8", "--cpus-per-task=96",
            "--time=04:00:00", "--partition=spare", "--output=log",
            f"--chdir={cluster.repository}", "--signal=TERM@120", "--account=me",
            str(scripts / "slurm.sbatch"), str(cluster.repository), "20", *COMMAND,
        ]
    ]  # fmt: skip
    place = ["--multihost", "--coordinator", "n1:8476", "--num-processes", "2"]
    assert cluster.calls("distilljax") == [
        [*COMMAND[1:], *place, "--process-id", process] for process in "01"
    ]
    seen = json.loads((cluster.root / "world.json").read_text())["seen"]
    assert seen["SRUN_CPUS_PER_TASK"] == "96", "or each process had one core"


def test_the_job_can_be_requeued_and_appends_to_its_output(cluster):
    cluster.run("slurm.sh", *COMMAND)

    options = json.loads((cluster.root / "options.json").read_text())
    assert options["--requeue"] == ""
    assert options["--open-mode"] == "append"
    assert options["--ntasks-per-node"] == "1"
    # With B: the signal would go to the script alone.
    assert options["--signal"] == "TERM@120"


def test_the_time_to_save_can_be_longer(cluster):
    cluster.run("slurm.sh", "--signal-secs=600", *COMMAND)

    options = json.loads((cluster.root / "options.json").read_text())
    assert options["--signal"] == "TERM@600"


def test_a_stopped_run_goes_back_into_the_queue_until_it_is_done(cluster):
    cluster.arrange(STOPPED, STOPPED)

    done = cluster.run("slurm.sh", *COMMAND)

    assert done.returncode == 0, done.stderr
    assert cluster.calls("scontrol") == [["requeue", "7"]] * 2
    assert len(cluster.calls("distilljax")) == 3
    assert cluster.code() == 0
    assert "back into the queue, 20 retries left" in cluster.output()
    assert cluster.output().count(STOPPED["say"]) == 2, (
        "the output is shown all the same"
    )


def test_a_preemption_leaves_the_run_the_time_to_save(cluster):
    """Scripts and their tools get the signal too, and must not end before the run."""
    cluster.arrange(STOPPED | {"preempted": True})

    done = cluster.run("slurm.sh", *COMMAND)

    assert done.returncode == 0, done.stderr
    assert STOPPED["say"] in cluster.output()
    assert cluster.calls("scontrol") == [["requeue", "7"]]
    assert cluster.code() == 0


def test_requeues_have_an_end(cluster):
    cluster.arrange(*[STOPPED] * 9)

    cluster.run("slurm.sh", "--retries=2", *COMMAND)

    assert len(cluster.calls("distilljax")) == 3
    assert cluster.code() == 75
    assert "no retries are left" in cluster.output()


def test_a_run_that_fails_is_not_requeued(cluster):
    cluster.arrange({"code": 3})

    cluster.run("slurm.sh", *COMMAND)

    assert cluster.calls("scontrol") == []
    assert cluster.code() == 3


def test_a_failure_that_speaks_of_a_stop_is_a_failure(cluster):
    cluster.arrange(STOPPED | {"code": 3})

    cluster.run("slurm.sh", *COMMAND)

    assert cluster.calls("scontrol") == []


def test_what_sbatch_refuses_is_no_success(cluster):
    cluster.arrange(refuses=True)

    done = cluster.run("slurm.sh", *COMMAND)

    assert done.returncode == 1
    assert "invalid partition" in done.stderr


def test_arguments_and_variables_arrive_as_they_were_given(cluster):
    note = 'it\'s "so" $HOME; *'
    preset = REPOSITORY / "scripts" / "flags" / "gpu.env"

    done = cluster.run(
        "slurm.sh", f"--env=NOTE={note}", f"--flags={preset}", "--", *AWKWARD
    )

    assert done.returncode == 0, done.stderr
    assert cluster.calls("distilljax") == [AWKWARD]
    seen = json.loads((cluster.root / "world.json").read_text())["seen"]
    assert seen["NOTE"] == note
    assert seen["XLA_FLAGS"].split(" ")[0] == (
        "--xla_gpu_enable_latency_hiding_scheduler=true"
    )


def test_dry_run_prints_what_would_run_and_submits_nothing(cluster):
    words = ["--gpus=8", "--env=NOTE=a b", "--", *AWKWARD]

    dry = cluster.run("slurm.sh", "--dry-run", *words)
    assert dry.returncode == 0, dry.stderr
    assert cluster.log.read_text() == ""

    cluster.run("slurm.sh", *words)
    assert [cluster.bash_words(dry.stdout)[1:]] == cluster.calls("sbatch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a distilljax command is needed after --"),
        (["train"], "unknown argument 'train'"),
        (["--nodes=two", *COMMAND], "--nodes needs a whole number, got 'two'"),
        (["--nodes=0", *COMMAND], "--nodes must be 1 or more, got '0'"),
        (["--signal-secs=0", *COMMAND], "--signal-secs must be 1 or more"),
        (["--time"], "--time needs a value"),
        (
            ["--sbatch-flag=x", *COMMAND],
            "--sbatch-flag needs a flag of sbatch, got 'x'",
        ),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_does_nothing(cluster, words, message):
    done = cluster.run("slurm.sh", *words)

    assert done.returncode == 2
    assert message in done.stderr
    assert cluster.log.read_text() == ""


def test_help_names_every_option(cluster):
    done = cluster.run("slurm.sh", "--help")

    assert done.returncode == 0
    for option in (
        "nodes",
        "gpus",
        "cpus",
        "time",
        "partition",
        "name",
        "output",
        "signal-secs",
        "retries",
        "sbatch-flag",
        "env",
        "flags",
        "dry-run",
    ):
        assert f"  --{option} " in done.stdout  # fmt: skip


# --- what tells a stopped run from a finished one -------------------------------------


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [REPOSITORY / "scripts" / "stoppable.sh", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
def test_the_code_of_a_run_that_was_not_stopped_is_kept(code):
    process = start("bash", "-c", f"echo out; echo err >&2; exit {code}")

    out, err = process.communicate(timeout=30)

    assert (process.returncode, out, err) == (code, "out\n", "err\n")


def test_a_signal_is_handed_on_and_the_end_awaited():
    """The first process of a container gets SIGTERM, and no other."""
    code = "trap 'sleep 1; echo stopped and saved at step 3 of 9; exit 0' TERM\n"
    code += "echo ready\nwhile true; do sleep 0.1; done"
    process = start("bash", "-c", code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)  # twice is no harm
    out, err = process.communicate(timeout=30)

    assert process.returncode == 75
    assert out == "stopped and saved at step 3 of 9\n"
    assert "told to stop before its end" in err


def test_words_of_a_command_are_left_as_they_are():
    process = start("printf", "%s|", *AWKWARD)

    out, _ = process.communicate(timeout=30)

    assert out == "".join(f"{word}|" for word in AWKWARD)


def test_a_command_is_needed():
    process = start()

    _, err = process.communicate(timeout=30)

    assert process.returncode == 2
    assert "a command is needed, got ''" in err
