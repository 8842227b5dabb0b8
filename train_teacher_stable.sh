#!/bin/sh
# Train the teacher under the stable settings; arguments go to `python -m fastguard.train`.
# Makes .venv beside this file if there is none. PYTHON chooses the interpreter for that.
set -eu
cd "$(dirname "$0")"
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
if ! .venv/bin/python -c "import fastguard" 2>/dev/null; then
    .venv/bin/python -m pip install -e .
fi
exec .venv/bin/python -m fastguard.train --model teacher --stable "$@"
