#!/bin/sh
# Every picture of one checkpoint: ./vis_all.sh [CHECKPOINT] [key=value ...]; without one, of the newest under outputs/ckpts.
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
if [ -x "$here/../.venv/bin/python" ] && [ -z "$PYTHON" ]; then python="$here/../.venv/bin/python"; fi
exec "$python" "$here/vis_all.py" "$@"
