#!/usr/bin/env bash
# bash run.sh        sets up a virtual environment, then trains and compares SFT, SFT+, Implicit and Inverse
# bash run.sh test   sets up the same, then checks the style and runs the tests
# Safe to repeat: what is installed stays, and the main job continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")"

case "${1:-}" in
    "" | test) ;;
    *)
        echo "error: unknown argument $1; usage: bash run.sh [test [pytest options]]" >&2
        exit 2
        ;;
esac

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer; install one, or name it:" \
        "PYTHON=/path/to/python3.11 bash run.sh" >&2
    exit 1
fi
venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
    echo "error: $python has no venv module; on Debian: apt-get install python3-venv" >&2
    exit 1
fi

need="requirements.txt"
[ "${1:-}" = test ] && need="requirements.txt tests/requirements.txt"
for file in $need; do
    # A copy in the environment says what is installed.
    stamp="$venv/.$(echo "$file" | tr / -)"
    if ! cmp -s "$file" "$stamp"; then
        echo "installing $file"
        "$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$file"
        cp "$file" "$stamp"
    fi
done

if [ "${1:-}" = test ]; then
    shift
    "$venv/bin/ruff" format --quiet --check . || {
        echo "error: run $venv/bin/ruff format" >&2
        exit 1
    }
    "$venv/bin/ruff" check --quiet .
    exec "$venv/bin/python" -m pytest -q "$@"
fi
exec bash experiments/main_job.sh "$venv/bin"
