#!/usr/bin/env bash
# bash run.sh        sets up a virtual environment and runs the main job: SFT, SFT+ and both reflections on the household
# bash run.sh test   sets up the same and runs the tests
# Safe to repeat: what is installed stays, and the main job continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")"
case "${1:-}" in ""|test) ;; *) echo "error: unknown argument $1; usage: bash run.sh [test [pytest options]]" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: $python is not Python 3.11 or newer; install one, or name it: PYTHON=/path/to/python3.11 bash run.sh" >&2; exit 1; }
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    echo "error: $python has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
need="requirements.txt"
[ "${1:-}" = test ] && need="requirements.txt tests/requirements.txt"
for file in $need; do
    stamp="$venv/.$(echo "$file" | tr / -)"
    cmp -s "$file" "$stamp" || { echo "installing $file"; "$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$file"; cp "$file" "$stamp"; }
done
if [ "${1:-}" = test ]; then shift; exec "$venv/bin/python" -m pytest -q tests "$@"; fi
exec bash experiments/main_job.sh "$venv/bin"
