"""The launcher for TPU VMs, driven against a ``gcloud`` that keeps one slice in a file.

The stand-in runs what it gets over ssh in a real shell, in a home of its own, so that
quoting is tested by what arrives and not by how it looks on the way.
"""

from __future__ import annotations

import json
import shlex

import pytest

GCLOUD = """
import pathlib, shutil
path = pathlib.Path({world!r})
world = json.loads(path.read_text())
verb = argv[3]
plan = world["plan"].get(verb, [])
effect = plan.pop(0) if plan else {{}}
code = effect.get("code", 0)
home = {home!r}
if verb == "describe":
    if code:
        print("ERROR: network is unreachable", file=sys.stderr)
    elif world["state"] is None:
        print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
        code = 1
    else:
        print("WARNING: a new version is available", file=sys.stderr)
        print(world["state"], world["label"], sep="\\t")
elif code == 0 and verb == "create":
    world["state"] = "READY"
    world["label"] = "launcher" if "--labels=distilljax=launcher" in argv else ""
elif code == 0 and verb == "delete":
    world["state"] = None
elif code == 0 and verb == "scp" and argv[4].endswith(".tar.gz"):
    shutil.copy(argv[4], home + "/distilljax.tar.gz")
elif code == 0 and verb == "ssh":
    command = next(word for word in argv if word.startswith("--command="))
    code = subprocess.run(
        ["bash", "-c", command.removeprefix("--command=")], cwd=home
    ).returncode
world["state"] = effect.get("state", world["state"])
path.write_text(json.dumps(world))
sys.exit(code)
"""

SLICE = ["--name=distil", "--zone=there"]
KIND = ["--type=v4-32", "--version=some-image"]
COMMAND = ["--", "train", "configs/x.py"]
QUICK = ["--wait-secs=0"]


@pytest.fixture
def cloud(stage):
    """A cloud without any slice; ``arrange`` sets one, and what goes wrong."""
    world = stage.root / "world.json"
    stage.add("gcloud", GCLOUD.format(world=str(world), home=str(stage.home)))
    # The environment of the workers exists already, so nothing is really installed.
    venv = stage.home / "distilljax" / ".venv" / "bin"
    stage.add("python", "print('py312')", folder=venv)
    stage.add("distilljax", folder=venv)

    def arrange(state=None, label="launcher", **plan):
        world.write_text(json.dumps({"state": state, "label": label, "plan": plan}))

    arrange()
    stage.arrange = arrange
    stage.state = lambda: json.loads(world.read_text())["state"]
    return stage


def verbs(cloud) -> list[str]:
    """What was asked of gcloud, each call in one word."""
    return [call[3] for call in cloud.calls("gcloud")]


FIRST_RUN = ["describe", "create", "scp", "ssh", "ssh"]
AGAIN = ["describe", "describe", "delete", "create", "scp", "ssh", "ssh"]


def test_all_creates_sets_up_runs_copies_and_deletes(cloud):
    done = cloud.run(
        "tpu_vm.sh", *SLICE, *KIND, "--project=p", "--spot", "--delete",
        "--workdir=no-such-run", *COMMAND,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    calls = cloud.calls("gcloud")
    where = ["--zone=there", "--project=p", "--quiet"]
    assert all(call[:3] == ["compute", "tpus", "tpu-vm"] for call in calls)
    describe, create, send, install, run, copy, ask, delete = (c[3:] for c in calls)
    assert describe == ask
    assert describe == [
        "describe", "distil", "--format=value(state,labels.distilljax)", *where,
    ]  # fmt: skip
    assert create == [
        "create", "distil", "--accelerator-type=v4-32", "--version=some-image",
        "--labels=distilljax=launcher", "--spot", *where,
    ]  # fmt: skip
    assert send[2:] == ["distil:distilljax.tar.gz", "--worker=all", *where]
    assert install[:3] == ["ssh", "distil", "--worker=all"]
    assert run == [
        "ssh", "distil", "--worker=all",
        "--command=cd distilljax && exec .venv/bin/distilljax train configs/x.py"
        " --workdir no-such-run --multihost",
        *where,
    ]  # fmt: skip
    assert copy == [
        "scp", "distil:distilljax/no-such-run", "./", "--recurse", "--worker=0",
        *where,
    ]  # fmt: skip
    assert delete == ["delete", "distil", *where]
    assert cloud.state() is None


def test_the_checkout_arrives_and_is_installed_with_the_pins(cloud):
    done = cloud.run("tpu_vm.sh", "setup", *SLICE)

    assert done.returncode == 0, done.stderr
    there = cloud.home / "distilljax"
    assert (there / "scripts" / "setup_vm.sh").exists()
    assert (there / "distilljax" / "distill.py").exists()
    assert not (there / ".git").exists()
    install = cloud.calls("python")[-1]
    assert install[:3] == ["-m", "pip", "install"]
    assert install[-4:] == [
        "-c", "constraints/py312.txt", "-e", ".[train,report,tpu]",
    ]  # fmt: skip
    assert cloud.full_calls("python")[-1][2] == str(there)


def test_arguments_arrive_as_they_were_given(cloud):
    awkward = ["train", "a b.py", '--note=it\'s "so"', "$HOME `id` \\ ; *", "", "ä\n"]

    done = cloud.run("tpu_vm.sh", "run", *SLICE, "--workdir=gs://b/w", "--", *awkward)

    assert done.returncode == 0, done.stderr
    assert cloud.calls("distilljax") == [
        [*awkward, "--workdir", "gs://b/w", "--multihost"]
    ]


def test_a_preempted_run_starts_again_on_a_new_slice(cloud):
    cut = {"code": 255, "state": "PREEMPTED"}
    cloud.arrange(ssh=[{}, cut])

    done = cloud.run("tpu_vm.sh", *SLICE, *KIND, *QUICK, "--workdir=gs://b/w", *COMMAND)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == FIRST_RUN + AGAIN
    assert "distil is PREEMPTED: starting again" in done.stderr
    first, second = [c for c in cloud.calls("gcloud") if c[3] == "create"]
    assert first == second
    assert len(cloud.calls("distilljax")) == 1, "the first one was cut off"


def test_a_slice_lost_during_setup_starts_again(cloud):
    cloud.arrange(scp=[{"code": 1, "state": "TERMINATED"}])

    done = cloud.run("tpu_vm.sh", *SLICE, *KIND, *QUICK, "--workdir=gs://b/w", *COMMAND)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["describe", "create", "scp", *AGAIN]


def test_retries_are_counted_and_the_last_exit_code_is_kept(cloud):
    cut = {"code": 255, "state": "PREEMPTED"}
    cloud.arrange(ssh=[{}, cut, {}, cut, {}, cut, {}, cut])

    done = cloud.run(
        "tpu_vm.sh", *SLICE, *KIND, *QUICK, "--retries=2", "--workdir=gs://b/w",
        *COMMAND,
    )  # fmt: skip

    assert done.returncode == 255
    assert verbs(cloud) == FIRST_RUN + AGAIN + AGAIN + ["describe"]
    assert "no retries are left" in done.stderr


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_failure_on_a_ready_slice_is_final(cloud, code):
    cloud.arrange(ssh=[{}, {"code": code}])

    done = cloud.run("tpu_vm.sh", *SLICE, *KIND, *QUICK, "--workdir=gs://b/w", *COMMAND)

    assert done.returncode == code
    assert verbs(cloud) == [*FIRST_RUN, "describe"]
    assert "is billed until you run: scripts/tpu_vm.sh delete" in done.stderr
    assert cloud.state() == "READY"


def test_a_failed_run_is_copied_before_its_slice_is_deleted(cloud):
    cloud.arrange(ssh=[{}, {"code": 7}])

    done = cloud.run(
        "tpu_vm.sh",
        *SLICE,
        *KIND,
        *QUICK,
        "--delete",
        "--workdir=no-such-run",
        *COMMAND,
    )

    assert done.returncode == 7
    assert verbs(cloud)[-4:] == ["describe", "scp", "describe", "delete"]


def test_a_slice_whose_results_could_not_be_copied_is_kept(cloud):
    cloud.arrange(scp=[{}, {"code": 5}])

    done = cloud.run(
        "tpu_vm.sh",
        *SLICE,
        *KIND,
        *QUICK,
        "--delete",
        "--workdir=no-such-run",
        *COMMAND,
    )

    assert done.returncode == 5
    assert "delete" not in verbs(cloud)
    assert "distil is kept" in done.stderr


def test_a_first_creation_that_fails_is_not_tried_again(cloud):
    cloud.arrange(create=[{"code": 4}])

    done = cloud.run("tpu_vm.sh", *SLICE, *KIND, *QUICK, "--workdir=gs://b/w", *COMMAND)

    assert done.returncode == 4
    assert verbs(cloud) == ["describe", "create"]


@pytest.mark.parametrize("state", ["READY", "PREEMPTED"])
@pytest.mark.parametrize("command", ["all", "create", "delete"])
def test_a_slice_of_someone_else_is_left_alone(cloud, command, state):
    cloud.arrange(state=state, label="")

    done = cloud.run(
        "tpu_vm.sh", command, *SLICE, *KIND, "--delete", "--workdir=gs://b/w", *COMMAND
    )

    assert done.returncode == 2
    assert verbs(cloud) == ["describe"]
    assert "was not created by this script" in done.stderr
    assert cloud.state() == state


def test_a_ready_slice_of_ours_is_used_again(cloud):
    cloud.arrange(state="READY")

    done = cloud.run("tpu_vm.sh", *SLICE, *KIND, "--workdir=gs://b/w", *COMMAND)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["describe", "scp", "ssh", "ssh"]


def test_an_unknown_state_deletes_nothing(cloud):
    """A launcher without network must not take that for a preemption."""
    cloud.arrange(ssh=[{}, {"code": 255}], describe=[{}, {"code": 1}, {"code": 1}])

    done = cloud.run(
        "tpu_vm.sh", *SLICE, *KIND, *QUICK, "--delete", "--workdir=gs://b/w", *COMMAND
    )

    assert done.returncode == 255
    assert verbs(cloud) == [*FIRST_RUN, "describe"]
    assert "the state of distil is unknown" in done.stderr
    assert cloud.state() == "READY"


def test_what_was_copied_before_is_sent_to_the_slice_first(cloud):
    """A local working directory outlives its slice only this way."""
    done = cloud.run("tpu_vm.sh", "run", *SLICE, "--workdir=docs", *COMMAND)

    assert done.returncode == 0, done.stderr
    prepare, send, _ = (call[3:] for call in cloud.calls("gcloud"))
    assert "--command=mkdir -p distilljax" in prepare
    assert send[:5] == [
        "scp", "docs", "distil:distilljax/", "--recurse", "--worker=all",
    ]  # fmt: skip


def test_delete_of_an_absent_slice_is_no_error(cloud):
    done = cloud.run("tpu_vm.sh", "delete", *SLICE)

    assert done.returncode == 0
    assert verbs(cloud) == ["describe"]


def test_dry_run_prints_what_would_run_and_executes_nothing(cloud):
    words = [
        *SLICE,
        *KIND,
        "--delete",
        "--workdir=no-such-run",
        "--",
        "train",
        "a b.py",
    ]

    dry = cloud.run("tpu_vm.sh", "--dry-run", *words)
    assert dry.returncode == 0, dry.stderr
    assert cloud.log.read_text() == ""

    cloud.run("tpu_vm.sh", *words)
    printed = [
        shlex.split(line)[4:]
        for line in dry.stdout.splitlines()
        if line.startswith("gcloud ")
    ]
    executed = [c[3:] for c in cloud.calls("gcloud") if c[3] != "describe"]
    # The archive lies in a temporary folder in one and has a plain name in the other.
    printed[1][1] = executed[1][1] = "archive"
    assert printed == executed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["all", "--zone=z"], "--name must be"),
        (["all", "--name=-x", "--zone=z"], "--name must be"),
        (["all", "--name=n"], "--zone is required"),
        (["all", *SLICE, "--version=v"], "needs --type"),
        (["create", *SLICE, "--type=t"], "needs --version"),
        (["all", *SLICE, *KIND, "--", "train"], "needs --workdir"),
        (["run", *SLICE, "--workdir=w"], "needs a distilljax command after --"),
        (["run", *SLICE, "--workdir=a b", *COMMAND], "--workdir must hold only"),
        (["run", *SLICE, "--workdir=w", *COMMAND, "--workdir=v"], "before the --"),
        (["all", *SLICE, "--retries=many"], "needs a whole number, got 'many'"),
        (["all", "--zone"], "--zone needs a value"),
        (["all", *SLICE, "train"], "unknown argument 'train'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_does_nothing(cloud, words, message):
    done = cloud.run("tpu_vm.sh", *words)

    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.log.read_text() == ""


def test_help_names_every_option(cloud):
    done = cloud.run("tpu_vm.sh", "--help")

    assert done.returncode == 0
    for option in [
        *SLICE,
        *KIND,
        *QUICK,
        "--project",
        "--spot",
        "--workdir",
        "--retries",
        "--delete",
        "--dry-run",
    ]:
        assert f"  {option.partition('=')[0]} " in done.stdout
    assert "bucket" in done.stdout
