#!/bin/sh
# Every picture of one checkpoint: ./vis_all.sh [CHECKPOINT] [key=value ...]; without one, of the newest under outputs/ckpts.
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
if [ -x "$here/../.venv/bin/python" ] && [ -z "$PYTHON" ]; then python="$here/../.venv/bin/python"; fi
if ! "$python" -c "import sys, importlib.util as u; sys.exit(None in map(u.find_spec, ['hydra', 'matplotlib', 'torch']))" 2>/dev/null; then
    echo "vis_all: $python lacks the packages; run \`uv run visualizers/vis_all.sh\`, or set PYTHON to one that has them" >&2
    exit 1
fi
exec "$python" "$here/vis_all.py" "$@"
