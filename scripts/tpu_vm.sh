#!/usr/bin/env bash
# Run a distilljax command on every worker of a TPU VM slice, and bring the result home.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib/launch.sh
source "$here/lib/launch.sh"
# shellcheck source=scripts/lib/tpu.sh
source "$here/lib/tpu.sh"

usage() {
    cat <<'EOF'
Run a distilljax command on a TPU VM slice, or on several that one request brings.

usage: scripts/tpu_vm.sh [COMMAND] --name NAME --zone ZONE [OPTION]... [-- ARGUMENT...]

commands
  all      (default) create, setup, run, copy, and delete if --delete is given
  create   create the slice, or find it ready if this script made it before; with
           --queued, request it and wait until it is there
  wait     wait for what was requested
  setup    send this checkout to every worker and install it there
  run      run `distilljax ARGUMENT... --workdir DIR --multihost` on every worker
  watch    print the state whenever it changes, until the slice is gone
  copy     copy the working directory back here from worker 0
  delete   delete the slice

options
  --name NAME        name of the slice
  --zone ZONE        zone of the slice
  --type TYPE        accelerator type, for create
  --version VERSION  runtime version, for create; the names in your zone are listed by
                     `gcloud compute tpus tpu-vm versions list --zone ZONE`
  --project PROJECT  project (default: the one gcloud is set to)
  --spot             create a spot slice: cheaper, and may be preempted at any time
  --queued           request the slice as a queued resource, which waits its turn
  --slices N         with --queued: so many slices, joined into one run (default 1)
  --queue-secs N     with --queued: how long to wait for the turn (default 86400)
  --poll-secs N      pause between two questions about the state (default 30)
  --create-flag F    a flag of gcloud's for create, --reserved say; may be repeated
  --workdir DIR      working directory of the run. Relative: in the checkout, on the
                     worker and here alike, and copied from there to here. Absolute:
                     on storage that is mounted on the workers, where it stays
  --prepare COMMAND  shell command that setup runs in the checkout on every worker, to
                     mount that storage; must be harmless when it runs again
  --env NAME=VALUE   variable in the environment of the run; may be repeated
  --flags FILE       preset of compiler flags for the run, see scripts/flags
  --retries N        times to start again after a preemption or a stop (default 3)
  --wait-secs N      pause before starting again, and before asking for the state of a
                     slice on which a run was stopped, killed or cut off (default 30)
  --delete           let `all` delete the slice at its end, also when the run failed,
                     but never before the working directory was copied
  --dry-run          print the commands, and execute nothing
  --help             print this

Preemption: when the slice is no longer READY, it is deleted, created and set up again,
and the same command runs again; so it does when the run was told to stop, saved, and
the slice is still there. Training goes on from its working directory, so that has to
outlive the slice. An absolute path on shared storage (Filestore or other NFS, or a
bucket mounted with gcsfuse) does, and a slice of several hosts always needs one, since
each host writes its own part of a checkpoint. A relative path is for a slice of one
host: what can still be reached is copied here before the slice is deleted, and sent to
the new one. What was not copied in time is lost.

Queued: the request waits until there are TPUs for it, and is READY when it is ACTIVE
and each of its slices is READY. If the wait is cut short, here or by --queue-secs, it
keeps its place, and the same command waits on. --slices 2 brings NAME-0 and NAME-1.

Only what this script created is deleted: it carries the label distilljax=launcher, and
a slice or request of the same name without it is left alone.

Exit code: 0 when everything went well, 2 for a wrong call, 75 when the run was stopped
before its end, or waited for too long, and may be run again, otherwise that of the
command that failed.

example
  scripts/tpu_vm.sh --name distil --zone us-central2-b --type v4-32 --version VERSION \
      --spot --delete --workdir /mnt/runs/all_data --prepare 'sudo mkdir -p /mnt/runs
          mountpoint -q /mnt/runs || sudo mount SERVER:/share /mnt/runs' \
      -- train configs/digits/all_data.py --teacher.workdir=/mnt/runs/teacher \
      --mesh="data=16"
EOF
}

parse() {
    command=all name='' zone='' type='' version='' project='' workdir='' prepare=''
    spot='' queued='' slices=1 queue_secs=86400 poll_secs=30 create_flags=()
    retries=3 wait_secs=30 delete='' dry_run='' arguments=()
    case ${1-} in
        create | wait | setup | run | watch | copy | delete | all)
            command=$1
            shift
            ;;
    esac
    while (($#)); do
        if [[ $1 == --?*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
        fi
        case $1 in
            --name | --zone | --type | --version | --project | --workdir | --prepare)
                need_value "$@"
                printf -v "${1#--}" '%s' "$2"
                shift 2
                ;;
            --slices | --retries | --wait-secs | --queue-secs | --poll-secs)
                need_number "$@"
                local variable=${1#--}
                printf -v "${variable//-/_}" '%s' "$2"
                shift 2
                ;;
            --create-flag)
                [[ ${2-} == --* ]] || wrong_call "$1 needs a flag of gcloud, got '${2-}'"
                create_flags+=("$2")
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
            --spot | --queued | --delete)
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

check() {
    [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || wrong_call \
        "--name must be lower-case letters, digits and dashes, got '$name'"
    [[ -n $zone ]] || wrong_call "--zone is required"
    ((slices)) || wrong_call "--slices must be 1 or more, got '$slices'"
    [[ $slices == 1 || -n $queued ]] || wrong_call \
        "--slices $slices needs --queued: slices that are joined are requested together"
    if [[ $command == all || $command == create ]]; then
        [[ -n $type ]] || wrong_call "$command needs --type"
        [[ -n $version ]] || wrong_call "$command needs --version"
    fi
    if [[ $command == all || $command == run || $command == copy ]]; then
        [[ -n $workdir ]] || wrong_call "$command needs --workdir"
        [[ $workdir != *://* ]] || wrong_call "--workdir must be a path, got '$workdir':\
 mount the bucket on the workers (--prepare), and give the path where it is mounted"
        workdir=${workdir%/}
        # The path is read by two shells and by scp, each with its own rules of quoting.
        [[ $workdir =~ ^[A-Za-z0-9._/-]*[A-Za-z0-9_-]$ && $workdir != -* ]] || wrong_call \
            "--workdir must hold only letters, digits and . _ / -, got '$workdir'"
    fi
    if [[ $command == all || $command == run ]]; then
        ((${#arguments[@]})) || wrong_call "$command needs a distilljax command after --"
        local argument
        for argument in "${arguments[@]}"; do
            [[ $argument != --workdir && $argument != --workdir=* ]] || wrong_call \
                "give --workdir before the --: it is passed on, and says what to copy"
        done
    fi
}

# The working tree as it is: committed or not, but nothing that git ignores.
pack() {
    if [[ -n $dry_run ]]; then
        echo "# pack the files that git does not ignore into $archive"
        return
    fi
    local path
    git ls-files -z --cached --others --exclude-standard \
        | while IFS= read -r -d '' path; do
            if [[ -e $path ]]; then printf '%s\0' "$path"; fi
        done \
        | tar -czf "$archive" --null -T -
}

setup() {
    pack \
        && reach \
        && send_to_all_workers "$archive" \
        && on_all_workers "mkdir -p distilljax && tar -xzf distilljax.tar.gz -C distilljax \
&& bash distilljax/scripts/setup_vm.sh tpu" \
        && if [[ -n $prepare ]]; then on_all_workers "cd distilljax || exit; $prepare"; fi
}

on_mount() { [[ $workdir == /* ]]; }

# A run whose checkpoints would be lost, or torn between hosts, does not start.
check_storage() {
    if on_mount; then
        on_all_workers "mkdir -p $workdir || exit 2; \
if [ \"\$(stat -c %d $workdir)\" = \"\$(stat -c %d /)\" ]; then \
echo '$workdir is on the boot disk and would be lost with the slice:' \
'mount shared storage there (--prepare), or give a relative path' >&2; exit 2; fi"
        return
    fi
    describe || return
    if ((hosts > 1)) || ((${#nodes[@]} > 1)); then
        say "$name has $hosts hosts, and each writes its part of a checkpoint: --workdir" \
            "must be an absolute path on storage that all of them share, got '$workdir'"
        return 2
    fi
}

# Both ways of the copy end in a folder beside the target: one that is cut off must not
# be taken for the state of a run.
incoming() { echo "$(dirname "$1")/.incoming-$(basename "$1")"; }

# What is on the worker already is newer than what was copied from it.
send_back() {
    ! on_mount && [[ -d $workdir ]] || return 0
    local there=distilljax/$workdir beside rc=0 present=73
    beside=$(incoming "$there")
    on_all_workers "if [ -e $there ]; then exit $present; fi; \
rm -rf $beside && mkdir -p $beside" || rc=$?
    ((rc != present)) || return 0
    ((rc == 0)) || return "$rc"
    tpu_vm scp "$workdir" "$name:$beside/" --recurse --worker=0 \
        && on_all_workers "mv $beside/$(basename "$workdir") $there && rmdir $beside"
}

run() {
    local quoted words
    quoted=$(printf '%q ' .venv/bin/distilljax "${arguments[@]}" --workdir "$workdir" \
        --multihost)
    ((${#environment[@]} == 0)) || quoted="env $(printf '%q ' "${environment[@]}")$quoted"
    words="cd distilljax && exec ${quoted% }"
    check_storage && send_back || return
    if ((${#nodes[@]} > 1)); then words=$(join_slices)$words || return; fi
    empty=''
    if [[ -n $dry_run ]]; then
        on_all_workers "$words"
        return
    fi
    on_all_workers "$words" | tee "$scratch/output" || return
    if grep -qE "$STOPPED" "$scratch/output"; then
        say "the run was told to stop before its end, and saved"
        return "$STOPPED_CODE"
    fi
}

copy() {
    if on_mount; then
        say "the working directory stays on its storage: $workdir"
        return
    fi
    local beside rc=0
    beside=$(incoming "$workdir")
    execute rm -rf "$beside" \
        && execute mkdir -p "$beside" \
        && tpu_vm scp "$name:distilljax/$workdir" "$beside/" --recurse --worker=0 \
        && execute mkdir -p "$workdir" \
        && execute cp -R "$beside/$(basename "$workdir")/." "$workdir" || rc=$?
    execute rm -rf "$beside"
    return "$rc"
}

# A relative working directory goes with its slice, unless it is brought home in time.
rescue() {
    [[ -z $empty ]] && ! on_mount || return 0
    say "copying what $name still has"
    copy || say "nothing could be copied: the run goes on from what was copied before"
}

attempt() { create && created=yes && setup && run; }

# `if cmd; then ...; fi; rc=$?` always reads 0: the code is caught where it arises.
attempt_and_retry() {
    local rc unknown left=$retries
    while true; do
        rc=0 unknown=0
        attempt || rc=$?
        # What could not be created even once is no preemption.
        [[ -n $created && -z $dry_run && -z $out_of_time ]] || return "$rc"
        # Told to stop: the slice may be about to go.
        ((rc != STOPPED_CODE)) || rescue
        # Stopped, killed, or cut off (255 is ssh's own code): the state may lag behind.
        ((rc < 128 && rc != STOPPED_CODE)) || sleep "$wait_secs"
        describe || unknown=$?
        ((unknown == 0)) || return "$((rc ? rc : unknown))"
        if [[ $state == READY ]] && ((rc == 0)); then
            return 0
        fi
        # A slice that was lost may call itself READY for a while.
        if [[ $state == READY ]] && ((rc == 255)) && ! reach && [[ -n $unreachable ]]; then
            state=$unreachable
        fi
        if [[ $state == READY ]] && ((rc != STOPPED_CODE)); then
            say "exit code $rc, and $name is READY: not a preemption"
            return "$rc"
        fi
        # 0 from a slice that is gone: whether the run was finished, it can tell itself.
        ((rc == STOPPED_CODE)) || rescue
        ((rc)) || rc=$STOPPED_CODE
        if ((left == 0)); then
            say "$name is $state, and no retries are left"
            return "$rc"
        fi
        say "$name is $state: starting again, $left retries left"
        ((left -= 1)) || true
        sleep "$wait_secs"
    done
}

all() {
    local rc=0 end=0
    attempt_and_retry || rc=$?
    [[ -z $foreign ]] || return "$rc"
    if [[ -n $dry_run || ($state == READY && -z $empty) ]]; then
        copy || end=$?
    elif [[ $state == UNKNOWN ]]; then
        end=$rc # the slice may hold what was not copied
    fi
    if ((end == 0)) && [[ -n $delete && -z $out_of_time ]]; then
        remove || end=$?
    elif [[ $state != ABSENT ]]; then
        say "$name is kept, and is billed until you run: scripts/tpu_vm.sh delete" \
            "--name $name --zone $zone${project:+ --project $project}${queued:+ --queued}"
    fi
    ((rc)) || rc=$end
    return "$rc"
}

main() {
    parse "$@"
    check
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    state=ABSENT owner='' hosts=0 foreign='' created='' empty='' archive=distilljax.tar.gz
    out_of_time='' reached='' unreachable=''
    name_nodes
    trap 'say "stopped: $name may still run, and be billed"; exit 130' INT
    if [[ -z $dry_run ]]; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        archive=$scratch/distilljax.tar.gz
    fi
    case $command in
        delete) remove ;;
        wait) wait_until_ready ;;
        watch) watch_state ;;
        setup | run | copy)
            # The names of several slices are asked for.
            if [[ -n $queued ]]; then describe || return; fi
            "$command"
            ;;
        *) "$command" ;;
    esac
}

main "$@"
