"""The launcher for GPU nodes, driven against stand-ins for ssh, srun and distilljax."""

from __future__ import annotations

import json
import shlex
import time

import pytest

AWKWARD = ["train", "a b.py", '--note=it\'s "so"', "$HOME `id` \\ ; *", "", "ä\n"]

# ssh runs what it gets in a shell, as sshd does; the host is known by HOST.
SSH = """
host, command = argv[-2:]
done = subprocess.run(["sh", "-c", command], env={**os.environ, "HOST": host})
sys.exit(done.returncode)
"""

SRUN = """
env = dict(os.environ)
count = int(next(a for a in argv if a.startswith("--ntasks=")).split("=")[1])
command = argv[next(i for i, word in enumerate(argv) if word[:2] != "--"):]
env["SLURM_LOCALID"] = "0"
for process in range(count):
    env["SLURM_PROCID"] = str(process)
    code = subprocess.run(command, env=env).returncode
    if code:
        sys.exit(code)
"""


@pytest.fixture
def cluster(stage):
    """Nodes that share the folder ``the checkout``, where distilljax is installed."""
    stage.add("ssh", SSH)
    stage.add("srun", SRUN)
    stage.add("scontrol", "print('n7\\nn8\\nn9')")
    stage.checkout = stage.root / "the checkout"
    stage.install = lambda body="": stage.add(
        "distilljax", body, folder=stage.checkout / ".venv" / "bin"
    )
    stage.install()
    return stage


def placed(number: int, coordinator: str) -> list[list[str]]:
    """The words that each of the processes should have got."""
    words = [*AWKWARD, "--multihost", "--coordinator", coordinator]
    words += ["--num-processes", str(number), "--process-id"]
    return [[*words, str(process)] for process in range(number)]


def test_one_node_runs_here_as_one_process(cluster):
    done = cluster.run("gpu.sh", f"--dir={cluster.checkout}", "--", *AWKWARD)

    assert done.returncode == 0, done.stderr
    assert cluster.full_calls("distilljax") == [
        ["distilljax", AWKWARD, str(cluster.checkout)]
    ]
    assert cluster.calls("ssh") == cluster.calls("srun") == []


def test_hosts_get_one_process_each_and_their_place(cluster):
    done = cluster.run(
        "gpu.sh", "--hosts", "me@n1,n2,n3", f"--dir={cluster.checkout}", "--", *AWKWARD
    )

    assert done.returncode == 0, done.stderr
    assert sorted(call[-2] for call in cluster.calls("ssh")) == ["me@n1", "n2", "n3"]
    assert all(
        call[:3] == ["-tt", "-o", "BatchMode=yes"] for call in cluster.calls("ssh")
    )
    assert sorted(cluster.calls("distilljax")) == placed(3, "n1:8476")
    assert {c[2] for c in cluster.full_calls("distilljax")} == {str(cluster.checkout)}


@pytest.mark.parametrize("words", [["--hosts=n1,n2"], []], ids=["ssh", "here"])
def test_variables_and_flags_reach_every_process(cluster, words):
    note = 'it\'s "so" $HOME; *'
    preset = cluster.repository / "scripts" / "flags" / "gpu.env"
    seen = "json.dumps([os.environ[n] for n in ('NOTE', 'XLA_FLAGS')])"
    # in one call: the lines of two processes are not to mix
    cluster.install(f"os.write(1, ({seen} + '\\n').encode())")

    done = cluster.run(
        "gpu.sh", *words, f"--dir={cluster.checkout}", f"--env=NOTE={note}",
        f"--flags={preset}", "--", "train",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(seen) == (2 if words else 1)
    assert all(found[0] == note for found in seen)
    flags = seen[0][1].split(" ")
    assert len(flags) == preset.read_text().count("\nXLA_FLAGS+=")


def test_under_slurm_variables_and_flags_reach_every_process(cluster):
    cluster.install("print(os.environ['NOTE'])")

    done = cluster.run(
        "gpu.sh", f"--dir={cluster.checkout}", "--env=NOTE=a b", "--", "t", **slurm(2)
    )

    assert done.stdout == "a b\n" * 2


def test_a_single_host_is_no_cluster(cluster):
    done = cluster.run(
        "gpu.sh", "--hosts=n1", f"--dir={cluster.checkout}", "--", "train"
    )

    assert done.returncode == 0, done.stderr
    assert cluster.calls("distilljax") == [["train"]]


def test_the_first_failure_stops_the_others(cluster):
    """One process that fails leaves the others waiting for it in a collective."""
    cluster.add("ssh", "import time\nif argv[-2] == 'n2': sys.exit(9)\ntime.sleep(50)")
    start = time.monotonic()

    done = cluster.run("gpu.sh", "--hosts=n1,n2,n3", "--", "train")

    assert done.returncode == 9
    assert time.monotonic() - start < 20


def slurm(nodes: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": "n[7-9]",
    }


def test_under_slurm_every_node_runs_one_process(cluster):
    done = cluster.run(
        "gpu.sh", f"--dir={cluster.checkout}", "--port=9000", "--", *AWKWARD, **slurm(3)
    )

    assert done.returncode == 0, done.stderr
    assert cluster.calls("scontrol") == [["show", "hostnames", "n[7-9]"]]
    assert cluster.calls("srun")[0][:4] == [
        "--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
    ]  # fmt: skip
    assert cluster.calls("distilljax") == placed(3, "n7:9000")


def test_one_node_under_slurm_needs_no_coordinator(cluster):
    done = cluster.run("gpu.sh", f"--dir={cluster.checkout}", "--", "train", **slurm(1))

    assert done.returncode == 0, done.stderr
    assert cluster.calls("distilljax") == [["train"]]
    assert cluster.calls("scontrol") == []


def test_jax_under_slurm_is_left_all_gpus_of_the_node(cluster):
    """jax would take SLURM_LOCALID for the number of the one GPU to use."""
    cluster.install("sys.exit('SLURM_LOCALID' in os.environ)")

    done = cluster.run("gpu.sh", f"--dir={cluster.checkout}", "--", "t", **slurm(2))

    assert done.returncode == 0


@pytest.mark.parametrize("env", [{}, slurm(2)], ids=["here", "slurm"])
def test_the_exit_code_is_that_of_the_process(cluster, env):
    cluster.install("sys.exit(6)")

    done = cluster.run("gpu.sh", f"--dir={cluster.checkout}", "--", "train", **env)

    assert done.returncode == 6


@pytest.mark.parametrize(
    ("words", "env", "name"),
    [
        (["--hosts=n1,n2"], {}, "ssh"),
        ([], slurm(3), "srun"),
        ([], {}, "distilljax"),
    ],
    ids=["ssh", "slurm", "here"],
)
def test_dry_run_prints_what_would_run_and_executes_nothing(cluster, words, env, name):
    words = [*words, f"--dir={cluster.checkout}"]

    dry = cluster.run("gpu.sh", "--dry-run", *words, "--", *AWKWARD, **env)
    assert dry.returncode == 0, dry.stderr
    assert cluster.log.read_text() == ""

    cluster.run("gpu.sh", *words, "--", *AWKWARD, **env)
    # bash prints the newline in an argument as $'..\\n..'; it reads its own output.
    printed = [
        cluster.bash_words(line)[1:]
        for line in dry.stdout.replace("FIRST_NODE", "n7").splitlines()
    ]
    assert sorted(printed) == sorted(cluster.calls(name))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a distilljax command is needed after --"),
        (["--"], "a distilljax command is needed after --"),
        (["train"], "unknown argument 'train'"),
        (["--hosts=", "--", "train"], "--hosts needs host names"),
        (["--hosts=-oProxyCommand=x", "--", "train"], "--hosts needs host names"),
        (["--port=x", "--", "train"], "--port needs a number, got 'x'"),
        (["--dir"], "--dir needs a directory"),
        (["--env=x", "--", "train"], "--env must be NAME=VALUE, got 'x'"),
        (["--flags=x", "--", "train"], "--flags must be a file, got 'x'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_does_nothing(cluster, words, message):
    done = cluster.run("gpu.sh", *words)

    assert done.returncode == 2
    assert message in done.stderr
    assert cluster.log.read_text() == ""


def test_help_names_every_option(cluster):
    done = cluster.run("gpu.sh", "--help")

    assert done.returncode == 0
    known = set(shlex.split(done.stdout))
    assert {"--hosts", "--dir", "--port", "--env", "--flags", "--dry-run"} <= known
