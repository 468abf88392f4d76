# shellcheck shell=bash disable=SC2034,SC2154  # the variables are of the script that sources it
# A TPU slice as gcloud shows it, or several that one queued resource holds: its state,
# how it is made and unmade, and commands on all of its workers. For tpu_vm.sh, whose
# variables these functions read.

# States on the way to READY, and states from which no way leads there.
readonly COMING='ACCEPTED|CREATING|WAITING_FOR_RESOURCES|PROVISIONING|STARTING|RESTARTING'
readonly LOST='SUSPENDING|SUSPENDED|DELETING|PREEMPTED|TERMINATED|STOPPING|STOPPED'
# What gcloud says once may be old. So often it is asked before it is believed.
readonly PATIENCE=5
readonly MEGASCALE_PORT=8081

cloud() {
    execute gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"} \
        --quiet
}

tpu_vm() { cloud tpu-vm "$@"; }

# Sets `answer`, empty if there is no such thing. A failure that is not "no such thing"
# (no network, no rights) says nothing of the state, and must not be taken for a
# preemption; nor must a success that comes without an answer.
ask() {
    local rc=0
    answer=$(cloud "$1" describe "$2" --format="value($3)" 2>"$scratch/error") || rc=$?
    if ((rc == 0)) && [[ -n $answer ]]; then return; fi
    answer=''
    if ((rc)) && grep -qE 'NOT_FOUND|not found' "$scratch/error"; then return; fi
    say "the state of $2 is unknown: $(cat "$scratch/error")"
    state=UNKNOWN
    return "$((rc ? rc : 1))"
}

# Sets `state` to READY, PREEMPTED, ... or ABSENT, `owner` to the value of our label,
# `nodes` to the names of the slices and `hosts` to the number of their workers.
describe() {
    state=ABSENT owner='' hosts=0
    name_nodes
    [[ -z $dry_run ]] || return 0
    if [[ -n $queued ]]; then
        describe_queued
        return
    fi
    ask tpu-vm "$name" 'state,networkEndpoints.len(),labels.distilljax' || return
    [[ -z $answer ]] || read -r state hosts owner <<<"$answer"
}

# The slices of a request for several are numbered by gcloud.
name_nodes() {
    local i
    nodes=("$name")
    if ((slices > 1)); then
        nodes=()
        for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
    fi
}

# A request may be ACTIVE for a while after its slices are gone, and before they answer:
# it counts as READY when each of them says so itself.
describe_queued() {
    local ids node found count
    ask queued-resources "$name" "state.state,tpu.nodeSpec[].nodeId.list(separator=','),\
tpu.nodeSpec[0].node.labels.distilljax" || return
    [[ -n $answer ]] || return 0
    read -r state ids owner <<<"$answer"
    [[ -z $ids || $ids == None ]] || IFS=, read -r -a nodes <<<"$ids"
    [[ $state == ACTIVE ]] || return 0
    state=READY
    for node in "${nodes[@]}"; do
        ask tpu-vm "$node" 'state,networkEndpoints.len()' || return
        read -r found count <<<"${answer:-MISSING 0}"
        ((hosts += count)) || true
        [[ $found == READY || $state != READY ]] || state=$found
    done
}

must_be_ours() {
    [[ $owner != launcher ]] || return 0
    say "$name was not created by this script (label distilljax=launcher is missing):" \
        "it is left alone. Choose another --name."
    foreign=yes
    return 2
}

create() {
    describe || return
    if [[ $state != ABSENT ]]; then
        must_be_ours || return
        if [[ $state == READY && -z $unreachable ]]; then
            say "$name is there and ready"
            return
        fi
        if [[ -n $queued && -z $unreachable && $state =~ ^($COMING)$ ]]; then
            say "$name was requested before"
            wait_until_ready
            return
        fi
        say "$name is ${unreachable:-$state}: creating it anew"
        discard || return
    fi
    unreachable=''
    if [[ -n $queued ]]; then
        request && wait_until_ready && empty=yes
    else
        tpu_vm create "$name" --accelerator-type="$type" --version="$version" \
            --labels=distilljax=launcher ${spot:+--spot} "${create_flags[@]}" \
            && state=READY empty=yes
    fi
}

request() {
    local how=(--node-id="$name")
    ((slices == 1)) || how=(--node-count="$slices" --node-prefix="$name")
    cloud queued-resources create "$name" "${how[@]}" --accelerator-type="$type" \
        --runtime-version="$version" --labels=distilljax=launcher ${spot:+--spot} \
        "${create_flags[@]}"
}

# Bounded by --queue-secs. A request that was granted and lost on the way counts as
# created, so that it is made again; one that failed, or never appeared, does not.
wait_until_ready() {
    local start=$SECONDS said='' unknown=0 absent=0 rc
    if [[ -n $dry_run ]]; then
        echo "# wait until $name is ACTIVE and its slices are READY"
        return
    fi
    while true; do
        rc=0
        describe || rc=$?
        if ((rc)); then
            ((++unknown < PATIENCE)) || return "$rc"
        elif [[ $state == READY ]]; then
            return 0
        elif [[ $state == ABSENT || $state == MISSING ]]; then
            # After a success of gcloud: its lists may lag behind, but not for long.
            if ((++absent >= PATIENCE)); then
                say "$name is $state, although gcloud said that it was created"
                [[ $state == ABSENT ]] || created=yes
                return 1
            fi
        elif [[ $state == FAILED ]]; then
            say "the request for $name failed, and gets no TPUs. Its state in full:"
            cloud queued-resources describe "$name" --format='yaml(state)' >&2 || true
            return 1
        elif [[ $state =~ ^($LOST)$ ]]; then
            say "$name is $state"
            created=yes
            return 1
        else
            unknown=0 absent=0
        fi
        [[ $state == "$said" ]] || say "$name is $state"
        said=$state
        if ((SECONDS - start >= queue_secs)); then
            say "$name is $state after $queue_secs seconds (--queue-secs): it keeps its" \
                "place in the queue, and the same command waits on"
            out_of_time=yes
            return "$STOPPED_CODE"
        fi
        sleep "$poll_secs"
    done
}

# A slice that calls itself READY may not let us in yet, or be gone already.
reach() {
    [[ -n $queued && -z $dry_run ]] || return 0
    local tries=0
    while true; do
        describe || return
        [[ $state == READY ]] || return 1
        if on_all_workers true; then
            reached=yes
            return
        fi
        if ((++tries >= PATIENCE)); then
            say "$name is READY by its state, and cannot be reached"
            # One that was never reached may be behind a wall of ours: it is kept.
            [[ -z $reached ]] || unreachable=unreachable
            return 255
        fi
        sleep "$poll_secs"
    done
}

# What is asked to go is looked after until it is gone: it costs as long as it is there.
discard() {
    if [[ -z $queued ]]; then
        tpu_vm delete "$name"
        return
    fi
    local tries node gone=("${nodes[@]}")
    cloud queued-resources delete "$name" --force || return
    [[ -z $dry_run ]] || return 0
    for ((tries = 0; tries < PATIENCE; tries++)); do
        describe || return
        for node in "${gone[@]}"; do
            [[ $state == ABSENT ]] || break
            ask tpu-vm "$node" state || return
            [[ -z $answer ]] || state="$node is $answer"
        done
        [[ $state != ABSENT ]] || return 0
        sleep "$poll_secs"
    done
    say "$name was deleted, says gcloud, and is still there ($state). It may be billed:" \
        "look at \`gcloud compute tpus tpu-vm list --zone $zone\`"
    return 1
}

remove() {
    describe || return
    if [[ -n $dry_run ]]; then
        discard
    elif [[ $state == ABSENT ]]; then
        say "$name is not there"
    else
        must_be_ours && discard
    fi
}

# Says what changes, until the slice is gone or no request can bring it.
watch_state() {
    local said='' unknown=0 rc
    if [[ -n $dry_run ]]; then
        echo "# ask for the state of $name every $poll_secs seconds, until it is gone"
        return
    fi
    while true; do
        rc=0
        describe || rc=$?
        if ((rc)); then
            ((++unknown < PATIENCE)) || return "$rc"
        else
            unknown=0
        fi
        if [[ $state != "$said" ]]; then
            printf '%s %s: %s, %s workers of %s\n' "$(date +%FT%T)" "$name" "$state" \
                "$hosts" "${nodes[*]}"
        fi
        said=$state
        [[ ! $state =~ ^(ABSENT|FAILED|SUSPENDED|PREEMPTED|TERMINATED)$ ]] || return 0
        sleep "$poll_secs"
    done
}

# Calls `FUNCTION NUMBER WORD` for each slice, at once. The first failure stops the
# others: a process that is left alone waits for them.
on_each_slice() {
    if ((${#nodes[@]} == 1)); then
        "$1" 0 "$2"
        return
    fi
    # A subshell: the traps are for these processes. Each leads a group of its own (-m),
    # since what gcloud starts would outlive it, and hold the output open.
    (
        ids=()
        [[ -n $dry_run ]] || set -m
        trap 'stop_groups "${ids[@]}"; exit 130' INT TERM
        for i in "${!nodes[@]}"; do
            if [[ -n $dry_run ]]; then
                "$1" "$i" "$2"
            else
                "$1" "$i" "$2" </dev/null &
                ids+=($!)
            fi
        done
        for i in "${!ids[@]}"; do
            rc=0
            wait -n || rc=$?
            if ((rc)); then
                stop_groups "${ids[@]}"
                wait
                exit "$rc"
            fi
        done
    )
}

stop_groups() {
    local id
    for id; do kill -- "-$id" 2>/dev/null || true; done
}

# The command finds the number of its slice in $slice, where there are several.
on_slice() {
    local command=$2
    ((${#nodes[@]} == 1)) || command="slice=$1; $command"
    tpu_vm ssh "${nodes[$1]}" --worker=all --command="$command"
}

to_slice() { tpu_vm scp "$2" "${nodes[$1]}:distilljax.tar.gz" --worker=all; }

on_all_workers() { on_each_slice on_slice "$1"; }

send_to_all_workers() { on_each_slice to_slice "$1"; }

# What libtpu and jax have to know where there are several slices. Google's platform puts
# it in the metadata of slices that were requested together; where it did not, it is set.
join_slices() {
    local address=FIRST_WORKER
    if [[ -z $dry_run ]]; then
        ask tpu-vm "${nodes[0]}" 'networkEndpoints[0].ipAddress' || return
        address=$answer
    fi
    printf '%s' "curl -s -H Metadata-Flavor:Google http://metadata.google.internal/\
computeMetadata/v1/instance/attributes/tpu-env | grep -q ^MEGASCALE_NUM_SLICES || export \
MEGASCALE_COORDINATOR_ADDRESS=$address:$MEGASCALE_PORT MEGASCALE_NUM_SLICES=${#nodes[@]} \
MEGASCALE_SLICE_ID=\$slice MEGASCALE_PORT=$MEGASCALE_PORT; "
}
