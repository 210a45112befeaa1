#!/bin/sh
# Every picture of one checkpoint: ./vis_all.sh [CHECKPOINT] [key=value ...]; without one, of the newest under outputs/ckpts.
# Pictures that do not fit its states (points or images) say so and are left out; the exit status is 1 when none was drawn.
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
if [ -x "$here/../.venv/bin/python" ] && [ -z "$PYTHON" ]; then python="$here/../.venv/bin/python"; fi
case "$1" in
  "" | *=*) ;;
  *) checkpoint="ckpt=$1"; shift ;;
esac
drawn=0
for script in samples one_step particles trajectories velocity_field density denoising interpolation; do
  "$python" "$here/$script.py" $checkpoint "$@" && drawn=$((drawn + 1))
done
[ "$#" -eq 0 ] && "$python" "$here/curves.py" $checkpoint
echo "$drawn of 8 drawings"
[ "$drawn" -gt 0 ]
