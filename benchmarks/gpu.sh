#!/usr/bin/env bash
# The engine on one large GPU, in at most 8 minutes and without a network connection.
#
#   benchmarks/gpu.sh cuda OUT          tests, products, eigenpairs, densities, beside other libraries
#   benchmarks/gpu.sh cpu OUT small     the same commands at a small size, to see that they run
#
# Results are OUT/scale.json (products compiled and not, eigenpairs, densities, bf16, one rank of nccl, channels_last,
# cuDNN's LSTM), OUT/engine.json (everything beside the same on the processor) and OUT/tests.log. Each is written after
# every check, so that what was done is there, whenever it is stopped. Exit code 0: nothing failed, whether or not all is done.
#
#   BUDGET   seconds in all; default 480              PYTHON   default python3
#   COMPILED 1: compiled products too; 0: none        HESSIAN_SURGERY_COMMIT   where there is no git
set -uo pipefail
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }

device=${1:-} out=${2:-} size=${3:-full}
case "$device/$size" in cuda/full | cuda/small | cpu/full | cpu/small) ;; *) usage ;; esac
[ -n "$out" ] || usage

budget=${BUDGET:-480} python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HESSIAN_SURGERY_TEST_DEVICE="$device"

flags=() checks=(small products methods) some_tests=()
compiled=${COMPILED:-1}
if [ "$size" = small ]; then
    compiled=${COMPILED:-0} # a minute and more of a C++ compiler
    flags=(--small) checks=(small) some_tests=(-k "products or eigenpairs") # CI runs the others anyway
fi
[ "$compiled" = 0 ] || flags+=(--compiled)

left() { echo $((budget - SECONDS)); }
margin=15 # seconds: a check that has begun is ended this much before the budget is
failed=0
part() { # NAME SECONDS COMMAND ...
    local name=$1 seconds=$2
    shift 2
    if [ "$seconds" -lt "$margin" ]; then echo "$name: no time left"; return; fi
    timeout --signal INT --kill-after 10 "$seconds" "$@" > "$out/$name.log" 2>&1
    local code=$?
    if [ $code = 124 ]; then echo "$name: cut off after $seconds s"; return; fi
    if [ $code != 0 ]; then echo "$name failed; see $out/$name.log" >&2; failed=1; return; fi
    echo "$name: $(tail -n 1 "$out/$name.log")"
}

# the numbers first: they need the machine for themselves
scale=$(($(left) * 6 / 10))
part scale "$(($(left) - margin))" "$python" "$root/benchmarks/gpu_scale.py" "$device" "$out/scale.json" \
    --budget "$scale" ${flags[@]+"${flags[@]}"}
part tests "$(($(left) - margin))" "$python" -m pytest -q -p no:cacheprovider "$root/tests/test_device.py" \
    ${some_tests[@]+"${some_tests[@]}"}
engine=()
[ "$size" = full ] || engine=(--small)
part engine "$(($(left) - margin))" "$python" "$root/benchmarks/gpu.py" "$device" "$out/engine.json" \
    --checks "${checks[@]}" ${engine[@]+"${engine[@]}"}
echo "after $SECONDS s: $(find "$out" -name '*.json' | wc -l) files in $out"
exit $failed
