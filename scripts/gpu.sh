#!/usr/bin/env bash
# Run a distilljax command on the GPUs of one node or several: one process per node.
set -euo pipefail
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

usage() {
    cat <<'EOF'
Run a distilljax command on GPUs, one process per node with all GPUs of the node.

usage: scripts/gpu.sh [OPTION]... -- ARGUMENT...

where it runs
  under SLURM          on every node of the allocation, through srun
  with --hosts A,B,... on these hosts, through ssh; the first is the coordinator
  otherwise            here, on this node

options
  --hosts A,B,...   host names that ssh reaches without asking for anything
  --dir DIR         where the checkout lies on every host (default: where it lies here)
  --port PORT       free port of the coordinator (default 8476)
  --env NAME=VALUE  variable in the environment of the run; may be repeated
  --flags FILE      preset of compiler flags for the run, see scripts/flags
  --dry-run         print the commands, and execute nothing
  --help            print this

On several nodes the command gets --multihost with the address of the coordinator, the
number of processes and the id of the process, which this script finds. The working
directory has to be one that all nodes share. When one process fails, the others are
stopped. .venv/bin/distilljax of the checkout is used if it is there, else the one on
PATH; `scripts/setup_vm.sh cuda` makes it.

Exit code: 0 when every process ended well, 2 for a wrong call, otherwise that of the
process that failed first.

example
  scripts/gpu.sh --hosts node1,node2 \
      -- train configs/digits/all_data.py --workdir /shared/all_data \
      --teacher.workdir=/shared/teacher --mesh=data=16
EOF
}

parse() {
    hosts=() dir='' port=8476 dry_run='' arguments=()
    while (($#)); do
        if [[ $1 == --?*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
        fi
        case $1 in
            --hosts)
                [[ ${2-} =~ ^[A-Za-z0-9._@-]+(,[A-Za-z0-9._@-]+)*$ && ${2-} != -* ]] \
                    || wrong_call "--hosts needs host names with commas between, got '${2-}'"
                IFS=, read -r -a hosts <<<"$2"
                shift 2
                ;;
            --dir)
                [[ -n ${2-} ]] || wrong_call "--dir needs a directory"
                dir=$2
                shift 2
                ;;
            --port)
                [[ ${2-} =~ ^[0-9]+$ ]] || wrong_call "--port needs a number, got '${2-}'"
                port=$2
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
    ((${#arguments[@]})) || wrong_call "a distilljax command is needed after --"
}

# The last command takes the place of this script, so that a signal reaches it.
hand_over() {
    if [[ -n $dry_run ]]; then
        execute "$@"
    else
        exec "$@"
    fi
}

run_here() {
    cd "$dir"
    find_program
    hand_over "${program[@]}" "${arguments[@]}"
}

# Sets `program` to the words that start distilljax, in the environment it is to have.
find_program() {
    program=(distilljax)
    [[ ! -x $dir/.venv/bin/distilljax ]] || program=("$dir/.venv/bin/distilljax")
    ((${#environment[@]} == 0)) || program=(env "${environment[@]}" "${program[@]}")
}

# jax finds its place under SLURM by itself, but takes one process per GPU for granted
# and would use the first GPU of each node alone. So it is told its place, and does not
# see the variable from which it would choose a GPU.
run_under_slurm() {
    local nodes=$SLURM_JOB_NUM_NODES coordinator=FIRST_NODE
    local step=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1)
    cd "$dir"
    find_program
    step+=(--kill-on-bad-exit=1)
    if ((nodes == 1)); then
        hand_over "${step[@]}" "${program[@]}" "${arguments[@]}"
        return
    fi
    if [[ -z $dry_run ]]; then
        coordinator=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        coordinator=${coordinator%%$'\n'*}
    fi
    # shellcheck disable=SC2016  # SLURM_PROCID has its value in the processes only
    hand_over "${step[@]}" bash -c \
        'unset SLURM_LOCALID; exec "$@" --process-id "$SLURM_PROCID"' distilljax \
        "${program[@]}" "${arguments[@]}" \
        --multihost --coordinator "$coordinator:$port" --num-processes "$nodes"
}

# Words for the shell of another host, whichever it is: %q of printf would write control
# characters as only bash reads them.
quoted() {
    local word escaped="'\\''"
    for word; do
        printf " '%s'" "${word//\'/"$escaped"}"
    done
}

remote_command() {
    local words=("${arguments[@]}") start=(distilljax)
    ((${#environment[@]} == 0)) || start=(env "${environment[@]}" distilljax)
    if ((${#hosts[@]} > 1)); then
        words+=(--multihost --coordinator "${hosts[0]#*@}:$port")
        words+=(--num-processes "${#hosts[@]}" --process-id "$1")
    fi
    printf "cd%s && PATH=\"\$PWD/.venv/bin:\$PATH\" exec" "$(quoted "$dir")"
    quoted "${start[@]}" "${words[@]}"
}

run_over_ssh() {
    local i words ids=() rc
    for i in "${!hosts[@]}"; do
        # -tt: a terminal over there, so that the process ends when its ssh does.
        words=(ssh -tt -o BatchMode=yes "${hosts[i]}" "$(remote_command "$i")")
        if [[ -n $dry_run ]]; then
            execute "${words[@]}"
        else
            "${words[@]}" </dev/null &
            ids+=($!)
        fi
    done
    trap 'kill "${ids[@]}" 2>/dev/null; exit 130' INT TERM
    # In the order in which they end: the first failure stops the others.
    for i in "${!ids[@]}"; do
        rc=0
        wait -n || rc=$?
        if ((rc)); then
            kill "${ids[@]}" 2>/dev/null || true
            wait
            return "$rc"
        fi
    done
}

main() {
    parse "$@"
    [[ -n $dir ]] || dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if ((${#hosts[@]})); then
        run_over_ssh
    elif [[ -n ${SLURM_JOB_ID-} ]]; then
        run_under_slurm
    else
        run_here
    fi
}

main "$@"
