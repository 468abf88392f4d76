"""The launcher for GKE, against an ``xpk`` and a ``kubectl`` that share a cluster.

What is created runs at once: its container as Kubernetes would start it, with its own
reading of ``$``, and its Job and JobSet as the policies in the manifest say. The tools
can fail, and lie: succeed without creating, list what is gone, answer with an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]

CLUSTER = """
import fcntl, pathlib, re
sys.path.append({site!r})
root = pathlib.Path({root!r})
path = root / "world.json"
if argv[:1] and argv[0].startswith("--context="):
    argv = argv[1:]
world = json.loads(path.read_text())
tool = {tool!r}
verb = tool + " " + (argv[1] if tool == "xpk" else argv[0])
if verb == "kubectl get":
    verb += " " + argv[1]
plan = world["plan"].get(verb, [])
effect = plan.pop(0) if plan else {{}}
if "jobset" in effect:
    world["jobset"] = effect["jobset"] and (world["jobset"] or {{}}) | effect["jobset"]
def finish(code=0, error=""):
    path.write_text(json.dumps(world))
    if error:
        print(error, file=sys.stderr)
    sys.exit(code)
if "error" in effect:
    finish(effect.get("code", 1), effect["error"])
if "prints" in effect:
    print(effect["prints"])
    finish(effect.get("code", 0))

def expand(text, env):
    # https://kubernetes.io: $$ is a dollar, $(NAME) a variable of the container
    return re.sub(
        r"\\$(\\$|\\((\\w+)\\))",
        lambda m: "$" if m[1] == "$" else env.get(m[2], m[0]), text)

def container(words, env):
    "The code with which the container ends."
    path.write_text(json.dumps(world))
    known = {{n: expand(v, env) for n, v in env.items()}}
    words = [expand(word, known) for word in words]
    words = [word.replace("/distilljax ", {app!r} + " ") for word in words]
    code = subprocess.run(words, cwd={app!r}, env=dict(os.environ) | known).returncode
    world.update(json.loads(path.read_text()))
    return code

def run(label, words, env, restarts, again):
    jobset = dict(label=label, restarts=0, conditions=[], uid="u%d" % world["created"])
    world["created"] += 1
    world["jobset"] = jobset
    while True:
        code = container(words, env)
        if world["jobset"] is None:
            return
        world["pods"] = [code]
        if code == 0:
            world["jobset"]["conditions"] = ["Completed"]
        elif code in again and world["jobset"]["restarts"] < restarts:
            world["jobset"]["restarts"] += 1
            continue
        else:
            world["jobset"]["conditions"] = ["Failed"]
        return

if tool == "xpk":
    option = {{w.partition("=")[0]: w.partition("=")[2] for w in argv[2:]}}
    name = option["--workload"]
    if argv[1] == "create":
        if world["jobset"]:
            finish(1, "already exists")
        env = dict(w[6:].split("=", 1) for w in argv if w[:6] == "--env=")
        again = [42, *range(127, 256)]  # of xpk itself
        run("", ["bash", "-c", option["--command"]], env, int(option["--max-restarts"]),
            again)
    else:
        world["jobset"] = None
    finish()

jobset = world["jobset"]
if argv[0] == "create":
    import yaml
    text = sys.stdin.read()
    (root / "manifest.yaml").write_text(text)
    found = yaml.safe_load(text)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]["containers"][0]
    env = {{e["name"]: e["value"] for e in pod["env"]}}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    run(found["metadata"]["labels"]["distilljax"], pod["command"] + pod["args"], env,
        found["spec"]["failurePolicy"]["maxRestarts"], rule["onExitCodes"]["values"])
elif argv[:2] == ["config", "current-context"]:
    print("gke_p_z_other")
elif argv[:2] == ["get", "pods"]:
    print(*world["pods"], "", sep=" ")
elif not jobset:
    finish(1, 'Error from server (NotFound): jobsets.jobset.x-k8s.io "x" not found')
elif argv[0] == "get":
    print(jobset["label"], jobset["uid"], jobset["restarts"],
          "".join(c + " " for c in jobset["conditions"]), "", sep="|", end="")
elif argv[0] == "label":
    jobset["label"] = argv[3].partition("=")[2]
elif argv[0] == "delete":
    world["jobset"] = None
finish()
"""

DISTILLJAX = """
import pathlib
path = pathlib.Path({root!r}) / "world.json"
world = json.loads(path.read_text())
plan = world["plan"].get("train", [])
effect = plan.pop(0) if plan else {{}}
if "jobset" in effect:
    world["jobset"] = effect["jobset"]
names = ("NOTE", "LIBTPU_INIT_ARGS")
world["seen"] = {{k: v for k, v in os.environ.items() if k in names}}
path.write_text(json.dumps(world))
print(effect.get("say", "finished"))
sys.exit(effect.get("code", 0))
"""

COMMON = ["--name=distil", "--image=here/distilljax:1", "--workdir=/mnt/runs/x"]
XPK = ["--cluster=c", "--type=v5litepod-16"]
JOBSET = ["--jobset", "--accelerator=tpu-v5-lite-podslice", "--topology=4x8"]
JOBSET += ["--hosts=8", "--claim=runs"]
WAYS = {"xpk": XPK, "jobset": JOBSET}
QUICK = ["--poll-secs=0"]
COMMAND = ["--", "train", "configs/x.py"]
AWKWARD = ["train", "a b.py", '--note=it\'s "so"', "", "ä\n"]
AWKWARD += ["$HOME $$ $(NOTE) `id` \\ ; *", "$\n$(NOTE)"]
AS_RUN = ["train", "configs/x.py", "--workdir", "/mnt/runs/x", "--multihost"]
STOPPED = {"say": "few: stopped and saved at step 7 of 9; the same command resumes."}


@pytest.fixture
def cluster(stage):
    app = stage.root / "app"
    shutil.copytree(REPOSITORY / "scripts", app / "scripts")
    stage.add("distilljax", DISTILLJAX.format(root=str(stage.root)))
    site = str(Path(yaml.__file__).parents[1])
    for tool in ("xpk", "kubectl"):
        body = CLUSTER.format(root=str(stage.root), tool=tool, app=str(app), site=site)
        stage.add(tool, body)
    world = stage.root / "world.json"

    def arrange(jobset=None, pods=(), **plan):
        if jobset:
            jobset = {"label": "launcher", "restarts": 0, "uid": "old"} | jobset
        plan = {key.replace("_", " "): effects for key, effects in plan.items()}
        world.write_text(
            json.dumps(
                {"jobset": jobset, "pods": list(pods), "created": 0, "plan": plan}
            )
        )

    arrange()
    stage.arrange = arrange
    stage.world = lambda: json.loads(world.read_text())
    return stage


def launch(cluster, *words: str, way="xpk", command="resume"):
    return cluster.run("xpk.sh", command, *COMMON, *WAYS[way], *QUICK, *words, *COMMAND)


def verbs(cluster) -> list[str]:
    """The calls that act, in order."""
    lines = map(json.loads, cluster.log.read_text().splitlines())
    calls = [
        (name, words[1] if name == "xpk" else words[0])
        for name, words, _ in lines
        if words
    ]
    return [
        f"{name} {verb}"
        for name, verb in calls
        if name in ("xpk", "kubectl") and verb not in ("get", "config")
    ]


def runs(cluster) -> int:
    return len(cluster.calls("distilljax"))


# --- the way of a run -----------------------------------------------------------------


def test_xpk_creates_the_workload_and_it_gets_our_label(cluster):
    done = launch(cluster, "--zone=z", "--project=p", "--spot", "--slices=2")

    assert done.returncode == 0, done.stderr
    assert verbs(cluster) == ["xpk create", "kubectl label"]
    (create,) = cluster.calls("xpk")
    assert create == [
        "workload", "create", "--cluster=c", "--workload=distil",
        "--tpu-type=v5litepod-16", "--num-slices=2", "--docker-image=here/distilljax:1",
        "--command=cd /distilljax && exec scripts/stoppable.sh distilljax train"
        " configs/x.py --workdir /mnt/runs/x --multihost",
        "--max-restarts=20", "--termination-grace-period-seconds=120", "--spot",
        "--zone=z", "--project=p",
    ]  # fmt: skip
    assert cluster.calls("distilljax") == [AS_RUN]
    assert cluster.world()["jobset"]["label"] == "launcher"
    assert "distil: COMPLETED, 0 restarts" in done.stdout


def test_a_jobset_says_what_it_needs(cluster):
    done = launch(cluster, "--spot", "--slices=2", "--context=k", way="jobset")

    assert done.returncode == 0, done.stderr
    assert all(call[0] == "--context=k" for call in cluster.calls("kubectl"))
    found = yaml.safe_load((cluster.root / "manifest.yaml").read_text())
    assert found["metadata"]["name"] == "distil"
    (slices,) = found["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 8
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "what a policy of exit codes asks for"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["image"] == "here/distilljax:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/mnt/runs"}]
    (volume,) = pod["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "runs"}
    assert not [word for word in str(found).split() if word.startswith("@")]


def test_the_storage_is_mounted_one_folder_below_the_top(cluster):
    words = [*COMMON[:2], "--workdir=/mnt/runs/lm/seed0/", *JOBSET, *COMMAND]

    done = cluster.run("xpk.sh", "submit", "--dry-run", *words)

    assert "mountPath: /mnt/runs\n" in done.stdout
    assert '"--workdir", "/mnt/runs/lm/seed0"' in done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_arguments_arrive_as_they_were_given(cluster, way):
    note = "it's $HOME $(NOTE) $$ ; "
    if way == "jobset":  # what xpk would break is refused
        note += '"so" \\ \n'
    preset = REPOSITORY / "scripts" / "flags" / "v6e.env"
    words = [*COMMON, *WAYS[way], *QUICK, f"--env=NOTE={note}", f"--flags={preset}"]

    done = cluster.run("xpk.sh", *words, "--", *AWKWARD)

    assert done.returncode == 0, done.stderr
    assert cluster.calls("distilljax") == [[*AWKWARD, *AS_RUN[2:]]]
    seen = cluster.world()["seen"]
    assert seen["LIBTPU_INIT_ARGS"].endswith(" --xla_tpu_scoped_vmem_limit_kib=98304")
    assert seen["NOTE"] == note


def test_submit_ends_when_the_workload_is_there(cluster):
    done = launch(cluster, command="submit")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "finished\n", "the cluster's, and no state"


@pytest.mark.parametrize("conditions", [[], ["Suspended"]], ids=["running", "queued"])
def test_a_workload_that_is_there_is_not_submitted_twice(cluster, conditions):
    end = {"jobset": {"conditions": ["Completed"]}}
    cluster.arrange(
        jobset={"conditions": conditions}, kubectl_get_jobset=[{}, {}, {}, end]
    )

    done = launch(cluster)

    assert done.returncode == 0, done.stderr
    assert verbs(cluster) == []
    states = [line.split(": ")[1] for line in done.stdout.splitlines()]
    assert states == ["QUEUED, 0 restarts" if conditions else "RUNNING, 0 restarts",
                      "COMPLETED, 0 restarts"]  # fmt: skip


def test_more_flags_for_xpk_are_handed_on(cluster):
    done = launch(cluster, "--xpk-flag=--priority=high")

    assert done.returncode == 0, done.stderr
    assert cluster.calls("xpk")[0][-1] == "--priority=high"


# --- preemption, stops and failures ---------------------------------------------------


def test_a_stopped_run_is_no_success_and_is_submitted_again(cluster):
    """It ends with 0, and the workload would count as complete."""
    cluster.arrange(train=[STOPPED])

    done = launch(cluster)

    assert done.returncode == 0, done.stderr
    again = ["xpk delete", "xpk create", "kubectl label"]
    assert verbs(cluster) == ["xpk create", "kubectl label", *again]
    assert runs(cluster) == 2


def test_a_stopped_run_in_a_jobset_is_started_again_by_the_cluster(cluster):
    cluster.arrange(train=[STOPPED, {"code": 143}])

    done = launch(cluster, way="jobset")

    assert done.returncode == 0, done.stderr
    assert runs(cluster) == 3
    assert verbs(cluster) == ["kubectl create"]
    assert "COMPLETED, 2 restarts" in done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_restarts_and_retries_have_an_end(cluster, way):
    cluster.arrange(train=[{"code": 137}] * 99)

    done = launch(cluster, "--retries=2", "--max-restarts=1", way=way)

    assert done.returncode == 75
    assert runs(cluster) == 3 * 2
    assert "no retries are left" in done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_fails_is_final(cluster, way):
    cluster.arrange(train=[{"code": 3}])

    done = launch(cluster, way=way)

    assert done.returncode == 3
    assert runs(cluster) == 1
    assert "a container ended with 3: not a preemption" in done.stderr


def test_a_workload_that_vanishes_is_submitted_again(cluster):
    """Done or not, the run itself knows."""
    cluster.arrange(
        jobset={"conditions": []}, kubectl_get_jobset=[{}, {}, {"jobset": None}]
    )

    done = launch(cluster)

    assert done.returncode == 0, done.stderr
    assert "distil is gone: whether the run was done" in done.stderr
    assert verbs(cluster) == ["xpk create", "kubectl label"]


# --- tools that fail and lie ----------------------------------------------------------


def test_a_workload_that_gets_no_label_is_said_to_have_none(cluster):
    cluster.arrange(kubectl_label=[{"error": "forbidden", "code": 5}])

    done = launch(cluster)

    assert done.returncode == 5
    assert "distil runs, and has not got our label" in done.stderr
    assert verbs(cluster) == ["xpk create", "kubectl label"]


def test_a_creation_that_fails_is_final(cluster):
    cluster.arrange(xpk_create=[{"error": "no such cluster", "code": 6}])

    done = launch(cluster)

    assert done.returncode == 6
    assert runs(cluster) == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_creation_that_only_says_so_is_found_out(cluster, way):
    lie = [{"prints": "[XPK] ERROR: quota exceeded. XPK Done."}]
    cluster.arrange(xpk_create=lie, kubectl_create=lie)

    done = launch(cluster, way=way)

    assert done.returncode == 1
    assert "was created, says the tool, and is not there" in done.stderr
    assert "Its context is 'gke_p_z_other'" in done.stderr


@pytest.mark.parametrize("answer", ["", "error: the server is unavailable"])
def test_an_answer_that_is_none_is_not_believed(cluster, answer):
    cluster.arrange(kubectl_get_jobset=[{"prints": answer}])

    done = launch(cluster)

    assert done.returncode == 1
    assert "the state of distil is unknown" in done.stderr
    assert verbs(cluster) == []


def test_a_network_that_comes_back_is_waited_for(cluster):
    cut = {"error": "Unable to connect to the server"}
    cluster.arrange(kubectl_get_jobset=[{}, {}, cut, cut])

    done = launch(cluster)

    assert done.returncode == 0, done.stderr
    assert verbs(cluster) == ["xpk create", "kubectl label"]


def test_an_unreachable_cluster_ends_the_watch_and_deletes_nothing(cluster):
    cut = {"error": "Unable to connect to the server", "code": 4}
    cluster.arrange(kubectl_get_jobset=[{}, {}, *[cut] * 5])

    done = launch(cluster)

    assert done.returncode == 4
    assert verbs(cluster) == ["xpk create", "kubectl label"]


def test_a_list_that_shows_what_was_deleted_is_not_believed(cluster):
    """It is COMPLETED there, and the new run would count as done."""
    stale = {"prints": "launcher|old|0|Completed |"}
    cluster.arrange(
        jobset={"conditions": ["Failed"]},
        train=[{"code": 3}],
        # found, gone, created, and then the old one shown again
        kubectl_get_jobset=[{}, {}, {}, stale],
    )

    done = launch(cluster)

    assert done.returncode == 3
    assert runs(cluster) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_deletion_that_only_says_so_is_found_out(cluster, way):
    lie = [{"prints": "deleted"}]
    cluster.arrange(jobset={"conditions": []}, xpk_delete=lie, kubectl_delete=lie)

    done = cluster.run("xpk.sh", "delete", *COMMON, *WAYS[way], *QUICK)

    assert done.returncode == 1
    assert "is still there (RUNNING)" in done.stderr


# --- what is deleted ------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("conditions", [[], ["Failed"], ["Completed"]], ids=str)
@pytest.mark.parametrize("command", ["resume", "submit", "delete"])
def test_a_workload_of_someone_else_is_left_alone(cluster, way, conditions, command):
    cluster.arrange(jobset={"label": "", "conditions": conditions})

    done = launch(cluster, way=way, command=command)

    assert done.returncode == 2
    assert "was not created by this script" in done.stderr
    assert verbs(cluster) == []


@pytest.mark.parametrize("way", WAYS)
def test_delete_deletes_one_workload_by_its_name(cluster, way):
    cluster.arrange(jobset={"conditions": []})

    done = cluster.run("xpk.sh", "delete", *COMMON, *WAYS[way], *QUICK)

    assert done.returncode == 0, done.stderr
    assert cluster.world()["jobset"] is None
    if way == "xpk":
        assert cluster.calls("xpk") == [
            ["workload", "delete", "--cluster=c", "--workload=distil", "--force"]
        ]


def test_delete_of_what_is_absent_is_no_error(cluster):
    done = cluster.run("xpk.sh", "delete", *COMMON, *XPK, *QUICK)

    assert done.returncode == 0
    assert verbs(cluster) == []


# --- the call -------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_dry_run_prints_what_would_run_and_executes_nothing(cluster, way):
    dry = launch(cluster, "--dry-run", way=way)
    assert dry.returncode == 0, dry.stderr
    assert cluster.log.read_text() == ""

    launch(cluster, way=way)
    lines = [x for x in dry.stdout.splitlines() if x.startswith(("xpk ", "kubectl "))]
    printed = [cluster.bash_words(line) for line in lines]
    acts = [
        [name, *words]
        for name, words, _ in map(json.loads, cluster.log.read_text().splitlines())
        if name in ("xpk", "kubectl") and words[0] != "get"
    ]
    assert printed == acts
    if way == "jobset":
        text = dry.stdout.partition("reads:\n")[2].partition("kubectl create")[0]
        assert text == (cluster.root / "manifest.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--name must be at most 40"),
        (["--name=Distil"], "got 'Distil'"),
        (["--name=" + "n" * 41], "--name must be at most 40"),
        (["--name=n", *COMMAND], "resume needs --cluster"),
        (["delete", "--name=n"], "delete needs --cluster"),
        (["--name=n", *XPK, *COMMAND], "resume needs --image"),
        (["submit", "--name=n", *XPK, "--image=i", *COMMAND], "submit needs --workdir"),
        ([*COMMON, "--cluster=c", *COMMAND], "resume needs --type"),
        ([*COMMON, *JOBSET[:-1], *COMMAND], "resume needs --claim"),
        ([*COMMON, *XPK, "--workdir=runs", *COMMAND], "got 'runs'"),
        ([*COMMON, *XPK, "--workdir=gs://b/x", *COMMAND], "got 'gs://b/x'"),
        ([*COMMON, *XPK, "--image=a b", *COMMAND], "must be plain names, got 'a b'"),
        ([*COMMON, *XPK, '--env=A="', *COMMAND], "no double quote, backslash or"),
        ([*COMMON, *XPK], "resume needs a distilljax command after --"),
        ([*COMMON, *XPK, *COMMAND, "--workdir=v"], "give --workdir before the --"),
        ([*COMMON, *XPK, "--slices=0", *COMMAND], "--slices must be 1 or more"),
        ([*COMMON, *XPK, "--retries=x", *COMMAND], "whole number, got 'x'"),
        ([*COMMON, *XPK, "--xpk-flag=x", *COMMAND], "a flag of xpk, got 'x'"),
        ([*COMMON, *XPK, "train"], "unknown argument 'train'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_does_nothing(cluster, words, message):
    done = cluster.run("xpk.sh", *words)

    assert done.returncode == 2
    assert message in done.stderr
    assert cluster.log.read_text() == ""


def test_help_names_every_option(cluster):
    done = cluster.run("xpk.sh", "--help")

    assert done.returncode == 0
    source = (REPOSITORY / "scripts" / "xpk.sh").read_text()
    parse = source[source.index("parse() {") : source.index("need() {")]
    for option in set(re.findall(r" (--[a-z-]+)(?=[ )])", parse)):
        assert f"  {option} " in done.stdout, option


# --- the real xpk ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("xpk") is None, reason="xpk is not installed")
def test_xpk_itself_makes_a_container_that_gets_the_words(cluster, tmp_path):
    """It writes its manifest without a cluster; the container is started from that."""
    words = [*COMMON, *XPK, "--zone=us-west4-a", "--project=p", "--slices=2", "--spot"]
    preset = REPOSITORY / "scripts" / "flags" / "v5e.env"
    words += [f"--flags={preset}", "--env=NOTE=it's $HOME $(NOTE)"]
    cluster.arrange(train=[STOPPED])
    printed = cluster.run(
        "xpk.sh", "submit", "--dry-run", *words, "--", *AWKWARD
    ).stdout
    call = cluster.bash_words(printed.splitlines()[0])
    manifest = tmp_path / "manifest.yaml"

    subprocess.run(
        [shutil.which("xpk"), *call[1:], "--dry-run", "--skip-validation",
         f"--output-manifest-file={manifest}"],
        check=True, capture_output=True, stdin=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)},
    )  # fmt: skip

    found = yaml.safe_load(manifest.read_text())
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 20
    (slices,) = found["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    pod = slices["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120
    (container,) = pod["containers"]
    assert container["image"] == "here/distilljax:1"
    env = {e["name"]: e["value"] for e in container["env"]}

    def expand(text: str) -> str:
        pattern = r"\$(\$|\((\w+)\))"
        return re.sub(
            pattern, lambda m: "$" if m[1] == "$" else env.get(m[2], m[0]), text
        )

    env |= {name: expand(value) for name, value in env.items()}
    assert env["NOTE"] == "it's $HOME $(NOTE)"
    command = [expand(word) for word in container["command"]]
    command[-1] = command[-1].replace("cd /distilljax ", f"cd {cluster.root}/app ")
    done = subprocess.run(
        command,
        env=env | {"PATH": f"{cluster.bin}:{os.environ['PATH']}"},
        capture_output=True,
    )
    assert done.returncode == 75
    assert cluster.calls("distilljax") == [[*AWKWARD, *AS_RUN[2:]]]
