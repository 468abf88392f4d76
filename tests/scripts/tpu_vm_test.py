"""The launcher for TPU VMs, driven against a ``gcloud`` that keeps one slice in a file.

The stand-in runs what it gets over ssh in a real shell, in a home of its own, and
copies real files, so that quoting and what survives a preemption are tested by what
arrives and not by how it looks on the way. A new slice has an empty home.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

GCLOUD = """
import pathlib, shutil
path, home, image = map(pathlib.Path, {places!r})
world = json.loads(path.read_text())
verb = argv[3]
plan = world["plan"].get(verb, [])
effect = plan.pop(0) if plan else {{}}
path.write_text(json.dumps(world))
code = effect.get("code", 0)
change = dict()
if verb == "describe":
    if code:
        print("ERROR: network is unreachable", file=sys.stderr)
    elif world["state"] is None:
        print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
        code = 1
    else:
        print("WARNING: a new version is available", file=sys.stderr)
        print(world["state"], world["hosts"], world["label"], sep="\t")
elif code == 0 and verb == "create":
    label = "launcher" if "--labels=distilljax=launcher" in argv else ""
    change = dict(state="READY", label=label)
    shutil.rmtree(home)
    shutil.copytree(image, home)
elif code == 0 and verb == "delete":
    change = dict(state=None)
elif code == 0 and world["state"] != "READY":
    print("ERROR: the TPU is not READY", file=sys.stderr)
    code = 1
elif code == 0 and verb == "scp":
    source, target = (
        home / word.partition(":")[2] if ":" in word else pathlib.Path(word)
        for word in argv[4:6]
    )
    if source.is_dir():
        shutil.copytree(source, target / source.name, dirs_exist_ok=True)
    elif source.exists():
        shutil.copy(source, target)
    else:
        code = 1
elif code == 0 and verb == "ssh":
    command = next(word for word in argv if word.startswith("--command="))
    code = subprocess.run(
        ["bash", "-c", command.removeprefix("--command=")], cwd=home
    ).returncode
    world = json.loads(path.read_text())
if "state" in effect:
    change = dict(state=effect["state"])
path.write_text(json.dumps(world | change))
sys.exit(code)
"""

# A run of parts: each adds its mark to the working directory, and may be told to stop.
DISTILLJAX = """
import pathlib
path = pathlib.Path({world!r})
world = json.loads(path.read_text())
plan = world["plan"].get("train", [])
effect = plan.pop(0) if plan else {{}}
folder = pathlib.Path(argv[argv.index("--workdir") + 1])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "parts").open("a") as parts:
    print(effect.get("say", "finished"), file=parts)
print(effect.get("say", "finished"))
path.write_text(json.dumps(world | {{"state": effect.get("state", world["state"])}}))
sys.exit(effect.get("code", 0))
"""

SLICE = ["--name=distil", "--zone=there"]
KIND = ["--type=v4-32", "--version=some-image"]
COMMAND = ["--", "train", "configs/x.py"]
QUICK = ["--wait-secs=0"]


@pytest.fixture
def cloud(stage):
    """A cloud without any slice; ``arrange`` sets one, and what goes wrong.

    The script runs in a small checkout of its own, with storage beside it that the
    workers mount.
    """
    world = stage.root / "world.json"
    stage.repository = stage.root / "checkout"
    shutil.copytree(REPOSITORY / "scripts", stage.repository / "scripts")
    (stage.repository / ".gitignore").write_text("/runs/\n")
    subprocess.run(["git", "init", "--quiet", stage.repository], check=True)
    # The environment of the workers exists already, so nothing is really installed.
    image = stage.root / "image"
    venv = image / "distilljax" / ".venv" / "bin"
    stage.add("python", "print('py312')", folder=venv)
    stage.add("distilljax", DISTILLJAX.format(world=str(world)), folder=venv)
    shutil.rmtree(stage.home)
    shutil.copytree(image, stage.home)
    places = [str(world), str(stage.home), str(image)]
    stage.add("gcloud", GCLOUD.format(places=places))

    def arrange(state=None, label="launcher", hosts=1, mounted=True, **plan):
        world.write_text(
            json.dumps({"state": state, "label": label, "hosts": hosts, "plan": plan})
        )
        device = 2 if mounted else 1
        stage.add("stat", f"print(1 if argv[-1] == '/' else {device})")

    arrange()
    stage.arrange = arrange
    stage.state = lambda: json.loads(world.read_text())["state"]
    stage.storage = stage.root / "mnt"
    stage.mounted = f"--workdir={stage.storage}/run"
    return stage


def verbs(cloud) -> list[str]:
    """What was asked of gcloud, each call in one word."""
    return [call[3] for call in cloud.calls("gcloud")]


# With storage that the workers mount, what a run asks first is whether it is there.
FIRST_RUN = ["describe", "create", "scp", "ssh", "ssh", "ssh"]
RECREATE = ["describe", "delete", "create", "scp", "ssh", "ssh", "ssh"]
CUT_OFF = {"code": 255, "state": "PREEMPTED", "say": "step 3"}
STOPPED = {"say": "few: stopped and saved at step 7 of 9; the same command resumes."}
LOCAL = "--workdir=runs/few"


def launch(cloud, *words: str):
    """The whole of it, without pauses."""
    return cloud.run("tpu_vm.sh", *SLICE, *KIND, *QUICK, *words, *COMMAND)


def parts(folder: Path) -> list[str]:
    """What the parts of a run left in its working directory."""
    return (folder / "parts").read_text().splitlines()


# --- the order of things --------------------------------------------------------------


def test_all_creates_sets_up_runs_copies_and_deletes(cloud):
    done = launch(cloud, "--project=p", "--spot", "--delete", LOCAL)

    assert done.returncode == 0, done.stderr
    calls = cloud.calls("gcloud")
    where = ["--zone=there", "--project=p", "--quiet"]
    assert all(call[:3] == ["compute", "tpus", "tpu-vm"] for call in calls)
    describe, create, send, install, hosts, run, after, copy, ask, delete = (
        call[3:] for call in calls
    )
    assert describe == hosts == after == ask
    assert describe == [
        "describe", "distil",
        "--format=value(state,networkEndpoints.len(),labels.distilljax)", *where,
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
        " --workdir runs/few --multihost",
        *where,
    ]  # fmt: skip
    assert copy == [
        "scp", "distil:distilljax/runs/few", "runs/.incoming-few/", "--recurse",
        "--worker=0", *where,
    ]  # fmt: skip
    assert delete == ["delete", "distil", *where]
    assert cloud.state() is None
    assert parts(cloud.repository / "runs" / "few") == ["finished"]
    assert [p.name for p in (cloud.repository / "runs").iterdir()] == ["few"]


def test_the_checkout_arrives_and_is_installed_with_the_pins(cloud):
    cloud.repository = REPOSITORY
    cloud.arrange(state="READY")

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


def test_what_git_ignores_stays_home(cloud):
    cloud.arrange(state="READY")
    runs = cloud.repository / "runs"
    runs.mkdir()
    (runs / "large").touch()
    (cloud.repository / "new.py").touch()

    cloud.run("tpu_vm.sh", "setup", *SLICE)

    assert (cloud.home / "distilljax" / "new.py").exists(), "it needs no commit"
    assert not (cloud.home / "distilljax" / "runs").exists()


def test_prepare_runs_in_the_checkout_on_the_workers(cloud):
    command = 'false || { touch "it\'s done"; }'

    cloud.arrange(state="READY")
    done = cloud.run("tpu_vm.sh", "setup", *SLICE, f"--prepare={command}")

    assert done.returncode == 0, done.stderr
    assert (cloud.home / "distilljax" / "it's done").exists()
    assert cloud.run("tpu_vm.sh", "setup", *SLICE, "--prepare=exit 3").returncode == 3


def test_arguments_arrive_as_they_were_given(cloud):
    awkward = ["train", "a b.py", '--note=it\'s "so"', "$HOME `id` \\ ; *", "", "ä\n"]

    cloud.arrange(state="READY")
    done = cloud.run("tpu_vm.sh", "run", *SLICE, cloud.mounted, "--", *awkward)

    assert done.returncode == 0, done.stderr
    assert cloud.calls("distilljax") == [
        [*awkward, "--workdir", f"{cloud.storage}/run", "--multihost"]
    ]


# --- preemption -----------------------------------------------------------------------


def test_a_preempted_run_starts_again_on_a_new_slice(cloud):
    cloud.arrange(train=[CUT_OFF])

    done = launch(cloud, cloud.mounted)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == [*FIRST_RUN, "describe", *RECREATE, "describe"]
    assert "distil is PREEMPTED: starting again" in done.stderr
    first, second = [c for c in cloud.calls("gcloud") if c[3] == "create"]
    assert first == second
    assert parts(cloud.storage / "run") == ["step 3", "finished"]


@pytest.mark.parametrize("say", [STOPPED["say"], ""], ids=["said so", "output lost"])
def test_a_run_that_ends_with_its_slice_is_not_taken_for_finished(cloud, say):
    """Training that is told to stop saves, and exits with 0."""
    cloud.arrange(train=[{"code": 0, "state": "PREEMPTED", "say": say}])

    done = launch(cloud, cloud.mounted)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == [*FIRST_RUN, "describe", *RECREATE, "describe"]
    assert parts(cloud.storage / "run") == [say, "finished"]


def test_a_slice_that_goes_after_its_run_stopped_is_made_anew(cloud):
    """SIGTERM comes before the state changes: the first answer may still be READY."""
    cloud.arrange(train=[STOPPED], describe=[{}, {"state": "PREEMPTED"}])

    done = launch(cloud, cloud.mounted)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == [*FIRST_RUN, "describe", *RECREATE, "describe"]
    assert parts(cloud.storage / "run") == [STOPPED["say"], "finished"]


def test_a_stopped_run_leaves_its_slice_the_time_to_go(cloud):
    cloud.add("sleep")
    cloud.arrange(train=[STOPPED])

    launch(cloud, cloud.mounted, "--wait-secs=40")

    # before the state is asked for, and before starting again
    assert cloud.calls("sleep") == [["40"], ["40"]]


def test_a_stopped_run_on_a_ready_slice_is_resumed_there(cloud):
    cloud.arrange(train=[STOPPED, STOPPED])

    done = launch(cloud, cloud.mounted)

    assert done.returncode == 0, done.stderr
    again = ["describe", "describe", "scp", "ssh", "ssh", "ssh"]
    assert verbs(cloud) == [*FIRST_RUN, *again, *again, "describe"]
    assert parts(cloud.storage / "run")[-1] == "finished"


def test_a_run_that_is_always_stopped_is_no_success(cloud):
    cloud.arrange(train=[STOPPED] * 3)

    done = launch(cloud, cloud.mounted, "--retries=2", "--delete")

    assert done.returncode == 75
    assert len(cloud.calls("distilljax")) == 3
    assert "no retries are left" in done.stderr


def test_run_alone_says_that_it_was_stopped(cloud):
    cloud.arrange(state="READY", train=[STOPPED])

    done = cloud.run("tpu_vm.sh", "run", *SLICE, cloud.mounted, *COMMAND)

    assert done.returncode == 75
    assert STOPPED["say"] in done.stdout, "the output is shown all the same"
    assert "told to stop before its end" in done.stderr


@pytest.mark.parametrize("results", [{"stopped_at": 7}, {}], ids=["within", "between"])
def test_the_real_message_of_a_stopped_run_is_understood(
    cloud, monkeypatch, capsys, tmp_path, results
):
    from distilljax import cli

    def stopped(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        return results

    monkeypatch.setattr("distilljax.train.train", stopped)
    monkeypatch.chdir(REPOSITORY)
    words = ["configs/digits/few_labels.py", "--workdir", str(tmp_path), "--seeds=0..1"]
    assert cli.main(["train", *words]) == 0
    said = capsys.readouterr().out.strip()
    cloud.arrange(state="READY", train=[{"say": said}])

    done = cloud.run("tpu_vm.sh", "run", *SLICE, cloud.mounted, *COMMAND)

    assert done.returncode == 75, said


def test_a_slice_lost_during_setup_starts_again(cloud):
    cloud.arrange(scp=[{"code": 1, "state": "TERMINATED"}])

    done = launch(cloud, cloud.mounted)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == [*FIRST_RUN[:3], "describe", *RECREATE, "describe"]


def test_retries_are_counted_and_the_last_exit_code_is_kept(cloud):
    cloud.arrange(train=[CUT_OFF] * 4)

    done = launch(cloud, "--retries=2", cloud.mounted)

    assert done.returncode == 255
    again = ["describe", *RECREATE]
    assert verbs(cloud) == [*FIRST_RUN, *again, *again, "describe"]
    assert "no retries are left" in done.stderr


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_failure_on_a_ready_slice_is_final(cloud, code):
    cloud.arrange(train=[{"code": code}])

    done = launch(cloud, cloud.mounted)

    assert done.returncode == code
    assert verbs(cloud) == [*FIRST_RUN, "describe"]
    assert "is billed until you run: scripts/tpu_vm.sh delete" in done.stderr
    assert cloud.state() == "READY"


def test_a_first_creation_that_fails_is_not_tried_again(cloud):
    cloud.arrange(create=[{"code": 4}])

    done = launch(cloud, cloud.mounted)

    assert done.returncode == 4
    assert verbs(cloud) == ["describe", "create"]


@pytest.mark.parametrize("code", [0, 255])
def test_an_unknown_state_deletes_nothing(cloud, code):
    """A launcher without network must not take that for a preemption, or an end."""
    cloud.arrange(train=[{"code": code}], describe=[{}, {"code": 1}, {"code": 1}])

    done = launch(cloud, "--delete", cloud.mounted)

    assert done.returncode == (code or 1)
    assert verbs(cloud) == [*FIRST_RUN, "describe"]
    assert "the state of distil is unknown" in done.stderr
    assert cloud.state() == "READY"


# --- where the working directory lies -------------------------------------------------


def test_a_local_run_that_was_stopped_goes_on_from_its_copy(cloud):
    """It is brought home before the slice goes, and sent to the next one."""
    cloud.arrange(train=[STOPPED], describe=[{}, {}, {"state": "PREEMPTED"}])

    done = launch(cloud, "--delete", LOCAL)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud).count("create") == 2
    assert parts(cloud.repository / "runs" / "few") == [STOPPED["say"], "finished"]


def test_a_local_run_that_was_cut_off_goes_on_from_what_was_copied_before(cloud):
    runs = cloud.repository / "runs" / "few"
    runs.mkdir(parents=True)
    (runs / "parts").write_text("before\n")
    cloud.arrange(train=[CUT_OFF])

    done = launch(cloud, LOCAL)

    assert done.returncode == 0, done.stderr
    assert "nothing could be copied" in done.stderr
    assert parts(runs) == ["before", "finished"]


def test_a_copy_that_is_cut_off_leaves_the_one_before_as_it_was(cloud):
    cloud.arrange(state="READY", scp=[{"code": 1}])
    runs = cloud.repository / "runs" / "few"
    runs.mkdir(parents=True)
    (runs / "parts").write_text("before\n")

    done = cloud.run("tpu_vm.sh", "copy", *SLICE, LOCAL)

    assert done.returncode == 1
    assert parts(runs) == ["before"]
    assert [p.name for p in runs.parent.iterdir()] == ["few"]


def test_what_a_worker_has_is_newer_than_what_is_here(cloud):
    cloud.arrange(state="READY")
    here, there = (
        root / "runs" / "few" for root in (cloud.repository, cloud.home / "distilljax")
    )
    for folder, text in ((here, "old\n"), (there, "new\n")):
        folder.mkdir(parents=True)
        (folder / "parts").write_text(text)

    done = cloud.run("tpu_vm.sh", "run", *SLICE, LOCAL, *COMMAND)

    assert done.returncode == 0, done.stderr
    assert parts(there) == ["new", "finished"]
    assert [path.name for path in there.iterdir()] == ["parts"]


def test_a_slice_that_cannot_be_asked_for_its_directory_does_not_run(cloud):
    """The run would begin anew there, in silence."""
    (cloud.repository / "runs" / "few").mkdir(parents=True)
    cloud.arrange(state="READY", ssh=[{"code": 255}])

    done = cloud.run("tpu_vm.sh", "run", *SLICE, LOCAL, *COMMAND)

    assert done.returncode == 255
    assert cloud.calls("distilljax") == []


def test_several_hosts_need_storage_that_they_share(cloud):
    cloud.arrange(hosts=4)

    done = launch(cloud, "--delete", LOCAL)

    assert done.returncode == 2
    assert "distil has 4 hosts" in done.stderr
    assert cloud.calls("distilljax") == []
    assert cloud.state() is None, "nothing was there to copy"
    cloud.arrange(hosts=4)
    assert launch(cloud, cloud.mounted).returncode == 0


def test_storage_that_is_not_mounted_is_not_written_to(cloud):
    cloud.arrange(mounted=False)

    done = launch(cloud, cloud.mounted)

    assert done.returncode == 2
    assert "is on the boot disk and would be lost with the slice" in done.stderr
    assert cloud.calls("distilljax") == []


def test_mounted_storage_is_neither_copied_nor_sent(cloud):
    """Where it is mounted here too, a file would be copied onto itself."""
    (cloud.storage / "run").mkdir(parents=True)

    done = launch(cloud, "--delete", cloud.mounted)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == [*FIRST_RUN, "describe", "describe", "delete"]
    assert f"stays on its storage: {cloud.storage}/run" in done.stderr


# --- what is deleted ------------------------------------------------------------------


def test_a_failed_run_is_copied_before_its_slice_is_deleted(cloud):
    cloud.arrange(train=[{"code": 7}])

    done = launch(cloud, "--delete", LOCAL)

    assert done.returncode == 7
    assert verbs(cloud)[-4:] == ["describe", "scp", "describe", "delete"]
    assert (cloud.repository / "runs" / "few" / "parts").exists()


def test_a_slice_whose_results_could_not_be_copied_is_kept(cloud):
    cloud.arrange(scp=[{}, {"code": 5}])

    done = launch(cloud, "--delete", LOCAL)

    assert done.returncode == 5
    assert "delete" not in verbs(cloud)
    assert "distil is kept" in done.stderr


def test_a_new_slice_on_which_nothing_ran_has_nothing_to_copy(cloud):
    cloud.arrange(scp=[{"code": 5}])

    done = launch(cloud, "--delete", LOCAL)

    assert done.returncode == 5
    assert cloud.state() is None


@pytest.mark.parametrize("state", ["READY", "PREEMPTED"])
@pytest.mark.parametrize("command", ["all", "create", "delete"])
def test_a_slice_of_someone_else_is_left_alone(cloud, command, state):
    cloud.arrange(state=state, label="")

    done = cloud.run(
        "tpu_vm.sh", command, *SLICE, *KIND, "--delete", cloud.mounted, *COMMAND
    )

    assert done.returncode == 2
    assert verbs(cloud) == ["describe"]
    assert "was not created by this script" in done.stderr
    assert cloud.state() == state


def test_a_ready_slice_of_ours_is_used_again(cloud):
    cloud.arrange(state="READY")

    done = launch(cloud, cloud.mounted)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["describe", "scp", "ssh", "ssh", "ssh", "describe"]


def test_delete_of_an_absent_slice_is_no_error(cloud):
    done = cloud.run("tpu_vm.sh", "delete", *SLICE)

    assert done.returncode == 0
    assert verbs(cloud) == ["describe"]


# --- the call -------------------------------------------------------------------------


@pytest.mark.parametrize("mounted", [False, True], ids=["local", "mounted"])
def test_dry_run_prints_what_would_run_and_executes_nothing(cloud, mounted):
    workdir = cloud.mounted if mounted else LOCAL
    words = [*SLICE, *KIND, "--delete", workdir, "--prepare=true; true"]
    words += ["--", "train", "a b.py"]

    dry = cloud.run("tpu_vm.sh", "--dry-run", *words)
    assert dry.returncode == 0, dry.stderr
    assert cloud.log.read_text() == ""

    cloud.run("tpu_vm.sh", *words)
    printed = [
        cloud.bash_words(line)[4:]
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
        (["run", *SLICE, "--workdir=/", *COMMAND], "--workdir must hold only"),
        (["run", *SLICE, "--workdir=.", *COMMAND], "--workdir must hold only"),
        (["run", *SLICE, "--workdir=h:d", *COMMAND], "--workdir must hold only"),
        (["all", *SLICE, *KIND, "--workdir=gs://b/w", *COMMAND], "mount the bucket"),
        (["copy", *SLICE, "--workdir=gs://b/w"], "must be a path, got 'gs://b/w'"),
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
        "--prepare",
        "--retries",
        "--queued",
        "--slices",
        "--queue-secs",
        "--poll-secs",
        "--create-flag",
        "--env",
        "--flags",
        "--delete",
        "--dry-run",
    ]:
        assert f"  {option.partition('=')[0]} " in done.stdout
    assert "gs://" not in done.stdout
