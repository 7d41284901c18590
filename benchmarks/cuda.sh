#!/usr/bin/env bash
# Everything that needs a GPU: tests first, then each benchmark, with its table under "$OUT".
#
#   benchmarks/cuda.sh                  # all parts
#   benchmarks/cuda.sh pytest search    # the parts that are named
#   QUICK=1 benchmarks/cuda.sh step     # see that it runs: small, no result
#
# Parts: pytest, search, step, mining, precision. A sixth, negatives, runs only where it is named: it is cut off after nine minutes,
# and needs the folders that negatives.sh names. Those that are timed (search, step, mining) want the device for themselves.
# A part that fails or takes too long stops no other; the exit status says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/cuda}
python=${PYTHON:-python}
mkdir -p "$out"
failed=0
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(pytest search step mining precision)
options=()
[ -z "${QUICK:-}" ] || options=(--quick)

part() {  # name, minutes at most, command...
    local name=$1 minutes=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "${minutes}m" "$@" 2>&1 | tee "$out/$name.log" || { echo "== $name failed"; failed=1; }
    echo "== $name: $((SECONDS - start)) s" | tee -a "$out/seconds.txt"
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv | tee "$out/device.txt" || failed=1
for name in "${parts[@]}"; do
    case $name in
        pytest) part pytest 9 "$python" -m pytest -m gpu -q -p no:cacheprovider --durations=15 ;;
        search) part search 6 "$python" benchmarks/search_cuda.py "${options[@]}" --out "$out/search.txt" ;;
        step) part step 6 "$python" benchmarks/step_cuda.py "${options[@]}" --out "$out/step.txt" ;;
        mining) part mining 5 "$python" benchmarks/mining_cuda.py "${options[@]}" --out "$out/mining.txt" ;;
        precision) part precision 7 "$python" benchmarks/precision_cuda.py --jobs 8 "${options[@]}" --out "$out/precision.txt" ;;
        negatives) DEVICE=cuda JOBS=${JOBS:-8} RESULTS="$out/negatives.jsonl" PYTHON="$python" \
            part negatives 9 benchmarks/negatives.sh icons icons-512 flickr8k ;;
        *) echo "Unknown part '$name'. There are: pytest, search, step, mining, precision, negatives." >&2; exit 2 ;;
    esac
done
exit "$failed"
