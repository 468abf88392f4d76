#!/usr/bin/env bash
# Submit a distilljax command to SLURM: a job that goes back into the queue when stopped.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib/launch.sh
source "$here/lib/launch.sh"

usage() {
    cat <<'EOF'
Submit a distilljax command to SLURM.

usage: scripts/slurm.sh [OPTION]... -- ARGUMENT...

options
  --nodes N           nodes, each with one process that owns its GPUs (default 1)
  --gpus N            GPUs of each node (default: none is asked for)
  --cpus N            cores of each node
  --time TIME         limit of one turn, as in sbatch --time
  --partition NAME    partition (default: the cluster's)
  --name NAME         name of the job (default distilljax)
  --output FILE       file of the output, as in sbatch --output
  --signal-secs N     SIGTERM so long before the end of the time (default 120): what the
                      run needs for the step it is in, and to save
  --retries N         times to go back into the queue after a stop (default 20)
  --sbatch-flag FLAG  another flag of sbatch, --account=me say; may be repeated
  --env NAME=VALUE    variable in the environment of the run; may be repeated
  --flags FILE        preset of compiler flags for the run, see scripts/flags
  --dry-run           print the command, and submit nothing
  --help              print this

The job runs scripts/slurm.sbatch, which runs scripts/gpu.sh, from this checkout. So the
checkout, with its .venv, and the working directory have to lie on storage that all
nodes share. The run gets SIGTERM before its time is over and when SLURM preempts it; it
saves, and the job is requeued under its own number. The next turn goes on from there.
A run that fails is not requeued. `squeue --me` shows the job, `scancel NUMBER` ends it.

Exit code: that of sbatch, 2 for a wrong call.

example
  scripts/slurm.sh --nodes 2 --gpus 8 --time 04:00:00 --partition PREEMPTIBLE \
      -- train configs/digits/all_data.py --workdir /shared/all_data \
      --teacher.workdir=/shared/teacher --mesh=data=16
EOF
}

parse() {
    nodes=1 gpus='' cpus='' time='' partition='' name=distilljax output=''
    signal_secs=120 retries=20 dry_run='' sbatch_flags=() arguments=()
    while (($#)); do
        if [[ $1 == --?*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
        fi
        case $1 in
            --time | --partition | --name | --output)
                need_value "$@"
                printf -v "${1#--}" '%s' "$2"
                shift 2
                ;;
            --nodes | --gpus | --cpus | --signal-secs | --retries)
                need_number "$@"
                local variable=${1#--}
                printf -v "${variable//-/_}" '%s' "$2"
                shift 2
                ;;
            --sbatch-flag)
                [[ ${2-} == -* ]] || wrong_call "$1 needs a flag of sbatch, got '${2-}'"
                sbatch_flags+=("$2")
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
    ((nodes)) || wrong_call "--nodes must be 1 or more, got '$nodes'"
    ((signal_secs)) || wrong_call "--signal-secs must be 1 or more: the run saves in it"
}

submit() {
    local checkout variable own=()
    checkout=$(dirname "$here")
    for variable in "${environment[@]}"; do own+=(--env "$variable"); done
    execute sbatch --job-name="$name" --nodes="$nodes" ${gpus:+--gpus-per-node="$gpus"} \
        ${cpus:+--cpus-per-task="$cpus"} ${time:+--time="$time"} \
        ${partition:+--partition="$partition"} ${output:+--output="$output"} \
        --chdir="$checkout" --signal="TERM@$signal_secs" "${sbatch_flags[@]}" \
        "$here/slurm.sbatch" "$checkout" "$retries" "${own[@]}" -- "${arguments[@]}"
}

parse "$@"
submit
