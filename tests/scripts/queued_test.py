"""The launcher for TPUs with requests that wait, against a ``gcloud`` that keeps them.

Each slice has a home of its own in which its commands are really run. The stand-in can
fail, take slices away, and lie: call a request ACTIVE whose slices are gone, succeed
without doing anything, and print an error with exit code 0.
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

GCLOUD = """
import fcntl, pathlib, shutil
root = pathlib.Path({root!r})
path, homes, image = root / "world.json", root / "homes", root / "image"
group, verb, name = argv[2:5]
option = {{w.partition("=")[0]: w.partition("=")[2] for w in argv if w[:2] == "--"}}
lock = open(root / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
world = json.loads(path.read_text())

def save():
    # at once, since a call may be killed
    new = path.with_name("new%d" % os.getpid())
    new.write_text(json.dumps(world))
    new.rename(path)

def fail(message, code=1):
    save()
    print("ERROR: (gcloud.compute.tpus)", message, file=sys.stderr)
    sys.exit(code)

plan = world["plan"].get(group + " " + verb, [])
effect = plan.pop(0) if plan else {{}}
world["slices"].update(effect.get("slices", {{}}))
for gone in [n for n, state in world["slices"].items() if state is None]:
    del world["slices"][gone]
if "request" in effect:
    world["request"] = effect["request"] and world["request"] | effect["request"]
if "error" in effect:
    fail(effect["error"], effect.get("code", 1))
if effect.get("nothing"):
    save()
    sys.exit(0)
request, slices = world["request"], world["slices"]
if group == "queued-resources":
    if verb == "create":
        if request:
            fail("ALREADY_EXISTS: " + name)
        count = int(option.get("--node-count", 1))
        ids = [option["--node-id"]] if count == 1 else [
            option["--node-prefix"] + "-%d" % i for i in range(count)]
        label = "launcher" if option.get("--labels") == "distilljax=launcher" else ""
        world["request"] = dict(state=world["first"], ids=ids, label=label)
        if world["first"] == "ACTIVE":
            for i in ids:
                slices[i] = "READY"
                shutil.copytree(image, homes / i)
    elif not request:
        fail("NOT_FOUND: Resource was not found")
    elif verb == "describe":
        if request["state"] == "ACTIVE" and world["first"] != "ACTIVE":
            for i in request["ids"]:
                if i not in slices and not (homes / i).exists():
                    slices[i] = "READY"
                    shutil.copytree(image, homes / i)
        ids = ",".join(request["ids"]) if request["state"] == "ACTIVE" else "None"
        if "yaml" in option["--format"]:
            print("state: no capacity")
        else:
            print(request["state"], ids, request["label"], sep="\\t")
    elif verb == "delete":
        if "--force" not in option and slices:
            fail("FAILED_PRECONDITION: it has nodes")
        for i in request["ids"]:
            slices.pop(i, None)
            shutil.rmtree(homes / i, ignore_errors=True)
        world["request"] = None
    save()
    sys.exit(0)
if verb == "create":
    slices[name] = "READY"
    shutil.copytree(image, homes / name)
    save()
    sys.exit(0)
if verb == "scp":
    name = next(w for w in argv[4:6] if ":" in w).partition(":")[0]
state = slices.get(name)
if state is None:
    fail("NOT_FOUND: Resource was not found")
save()
if verb == "describe":
    if "labels" in option["--format"]:
        print(state, world["hosts"], "launcher", sep="\\t")
        sys.exit(0)
    index = int(name.partition("-")[2] or 0)
    if "ipAddress" in option["--format"]:
        print("10.0.0.%d" % (index + 1))
    elif "len" in option["--format"]:
        print(state, world["hosts"], sep="\\t")
    else:
        print(state)
    sys.exit(0)
if verb == "delete":
    del slices[name]
    shutil.rmtree(homes / name)
    save()
    sys.exit(0)
if state != "READY":
    fail("the node is not READY")
home = homes / name
if verb == "scp":
    source, target = (
        home / w.partition(":")[2] if ":" in w else pathlib.Path(w) for w in argv[4:6]
    )
    if source.is_dir():
        shutil.copytree(source, target / source.name)
    else:
        shutil.copy(source, target)
    sys.exit(0)
lock.close()
sys.exit(subprocess.run(
    ["bash", "-c", option["--command"]], cwd=home, env={{**os.environ, "SLICE": name}}
).returncode)
"""

# What is planned for `train` is done by whichever process comes first.
DISTILLJAX = """
import fcntl, pathlib, time
root = pathlib.Path({root!r})
names = ("MEGASCALE_", "LIBTPU_INIT_ARGS", "NOTE")
seen = {{k: v for k, v in os.environ.items() if k.startswith(names)}}
with open(root / "seen.jsonl", "a") as log:
    print(json.dumps([os.environ["SLICE"], seen]), file=log)
plan = json.loads((root / "world.json").read_text())["plan"].get("train") or [{{}}]
while len((root / "seen.jsonl").read_text().splitlines()) < plan[0].get("after", 0):
    time.sleep(0.01)
with open(root / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    path = root / "world.json"
    world = json.loads(path.read_text())
    plan = world["plan"].get("train", [])
    effect = plan.pop(0) if plan else {{}}
    world["slices"].update(effect.get("slices", {{}}))
    if "request" in effect:
        world["request"].update(effect["request"])
    new = path.with_name("new%d" % os.getpid())
    new.write_text(json.dumps(world))
    new.rename(path)
print(effect.get("say", "finished"))
time.sleep(effect.get("secs", 0))
sys.exit(effect.get("code", 0))
"""

NAME = ["--name=distil", "--zone=there", "--queued"]
KIND = ["--type=v5litepod-16", "--version=some-image"]
QUICK = ["--wait-secs=0", "--poll-secs=0"]
COMMAND = ["--", "train", "configs/x.py"]
TWO = "--slices=2"


@pytest.fixture
def cloud(stage):
    stage.repository = stage.root / "checkout"
    shutil.copytree(REPOSITORY / "scripts", stage.repository / "scripts")
    subprocess.run(["git", "init", "--quiet", stage.repository], check=True)
    venv = stage.root / "image" / "distilljax" / ".venv" / "bin"
    stage.add("python", "print('py312')", folder=venv)
    stage.add("distilljax", DISTILLJAX.format(root=str(stage.root)), folder=venv)
    stage.add("gcloud", GCLOUD.format(root=str(stage.root)))
    stage.add("stat", "print(1 if argv[-1] == '/' else 2)")
    stage.add("curl")
    (stage.root / "homes").mkdir()
    world = stage.root / "world.json"

    def arrange(request=None, slices=None, first="ACTIVE", hosts=1, **plan):
        """What is there; and by the verbs of gcloud, with _ for -, what will happen."""
        plan = {
            "train" if key == "train" else {
                "queue": "queued-resources ", "slice": "tpu-vm "
            }[key.partition("_")[0]] + key.partition("_")[2]: effects
            for key, effects in plan.items()
        }  # fmt: skip
        if request:
            request = {"label": "launcher", "ids": ["distil"]} | request
        world.write_text(
            json.dumps(
                {
                    "request": request,
                    "slices": slices or {},
                    "first": first,
                    "hosts": hosts,
                    "plan": plan,
                }
            )
        )
        for name in slices or {}:
            shutil.copytree(stage.root / "image", stage.root / "homes" / name)

    arrange()
    stage.arrange = arrange
    stage.world = lambda: json.loads(world.read_text())
    stage.workdir = f"--workdir={stage.root}/mnt/run"

    def seen() -> list[list]:
        lines = (stage.root / "seen.jsonl").read_text().splitlines()
        return sorted(map(json.loads, lines))

    stage.seen = seen
    return stage


def launch(cloud, *words: str):
    return cloud.run("tpu_vm.sh", *NAME, *KIND, *QUICK, *words, cloud.workdir, *COMMAND)


def verbs(cloud) -> list[str]:
    """The calls that act: what was requested, deleted and run, and on what."""
    return [
        f"{call[3]} {call[4] if call[3] != 'scp' else call[5].partition(':')[0]}"
        for call in cloud.calls("gcloud")
        if call[3] != "describe"
    ]


def runs(cloud) -> int:
    return len(cloud.calls("distilljax"))


# What is done to one slice after it is there: reach, send, install, look, run.
ON_ONE = ["ssh distil", "scp distil", "ssh distil", "ssh distil", "ssh distil"]


# --- waiting for the turn -------------------------------------------------------------


def test_a_request_is_made_awaited_used_and_deleted(cloud):
    cloud.arrange(
        first="WAITING_FOR_RESOURCES",
        queue_describe=[
            {},
            {},
            {"request": {"state": "PROVISIONING"}},
            {"request": {"state": "ACTIVE"}},
        ],
    )

    done = launch(cloud, "--spot", "--project=p", "--delete")

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["create distil", *ON_ONE, "delete distil"]
    create = next(c for c in cloud.calls("gcloud") if c[3] == "create")
    assert create == [
        "compute", "tpus", "queued-resources", "create", "distil", "--node-id=distil",
        "--accelerator-type=v5litepod-16", "--runtime-version=some-image",
        "--labels=distilljax=launcher", "--spot",
        "--zone=there", "--project=p", "--quiet",
    ]  # fmt: skip
    said = [line for line in done.stderr.splitlines() if " is " in line]
    assert said[:2] == [
        "tpu_vm.sh: distil is WAITING_FOR_RESOURCES",
        "tpu_vm.sh: distil is PROVISIONING",
    ]
    assert cloud.world()["request"] is None
    assert cloud.world()["slices"] == {}


def test_more_flags_for_create_are_handed_on(cloud):
    flags = ["--reserved", "--valid-until-duration=6h"]

    done = launch(cloud, *(f"--create-flag={flag}" for flag in flags))

    assert done.returncode == 0, done.stderr
    create = next(c for c in cloud.calls("gcloud") if c[3] == "create")
    assert create[-4:-2] == flags


def test_the_wait_has_an_end_and_keeps_its_place(cloud):
    cloud.arrange(first="WAITING_FOR_RESOURCES")

    done = launch(cloud, "--queue-secs=0", "--delete")

    assert done.returncode == 75
    assert "keeps its place in the queue" in done.stderr
    assert verbs(cloud) == ["create distil"]

    world = cloud.world()
    world["request"]["state"] = "ACTIVE"
    (cloud.root / "world.json").write_text(json.dumps(world))
    again = launch(cloud)

    assert again.returncode == 0, again.stderr
    assert verbs(cloud) == ["create distil", *ON_ONE], "it is not requested twice"


@pytest.mark.parametrize("state", ["ACCEPTED", "PROVISIONING"])
def test_a_request_made_before_is_waited_for(cloud, state):
    cloud.arrange(
        request={"state": state},
        first=state,
        queue_describe=[{}, {"request": {"state": "ACTIVE"}}],
    )

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ON_ONE


def test_a_request_that_fails_is_final_and_says_why(cloud):
    cloud.arrange(first="FAILED")

    done = launch(cloud)

    assert done.returncode == 1
    assert "state: no capacity" in done.stderr
    assert verbs(cloud) == ["create distil"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_what_is_left_of_an_earlier_request_is_replaced(cloud, state):
    cloud.arrange(request={"state": state})

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["delete distil", "create distil", *ON_ONE]


def test_a_request_that_is_lost_before_it_was_used_is_made_again(cloud):
    cloud.arrange(queue_describe=[{}, {"request": {"state": "SUSPENDED"}}])

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["create distil", "delete distil", "create distil", *ON_ONE]


def test_a_wait_outlives_a_network_that_comes_back(cloud):
    cut = {"error": "network is unreachable"}
    cloud.arrange(queue_describe=[{}, cut, cut, {}])

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert "the state of distil is unknown: ERROR" in done.stderr


def test_a_wait_ends_when_the_network_does_not_come_back(cloud):
    cloud.arrange(queue_describe=[{}, *[{"error": "unreachable", "code": 9}] * 5])

    done = launch(cloud, "--delete")

    assert done.returncode == 9
    assert verbs(cloud) == ["create distil"], "what is unknown is not deleted"


def test_wait_alone_waits(cloud):
    cloud.arrange(
        request={"state": "PROVISIONING"},
        first="PROVISIONING",
        queue_describe=[{}, {"request": {"state": "ACTIVE"}}],
    )

    done = cloud.run("tpu_vm.sh", "wait", *NAME, *QUICK)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == []


def test_watch_prints_what_changes_until_it_is_gone(cloud):
    cloud.arrange(
        request={"state": "PROVISIONING", "ids": ["distil-0", "distil-1"]},
        first="PROVISIONING",
        hosts=4,
        queue_describe=[
            {}, {}, {"error": "unreachable"}, {"request": {"state": "ACTIVE"}}, {},
            {"request": {"state": "SUSPENDED"}},
        ],
    )  # fmt: skip

    done = cloud.run("tpu_vm.sh", "watch", *NAME, TWO, *QUICK)

    assert done.returncode == 0, done.stderr
    assert [line.partition(" ")[2] for line in done.stdout.splitlines()] == [
        "distil: PROVISIONING, 0 workers of distil-0 distil-1",
        "distil: UNKNOWN, 0 workers of distil-0 distil-1",
        "distil: READY, 8 workers of distil-0 distil-1",
        "distil: SUSPENDED, 0 workers of distil-0 distil-1",
    ]


# --- a cloud that lies ----------------------------------------------------------------


def test_an_active_request_whose_slice_is_preempted_is_not_ready(cloud):
    """The state of the request lags behind."""
    cut_off = {"code": 255, "slices": {"distil": "PREEMPTED"}}
    cloud.arrange(train=[cut_off])

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert "distil is PREEMPTED: starting again" in done.stderr
    again = ["delete distil", "create distil", *ON_ONE]
    assert verbs(cloud) == ["create distil", *ON_ONE, *again]
    assert runs(cloud) == 2


def test_a_run_that_ends_well_on_a_slice_that_is_gone_is_run_again(cloud):
    cloud.arrange(train=[{}], slice_describe=[{}, {}, {"slices": {"distil": None}}])

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert "distil is MISSING: starting again" in done.stderr
    assert verbs(cloud).count("create distil") == 2


def test_a_slice_that_is_ready_and_not_yet_reachable_is_waited_for(cloud):
    refused = {"error": "Connection refused", "code": 255}
    cloud.arrange(slice_ssh=[refused, refused])

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["create distil", "ssh distil", "ssh distil", *ON_ONE]


def test_a_slice_that_was_never_reached_is_kept(cloud):
    """Perhaps it is our side that cannot reach it."""
    cloud.arrange(slice_ssh=[{"error": "timed out", "code": 255}] * 99)

    done = launch(cloud)

    assert done.returncode == 255
    assert "READY by its state, and cannot be reached" in done.stderr
    assert verbs(cloud).count("create distil") == 1
    assert cloud.world()["request"] is not None


def test_a_slice_that_is_lost_and_called_ready_is_replaced(cloud):
    refused = {"error": "timed out", "code": 255}
    cloud.arrange(slice_ssh=[{}, {}, {}, refused, *[refused] * 5])

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert "distil is unreachable: creating it anew" in done.stderr
    assert verbs(cloud).count("create distil") == 2
    assert runs(cloud) == 1


def test_a_cut_connection_to_a_slice_that_answers_is_final(cloud):
    """The run may go on over there: a second one beside it would be wrong."""
    cloud.arrange(train=[{"code": 255}])

    done = launch(cloud)

    assert done.returncode == 255
    assert runs(cloud) == 1
    assert "is READY: not a preemption" in done.stderr


def test_a_creation_that_succeeds_and_creates_nothing_is_found_out(cloud):
    cloud.arrange(queue_create=[{"nothing": True}])

    done = launch(cloud)

    assert done.returncode == 1
    assert "is ABSENT, although gcloud said that it was created" in done.stderr
    assert runs(cloud) == 0


def test_a_list_that_lags_behind_is_asked_again(cloud):
    lag = {"error": "NOT_FOUND: Resource was not found"}
    cloud.arrange(queue_describe=[{}, lag, lag])

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["create distil", *ON_ONE]


def test_a_success_without_an_answer_is_no_answer(cloud):
    """gcloud ends with 0, and says nothing: that is neither absent nor foreign."""
    cloud.arrange(request={"state": "ACTIVE"}, queue_describe=[{"nothing": True}] * 9)

    done = launch(cloud, "--delete")

    assert done.returncode == 1
    assert "the state of distil is unknown" in done.stderr
    assert verbs(cloud) == []


def test_a_deletion_that_only_says_so_is_found_out(cloud):
    cloud.arrange(queue_delete=[{"nothing": True}])

    done = launch(cloud, "--delete")

    assert done.returncode == 1
    assert "was deleted, says gcloud, and is still there (READY)" in done.stderr
    assert cloud.world()["request"] is not None


def test_a_slice_that_outlives_its_request_is_found_out(cloud):
    """It costs on, and nothing lists it with the request any more."""
    cloud.arrange(queue_delete=[{"request": None, "nothing": True}])

    done = launch(cloud, "--delete")

    assert done.returncode == 1
    assert "is still there (distil is READY)" in done.stderr


@pytest.mark.parametrize("state", ["ACTIVE", "SUSPENDED", "WAITING_FOR_RESOURCES"])
@pytest.mark.parametrize("command", ["all", "create", "delete"])
def test_a_request_of_someone_else_is_left_alone(cloud, command, state):
    cloud.arrange(request={"state": state, "label": ""}, slices={"distil": "READY"})

    done = cloud.run(
        "tpu_vm.sh", command, *NAME, *KIND, "--delete", cloud.workdir, *COMMAND
    )

    assert done.returncode == 2
    assert "was not created by this script" in done.stderr
    assert verbs(cloud) == []


# --- preemption -----------------------------------------------------------------------


def test_retries_are_counted(cloud):
    lost = {"code": 255, "request": {"state": "SUSPENDED"}}
    cloud.arrange(train=[lost] * 9)

    done = launch(cloud, "--retries=2")

    assert done.returncode == 255
    assert runs(cloud) == 3
    assert "no retries are left" in done.stderr


def test_a_deletion_that_fails_while_slices_go_is_tried_again(cloud):
    cloud.arrange(
        train=[{"code": 255, "request": {"state": "SUSPENDING"}}],
        queue_delete=[{"error": "FAILED_PRECONDITION: it is SUSPENDING", "code": 1}],
    )

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud).count("delete distil") == 2
    assert runs(cloud) == 2


def test_a_ready_request_of_ours_is_used_again(cloud):
    """So a run is resumed after its launcher was stopped."""
    cloud.arrange(request={"state": "ACTIVE"}, slices={"distil": "READY"})

    done = launch(cloud)

    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ON_ONE


# --- several slices -------------------------------------------------------------------


def test_several_slices_are_requested_and_run_together(cloud):
    cloud.arrange(hosts=2)

    done = launch(cloud, TWO)

    assert done.returncode == 0, done.stderr
    create = next(c for c in cloud.calls("gcloud") if c[3] == "create")
    assert create[5:7] == ["--node-count=2", "--node-prefix=distil"]
    assert runs(cloud) == 2
    address = {
        "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:8081",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_PORT": "8081",
    }
    assert cloud.seen() == [
        ["distil-0", address | {"MEGASCALE_SLICE_ID": "0"}],
        ["distil-1", address | {"MEGASCALE_SLICE_ID": "1"}],
    ]


def test_what_the_platform_says_of_slices_is_left_as_it_is(cloud):
    """jax and libtpu read it from the metadata that are asked for here."""
    cloud.add("curl", "print(\"ZONE: 'there'\\nMEGASCALE_NUM_SLICES: '2'\")")

    done = launch(cloud, TWO)

    assert done.returncode == 0, done.stderr
    assert cloud.seen() == [["distil-0", {}], ["distil-1", {}]]
    assert cloud.calls("curl")[0][-1] == (
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/tpu-env"
    )


def test_one_slice_that_is_lost_stops_the_others_and_all_start_again(cloud):
    # when both are at work: one that has not begun would find its slice gone
    lost = {"code": 255, "slices": {"distil-1": "PREEMPTED"}, "after": 2}
    cloud.arrange(train=[lost, {"secs": 300}])
    start = time.monotonic()

    done = launch(cloud, TWO)

    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 50
    assert runs(cloud) == 4
    assert verbs(cloud).count("delete distil") == 1


def test_several_slices_need_storage_that_they_share(cloud):
    words = [*NAME, *KIND, *QUICK, TWO, "--workdir=runs/few", *COMMAND]

    done = cloud.run("tpu_vm.sh", *words)

    assert done.returncode == 2
    assert "--workdir must be an absolute path on storage" in done.stderr
    assert runs(cloud) == 0


def test_an_interrupt_stops_the_calls_for_all_slices(cloud):
    cloud.arrange(train=[{"secs": 300}, {"secs": 300}])
    env = {"PATH": f"{cloud.bin}:{os.environ['PATH']}", "HOME": str(cloud.home)}
    script = cloud.repository / "scripts" / "tpu_vm.sh"
    process = subprocess.Popen(
        [script, *NAME, *KIND, *QUICK, TWO, cloud.workdir, *COMMAND],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # where the tests run in the background, it is ignored, and no shell traps that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 50
    while runs(cloud) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)

    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=100)[1]

    assert process.returncode == 130
    assert "distil may still run, and be billed" in error


# --- the run's environment ------------------------------------------------------------


def test_flags_and_variables_arrive_as_they_were_given(cloud):
    note = 'it\'s "so" $HOME; *'
    preset = REPOSITORY / "scripts" / "flags" / "v5e.env"

    done = launch(cloud, f"--flags={preset}", f"--env=NOTE={note}")

    assert done.returncode == 0, done.stderr
    ((_, seen),) = cloud.seen()
    assert seen["NOTE"] == note
    words = seen["LIBTPU_INIT_ARGS"].split(" ")
    assert words[0] == "--xla_tpu_enable_async_collective_fusion=true"
    assert len(words) == preset.read_text().count("\nLIBTPU_INIT_ARGS+=")


@pytest.mark.parametrize("slices", ["1", "2"])
def test_dry_run_prints_what_would_run_and_executes_nothing(cloud, slices):
    words = [*NAME, *KIND, *QUICK, f"--slices={slices}", "--delete", cloud.workdir]
    words += ["--env=NOTE=a b", "--", "train", "a b.py"]

    dry = cloud.run("tpu_vm.sh", "--dry-run", *words)
    assert dry.returncode == 0, dry.stderr
    assert cloud.log.read_text() == ""

    done = cloud.run("tpu_vm.sh", *words)
    assert done.returncode == 0, done.stderr
    text = dry.stdout.replace("FIRST_WORKER", "10.0.0.1")
    printed = [
        cloud.bash_words(line)[1:] for line in text.splitlines() if line[:2] == "gc"
    ]
    executed = [c for c in cloud.calls("gcloud") if c[3] != "describe"]
    # What asks whether slices can be reached is not part of the plan.
    executed = [c for c in executed if not c[-3].endswith(("=true", "; true"))]
    for call in [c for c in printed + executed if c[3] == "scp"]:
        call[4] = "archive"
    # Commands for several slices start at once.
    assert sorted(printed) == sorted(executed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slices=0"], "--slices must be 1 or more, got '0'"),
        (["--slices=x"], "--slices needs a whole number, got 'x'"),
        (["--queue-secs="], "--queue-secs needs a whole number, got ''"),
        (["--create-flag=spot"], "--create-flag needs a flag of gcloud, got 'spot'"),
        (["--env=A B"], "--env must be NAME=VALUE, got 'A B'"),
        (["--flags=nowhere.env"], "--flags must be a file, got 'nowhere.env'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_does_nothing(cloud, words, message):
    done = launch(cloud, *words)

    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.log.read_text() == ""


def test_slices_are_joined_only_when_requested_together(cloud):
    words = [word for word in NAME if word != "--queued"]

    done = cloud.run("tpu_vm.sh", *words, *KIND, TWO, cloud.workdir, *COMMAND)

    assert done.returncode == 2
    assert "--slices 2 needs --queued" in done.stderr


def test_a_preset_is_read_and_not_run(cloud):
    preset = cloud.root / "bad.env"
    preset.write_text('# fine\n\nLIBTPU_INIT_ARGS+=" --a=$(touch ran)"\n')

    done = launch(cloud, f"--flags={preset}")

    assert done.returncode == 2
    assert 'bad.env:3 must be a comment or NAME+=" --flag=value", got' in done.stderr
    assert not (cloud.root / "ran").exists()


# --- the real gcloud ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_itself_takes_every_command(cloud, tmp_path):
    """It reads the words of a call before it looks for an account, and finds none.

    Its configuration is empty, and its endpoint leads nowhere.
    """
    words = [*NAME, *KIND, *QUICK, TWO, "--project=p", "--spot", "--delete"]
    words += ["--create-flag=--valid-until-duration=6h", cloud.workdir, *COMMAND]
    launch(cloud, TWO, "--project=p", "--delete")
    describe = [c for c in cloud.calls("gcloud") if c[3] == "describe"]
    printed = cloud.run("tpu_vm.sh", "--dry-run", *words).stdout
    calls = [
        cloud.bash_words(line)[1:]
        for line in printed.splitlines()
        if line.startswith("gcloud ")
    ]
    kinds = {
        (c[2], c[3], *(w for w in c if "format" in w)): c for c in calls + describe
    }
    assert len(kinds) == 8
    real = shutil.which("gcloud")
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "CLOUDSDK_CONFIG": str(tmp_path / "none"),
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": "http://127.0.0.1:9/",
    }

    def say(call: list[str]) -> str:
        done = subprocess.run([real, *call], env=env, capture_output=True, text=True)
        assert done.returncode != 0
        return done.stderr

    for call in kinds.values():
        assert "do not currently have an active account" in say(call), call
    wrong = say([*calls[0], "--no-such-flag"])
    assert "unrecognized arguments: --no-such-flag" in wrong
