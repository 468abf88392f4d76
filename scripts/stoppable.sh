#!/usr/bin/env bash
# Run a distilljax command where a scheduler decides by the exit code what happens next.
set -euo pipefail
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

usage() {
    cat <<'EOF'
Run a command that trains, and tell by the exit code whether it is finished.

usage: scripts/stoppable.sh COMMAND [ARGUMENT]...

`distilljax train` that is told to stop saves, says so, and ends with 0, as it does when
it is finished. A scheduler that looks at the code alone would never start it again.
Here its output is read as well: exit code 75 when it was stopped before its end and may
be run again, otherwise the code of the command. SIGTERM and SIGINT are handed on to it.

example
  scripts/stoppable.sh distilljax train configs/digits/teacher.py --workdir runs/teacher
EOF
}

main() {
    local rc folder child tees=()
    case ${1-} in
        --help | -h)
            usage
            exit 0
            ;;
        '' | -*) wrong_call "a command is needed, got '${1-}'" ;;
    esac
    folder=$(mktemp -d)
    # shellcheck disable=SC2064  # the name as it is now
    trap "rm -rf '$folder'" EXIT
    # Both streams, each to where it was. A signal for all processes must not end tee
    # before the run has said that it saved.
    mkfifo "$folder/out" "$folder/err"
    (trap '' TERM INT && exec tee "$folder/said_out" <"$folder/out") &
    tees+=($!)
    (trap '' TERM INT && exec tee "$folder/said_err" <"$folder/err" >&2) &
    tees+=($!)
    "$@" >"$folder/out" 2>"$folder/err" &
    child=$!
    signalled=''
    trap 'signalled=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT
    # A signal ends the wait, not the child: its code comes with the next one.
    while true; do
        rc=0
        wait "$child" || rc=$?
        [[ -n $signalled ]] || break
        signalled=''
    done
    wait "${tees[@]}" || true # for what is left of its output
    if ((rc == 0)) && grep -qE "$STOPPED" "$folder"/said_*; then
        say "the run was told to stop before its end, and saved"
        rc=$STOPPED_CODE
    fi
    return "$rc"
}

main "$@"
