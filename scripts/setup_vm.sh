#!/usr/bin/env bash
# Install distilljax from this checkout, in its .venv, on a machine that has nothing yet:
#
#   scripts/setup_vm.sh tpu      (or cuda, or nothing for the CPU)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="train,report${1:+,$1}"

# Images of TPU VMs may have an older Python only, or one without ensurepip; uv, a package
# like any other, brings a newer one.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=
    for candidate in python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [[ -n $python ]]; then
        "$python" -m venv .venv
    else
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --clear --seed --python 3.12 .venv
    fi
fi

pins=$(.venv/bin/python -c \
    'import sys; print("py311" if sys.version_info < (3, 12) else "py312")')
.venv/bin/python -m pip install --quiet -c "constraints/$pins.txt" -e ".[$extras]"
