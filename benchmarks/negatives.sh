#!/usr/bin/env bash
# All tables of negatives.py, a part at a time: one process for each seed, JOBS at once, one thread in each.
#
#   FLICKR8K=~/flickr8k ICONS=~/icons benchmarks/negatives.sh                # all parts
#   benchmarks/negatives.sh emoji-32 emoji-128                               # the parts that are named
#   SEEDS="0 1" METHODS="InfoNCE;bank" benchmarks/negatives.sh emoji-32      # less
#   DEVICE=cuda JOBS=8 benchmarks/negatives.sh icons                         # on a GPU, whose rows have tables of their own
#
# Parts are the settings of negatives.py. Rows go to $RESULTS (runs/negatives.jsonl). A part that is called again goes on where it was.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${RESULTS:-runs/negatives.jsonl}
python=${PYTHON:-python}
mkdir -p "$(dirname "$results")"
export OMP_NUM_THREADS=1
failed=0
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(emoji-32 emoji-128 emoji-towers heads-128 heads-16 icons icons-512 flickr8k grid-converged)
methods=()
[ -z "${METHODS:-}" ] || { IFS=';' read -ra methods <<< "$METHODS"; methods=(--methods "${methods[@]}"); }

for part in "${parts[@]}"; do
    case $part in
        emoji-*) seeds="0 1 2 3 4" folder=() ;;
        icons) seeds="0 1 2 3 4" folder=(--folder "${ICONS:?where icons.npz is, which icons_make.py makes}") ;;
        icons-*) seeds="0 1 2" folder=(--folder "${ICONS:?where icons.npz is, which icons_make.py makes}") ;;
        heads-*) seeds="0 1 2 3 4" folder=(--folder "${FLICKR8K:?where images and captions are}") ;;
        *) seeds="0 1 2" folder=(--folder "${FLICKR8K:?where images and captions are}") ;;
    esac
    start=$SECONDS
    run=("$python" benchmarks/negatives.py --setting "$part" --results "$results" --device "${DEVICE:-cpu}" "${folder[@]}")
    echo ${SEEDS:-$seeds} | xargs -n 1 -P "${JOBS:-2}" "${run[@]}" "${methods[@]}" --seeds > /dev/null || failed=1
    "${run[@]}" --table
    echo "== $part: $((SECONDS - start)) s"
done
exit "$failed"
