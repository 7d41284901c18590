#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests first, then each benchmark, with its table under "$OUT".
#
# Estimated for an H200 (nothing here has been measured yet): 22 minutes.
#   pytest -m gpu       6 min   most of it compiling towers
#   search_cuda.py      4 min   five searches of 0.2 to 3 s, five ways, six turns
#   step_cuda.py        4 min   35 runs of 50 steps of about 0.1 s, and a model built for each
#   mining_cuda.py      3 min   40,000 pairs, twice, six turns; the workers' copying is the limit
#   precision_cuda.py   5 min   15 runs of about 20 s; the pictures are loaded in worker processes
# A part that fails or takes too long stops no other; the exit status says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/cuda}
python=${PYTHON:-python}
mkdir -p "$out"
failed=0

part() {  # name, minutes at most, command...
    local name=$1 minutes=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "${minutes}m" "$@" 2>&1 | tee "$out/$name.log" || { echo "== $name failed"; failed=1; }
    echo "== $name: $((SECONDS - start)) s" | tee -a "$out/seconds.txt"
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv | tee "$out/device.txt" || failed=1
part pytest 9 "$python" -m pytest -m gpu -q -p no:cacheprovider --durations=15
part search 6 "$python" benchmarks/search_cuda.py --out "$out/search.txt"
part step 6 "$python" benchmarks/step_cuda.py --out "$out/step.txt"
part mining 5 "$python" benchmarks/mining_cuda.py --out "$out/mining.txt"
part precision 7 "$python" benchmarks/precision_cuda.py --num-workers 4 --out "$out/precision.txt"
exit "$failed"
