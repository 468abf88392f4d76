# shellcheck shell=bash
# What the launchers share: they source this file first.

launcher=$(basename "$0")

# What `distilljax train` prints when it was told to stop: it has saved then, and ends
# with exit code 0 like a run that is finished. Launchers give that a code of its own.
# shellcheck disable=SC2034  # used by the scripts that source this file
readonly STOPPED='stopped (and saved at step|after) [0-9]+ of [0-9]+' STOPPED_CODE=75

say() { printf '%s: %s\n' "$launcher" "$*" >&2; }

wrong_call() {
    say "$1"
    say "see scripts/$launcher --help"
    exit 2
}

need_value() { (($# > 1)) && [[ -n $2 ]] || wrong_call "$1 needs a value"; }

need_number() {
    [[ ${2-} =~ ^(0|[1-9][0-9]{0,8})$ ]] || wrong_call "$1 needs a whole number, got '${2-}'"
}

# Everything that acts goes through here, so that --dry-run can print all of it.
execute() {
    if [[ -n ${dry_run-} ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# The environment of the command that is launched: words NAME=VALUE.
environment=()

add_env() {
    [[ ${2-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] \
        || wrong_call "$1 must be NAME=VALUE, got '${2-}'"
    environment+=("$2")
}

# Adds the variables of a preset in scripts/flags. Such a file can be sourced, but is
# only read here: a line is a comment or adds one flag.
add_flags() {
    local file=${2-} number=0 line tpu='' xla=''
    local flag='^(LIBTPU_INIT_ARGS|XLA_FLAGS)\+=" (--[A-Za-z0-9_]+=[A-Za-z0-9_.,:-]+)"$'
    [[ -f $file ]] \
        || wrong_call "$1 must be a file, got '$file': see scripts/flags for presets"
    while IFS= read -r line || [[ -n $line ]]; do
        ((number += 1))
        [[ -n $line && $line != '#'* ]] || continue
        [[ $line =~ $flag ]] || wrong_call \
            "$file:$number must be a comment or NAME+=\" --flag=value\", got '$line'"
        case ${BASH_REMATCH[1]} in
            XLA_FLAGS) xla+=" ${BASH_REMATCH[2]}" ;;
            *) tpu+=" ${BASH_REMATCH[2]}" ;;
        esac
    done <"$file"
    [[ -z $tpu ]] || environment+=("LIBTPU_INIT_ARGS=${tpu# }")
    [[ -z $xla ]] || environment+=("XLA_FLAGS=${xla# }")
}
