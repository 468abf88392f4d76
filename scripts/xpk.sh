#!/usr/bin/env bash
# Run a distilljax command on TPU slices of a GKE cluster, through XPK or as a JobSet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib/launch.sh
source "$here/lib/launch.sh"

usage() {
    cat <<'EOF'
Run a distilljax command on a GKE cluster with TPUs.

usage: scripts/xpk.sh [COMMAND] --name NAME [OPTION]... [-- ARGUMENT...]

commands
  resume   (default) submit and monitor, and again after a preemption or a stop, until
           the run is done
  submit   start `distilljax ARGUMENT... --workdir DIR --multihost` on every host
  monitor  print the state whenever it changes, until the run has ended
  delete   delete the workload

options
  --name NAME         name of the workload
  --image IMAGE       image that scripts/Dockerfile built, where the cluster can pull it
  --workdir DIR       working directory of the run: an absolute path on storage that is
                      mounted in every container
  --slices N          slices, joined into one run (default 1)
  --env NAME=VALUE    variable in the environment of the run; may be repeated
  --flags FILE        preset of compiler flags for the run, see scripts/flags
  --max-restarts N    restarts within the cluster, after a preemption (default 20)
  --grace-secs N      time between SIGTERM and SIGKILL, to save in (default 120)
  --spot              on spot machines
  --context CONTEXT   context of kubectl (default: its current one)
  --retries N         times that resume submits again (default 3)
  --poll-secs N       pause between two questions about the state (default 30)
  --dry-run           print the commands, and execute nothing
  --help              print this

through XPK
  --cluster CLUSTER   the cluster
  --type TYPE         type of each slice, v5litepod-256 say
  --zone ZONE         zone of the cluster (default: the one gcloud is set to)
  --project PROJECT   project of the cluster (default: the one gcloud is set to)
  --xpk-flag FLAG     another flag of `xpk workload create`, --priority=high say; may be
                      repeated

as a JobSet, with kubectl alone
  --jobset            fill in scripts/jobset.yaml and create that
  --accelerator NAME  label of the node pool, tpu-v5-lite-podslice say
  --topology SHAPE    topology of each slice, 4x8 say
  --hosts N           hosts of each slice
  --chips N           chips of each host (default 4)
  --claim NAME        claim of the storage, mounted at the first two folders of
                      --workdir, at /mnt/runs say

kubectl has to speak to that cluster: `gcloud container clusters get-credentials CLUSTER`.
Preemption: the cluster starts the run again, up to --max-restarts times. What ends in
spite of that, because it was stopped or its workload is gone, `resume` submits again.
A run that fails by itself is not started again. A finished run says so, and does nothing.

Only what this script created is deleted: it carries the label distilljax=launcher, and
a workload of the same name without it is left alone.

Exit code: 0 when the run is done, 2 for a wrong call, 75 when it ended before it was
done and may be run again, otherwise that of the command that failed.

example
  scripts/xpk.sh --name distil --cluster CLUSTER --zone ZONE --type v5litepod-16 \
      --image IMAGE --workdir /mnt/runs/all_data \
      -- train configs/digits/all_data.py --teacher.workdir=/mnt/runs/teacher \
      --mesh=data=16
EOF
}

parse() {
    command=resume name='' image='' workdir='' slices=1 max_restarts=20 grace_secs=120
    spot='' context='' retries=3 poll_secs=30 dry_run='' arguments=()
    cluster='' type='' zone='' project='' xpk_flags=()
    jobset='' accelerator='' topology='' hosts='' chips=4 claim=''
    case ${1-} in
        resume | submit | monitor | delete)
            command=$1
            shift
            ;;
    esac
    while (($#)); do
        if [[ $1 == --?*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
        fi
        case $1 in
            --name | --image | --workdir | --context | --cluster | --type | --zone \
                | --project | --accelerator | --topology | --claim)
                need_value "$@"
                printf -v "${1#--}" '%s' "$2"
                shift 2
                ;;
            --slices | --max-restarts | --grace-secs | --retries | --poll-secs \
                | --hosts | --chips)
                need_number "$@"
                local variable=${1#--}
                printf -v "${variable//-/_}" '%s' "$2"
                shift 2
                ;;
            --xpk-flag)
                [[ ${2-} == --* ]] || wrong_call "$1 needs a flag of xpk, got '${2-}'"
                xpk_flags+=("$2")
                shift 2
                ;;
            --env)
                add_env "$@"
                shift 2
                ;;
            --flags)
                add_flags "$@"
                shift 2
                ;;
            --spot | --jobset)
                printf -v "${1#--}" '%s' yes
                shift
                ;;
            --dry-run)
                dry_run=yes
                shift
                ;;
            --help | -h)
                usage
                exit 0
                ;;
            --)
                arguments=("${@:2}")
                break
                ;;
            *) wrong_call "unknown argument '$1' (distilljax's own go after --)" ;;
        esac
    done
}

need() {
    local option variable
    for option; do
        variable=${option#--}
        [[ -n ${!variable} ]] || wrong_call "$command needs $option"
    done
}

check() {
    # Names of pods are longer, and end at 63 characters.
    [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || wrong_call "--name must be at most\
 40 lower-case letters, digits and dashes, got '$name'"
    [[ -n $jobset || $command == monitor ]] || need --cluster
    [[ $command == resume || $command == submit ]] || return 0
    need --image --workdir
    if [[ -n $jobset ]]; then
        need --accelerator --topology --hosts --claim
    else
        need --type
    fi
    ((slices)) || wrong_call "--slices must be 1 or more, got '$slices'"
    workdir=${workdir%/}
    [[ $workdir =~ ^/[A-Za-z0-9._-]+/[A-Za-z0-9._/-]+$ ]] || wrong_call "--workdir must be a\
 folder below the mounted storage, /mnt/runs/NAME say, got '$workdir'"
    local word
    for word in "$image" "$accelerator" "$topology" "$claim"; do
        [[ $word =~ ^[A-Za-z0-9._/:@-]*$ ]] || wrong_call \
            "--image, --accelerator, --topology and --claim must be plain names, got '$word'"
    done
    for word in "${environment[@]}"; do
        [[ -n $jobset || $word != *[\"\\[:cntrl:]]* ]] || wrong_call "--env through XPK must\
 hold no double quote, backslash or line break, got '$word': use --jobset"
    done
    ((${#arguments[@]})) || wrong_call "$command needs a distilljax command after --"
    for word in "${arguments[@]}"; do
        [[ $word != --workdir && $word != --workdir=* ]] \
            || wrong_call "give --workdir before the --: it is passed on"
    done
}

# What gcloud's tools say once may be old. So often they are asked before it is believed.
readonly PATIENCE=5

kube() { execute kubectl ${context:+--context="$context"} "$@"; }

# Sets `state` to ABSENT, QUEUED, RUNNING, COMPLETED or FAILED, `owner` to the value of
# our label, and `restarts`. A failure that is not "no such thing" says nothing of it.
describe() {
    state=ABSENT owner='' uid='' restarts=0
    [[ -z $dry_run ]] || return 0
    local answer rc=0 conditions
    answer=$(kube get jobset "$name" -o jsonpath='{.metadata.labels.distilljax}|'\
'{.metadata.uid}|{.status.restarts}|'\
'{range .status.conditions[?(@.status=="True")]}{.type} {end}|' \
        2>"$scratch/error") || rc=$?
    if ((rc)) && grep -qE 'NotFound|not found' "$scratch/error"; then return; fi
    if ((rc)) || [[ $answer != *'|'*'|'*'|'*'|' ]]; then
        say "the state of $name is unknown: $answer$(cat "$scratch/error")"
        state=UNKNOWN
        return "$((rc ? rc : 1))"
    fi
    IFS='|' read -r owner uid restarts conditions _ <<<"$answer"
    # An old answer: that one was seen to go.
    if [[ -n $gone && $uid == "$gone" ]]; then return; fi
    case " $conditions" in
        *' Completed '*) state=COMPLETED ;;
        *' Failed '*) state=FAILED ;;
        *' Suspended '*) state=QUEUED ;;
        *) state=RUNNING ;;
    esac
}

must_be_ours() {
    [[ $owner != launcher ]] || return 0
    say "$name was not created by this script (label distilljax=launcher is missing):" \
        "it is left alone. Choose another --name."
    return 2
}

submit() {
    local rc
    describe || return
    if [[ $state != ABSENT ]]; then
        must_be_ours || return
        if [[ $state == RUNNING || $state == QUEUED ]]; then
            say "$name is there, and $state"
            return
        fi
        say "$name is $state: deleting what is left of it"
        discard || return
    fi
    if [[ -n $jobset ]]; then
        create_jobset || return
    else
        create_workload || return
    fi
    appear || return
    [[ -z $jobset ]] || return 0
    kube label jobset "$name" distilljax=launcher && return
    rc=$?
    say "$name runs, and has not got our label: this script will leave it alone. Label" \
        "it: kubectl label jobset $name distilljax=launcher"
    return "$rc"
}

# Success is what the cluster lists, not what a tool returns.
appear() {
    local tries
    [[ -z $dry_run ]] || return 0
    for ((tries = 0; tries < PATIENCE; tries++)); do
        if describe && [[ $state != ABSENT ]]; then return; fi
        sleep "$poll_secs"
    done
    say "$name was created, says the tool, and is not there. Does kubectl speak to the" \
        "cluster? Its context is '${context:-$(kubectl config current-context)}'"
    return 1
}

# Kubernetes reads $(NAME) in words of a container, and $$ as a dollar.
create_workload() {
    local words variable own=()
    words=$(printf '%q ' scripts/stoppable.sh distilljax "${arguments[@]}" \
        --workdir "$workdir" --multihost)
    words="cd /distilljax && exec ${words% }"
    for variable in "${environment[@]}"; do own+=(--env="${variable//'$'/'$$'}"); done
    execute xpk workload create --cluster="$cluster" --workload="$name" \
        --tpu-type="$type" --num-slices="$slices" --docker-image="$image" \
        --command="${words//'$'/'$$'}" --max-restarts="$max_restarts" \
        --termination-grace-period-seconds="$grace_secs" ${spot:+--spot} \
        ${zone:+--zone="$zone"} ${project:+--project="$project"} \
        "${own[@]}" "${xpk_flags[@]}"
}

create_jobset() {
    if [[ -n $dry_run ]]; then
        echo "# kubectl create -f - reads:"
        render
        kube create -f -
        return
    fi
    render | kube create -f -
}

json() {
    local text=${1//\\/\\\\} i code
    text=${text//\"/\\\"}
    for ((i = 1; i < 32; i++)); do
        printf -v code '\\x%02x' "$i"
        printf -v code '%b' "$code"
        if [[ $text == *"$code"* ]]; then
            text=${text//"$code"/"$(printf '\\u%04x' "$i")"}
        fi
    done
    printf '"%s"' "$text"
}

render() {
    local text word mount words='' variables=''
    mount=/${workdir#/}
    mount=${mount%/*}
    while [[ $mount == /*/*/* ]]; do mount=${mount%/*}; done
    for word in distilljax "${arguments[@]}" --workdir "$workdir" --multihost; do
        words+=", $(json "${word//'$'/'$$'}")"
    done
    for word in "${environment[@]}"; do
        variables+=", {name: ${word%%=*}, value: $(json "${word#*=}" | sed 's/[$]/$$/g')}"
    done
    text=$(<"$here/jobset.yaml")
    text=${text//@NAME@/"$name"}
    text=${text//@MAX_RESTARTS@/"$max_restarts"}
    text=${text//@SLICES@/"$slices"}
    text=${text//@HOSTS@/"$hosts"}
    text=${text//@GRACE_SECS@/"$grace_secs"}
    text=${text//@NODES@/"{cloud.google.com/gke-tpu-accelerator: $accelerator,\
 cloud.google.com/gke-tpu-topology: $topology\
${spot:+, cloud.google.com/gke-spot: \"true\"}}"}
    text=${text//@IMAGE@/"$image"}
    text=${text//@CHIPS@/"$chips"}
    text=${text//@MOUNT@/"$mount"}
    text=${text//@CLAIM@/"$claim"}
    # Last of all: these hold words of yours.
    text=${text/@ENVIRONMENT@/"[${variables#, }]"}
    text=${text/@ARGUMENTS@/"[${words#, }]"}
    printf '%s\n' "$text"
}

# The code of a container that ended by itself and failed; empty if there is none.
own_failure() {
    local codes code
    codes=$(kube get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" -o \
        jsonpath='{range .items[*].status.containerStatuses[*]}'\
'{.state.terminated.exitCode} {end}' 2>"$scratch/error") || return 0
    for code in $codes; do
        case $code in
            0 | "$STOPPED_CODE" | 137 | 143) ;;
            *[!0-9]*) ;;
            *)
                echo "$code"
                return
                ;;
        esac
    done
}

monitor() {
    local said='' unknown=0 absent=0 rc code
    if [[ -n $dry_run ]]; then
        echo "# ask for the state of $name every $poll_secs seconds, until it has ended"
        return
    fi
    while true; do
        rc=0
        describe || rc=$?
        if ((rc)); then
            ((++unknown < PATIENCE)) || return "$rc"
        else
            unknown=0
            [[ "$state $restarts" == "$said" ]] \
                || printf '%s %s: %s, %s restarts\n' "$(date +%FT%T)" "$name" "$state" \
                    "${restarts:-0}"
            said="$state $restarts"
        fi
        case $state in
            COMPLETED) return 0 ;;
            FAILED)
                code=$(own_failure)
                if [[ -n $code ]]; then
                    say "a container ended with $code: not a preemption. See kubectl logs" \
                        "--selector=jobset.sigs.k8s.io/jobset-name=$name --prefix"
                    return "$code"
                fi
                say "$name ended before the run was done"
                return "$STOPPED_CODE"
                ;;
            ABSENT)
                if ((++absent >= PATIENCE)); then
                    say "$name is gone: whether the run was done, it can tell itself"
                    return "$STOPPED_CODE"
                fi
                ;;
            *) absent=0 ;;
        esac
        sleep "$poll_secs"
    done
}

resume() {
    local rc left=$retries
    while true; do
        rc=0
        submit && monitor || rc=$?
        ((rc == STOPPED_CODE)) || return "$rc"
        if ((left == 0)); then
            say "no retries are left"
            return "$rc"
        fi
        say "submitting $name again, $left retries left"
        ((left -= 1)) || true
        sleep "$poll_secs"
    done
}

# Never without the name: `xpk workload delete` would take every workload of the cluster.
discard() {
    local tries old=$uid
    if [[ -n $jobset ]]; then
        kube delete jobset "$name" || return
    else
        execute xpk workload delete --cluster="$cluster" --workload="$name" --force \
            ${zone:+--zone="$zone"} ${project:+--project="$project"} || return
    fi
    [[ -z $dry_run ]] || return 0
    for ((tries = 0; tries < PATIENCE; tries++)); do
        if describe && [[ $state == ABSENT ]]; then
            gone=$old
            return
        fi
        sleep "$poll_secs"
    done
    say "$name was deleted, says the tool, and is still there ($state)"
    return 1
}

remove() {
    describe || return
    if [[ -z $dry_run && $state == ABSENT ]]; then
        say "$name is not there"
    elif [[ -z $dry_run ]]; then
        must_be_ours && discard
    else
        discard
    fi
}

main() {
    parse "$@"
    check
    gone=''
    trap 'say "stopped: $name may still run, and be billed"; exit 130' INT
    if [[ -z $dry_run ]]; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
    fi
    case $command in
        delete) remove ;;
        *) "$command" ;;
    esac
}

main "$@"
