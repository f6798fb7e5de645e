#!/usr/bin/env bash
# The paper's network on one large GPU, in at most 8 minutes and without a network connection.
#
#   benchmarks/gpu_paper.sh cuda OUT          ResNet-50: tables of CIFAR-10, all spikes of a hundred classes
#   benchmarks/gpu_paper.sh cpu OUT small     the same commands on images drawn here, to see that they run
#
# Stored runs (JSON) and what was printed go to OUT. Weights, half-done runs and decoded images stay in WORK, by
# default OUT.work: started again with both, it goes on. Exit code 0: nothing failed, whether or not all is done.
#
#   BUDGET   seconds in all; default 480          DATA     where cifar10 and tinyimagenet100 lie; default ./data,
#   SEEDS    of CIFAR-10, as many as fit; 5                or HESSIAN_SURGERY_DATA
#   JOBS     runs of CIFAR-10 side by side; 3     PYTHON   default python3
#   HESSIAN_SURGERY_COMMIT   goes into stored runs where there is no git
set -uo pipefail
usage() { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }

device=${1:-} out=${2:-} size=${3:-full}
case "$device/$size" in cuda/full | cuda/small | cpu/full | cpu/small) ;; *) usage ;; esac
[ -n "$out" ] || usage

budget=${BUDGET:-480} seeds=${SEEDS:-5} jobs=${JOBS:-3} python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=${WORK:-$out.work}
mkdir -p "$work/runs" || exit 2
work=$(cd "$work" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HESSIAN_SURGERY_CACHE="$work/cache" HESSIAN_SURGERY_DATA="${DATA:-${HESSIAN_SURGERY_DATA:-data}}"
export HESSIAN_SURGERY_TEST_DEVICE="$device"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + jobs) / (jobs + 1) ))}

few=(surgery_gamma_p2 surgery_adam_p2 front_biases state_at_start spectrum surgery_paper_eps
    sensitivity structure balanced focal focal_surgery)
many=(deflated front_biases)
network=(--network resnet50 --precision bf16)
some_tests=()
few_images=(cifar10) many_images=(tinyimagenet100)
if [ "$size" = small ]; then
    network=(--quick --tau mean) few_images=("$work/toys") many_images=("$work/toys" --held-back 10)
    seeds=1 some_tests=(-k "products or eigenpairs") # CI runs the others anyway
    [ -d "$work/toys" ] || "$python" -c "import sys
from hessian_surgery_nb.foundations.datasets import write_toy_images
write_toy_images(sys.argv[1])" "$work/toys" || exit 1
fi

left() { echo $((budget - SECONDS)); }
margin=15 # seconds: Python starts before its budget counts, and tidies up after it
keep_json() {
    for folder in few many; do
        mkdir -p "$out/$folder" "$work/runs/$folder"
        find "$work/runs/$folder" -maxdepth 1 -name '*_s[0-9]*_*.json' -exec cp {} "$out/$folder/" \;
    done
}
trap 'kill $(jobs -p) 2> /dev/null; keep_json' EXIT
trap 'exit 130' INT TERM

# Run these experiments of one seed while there is time; should one fail, the others are run one by one.
reproduce() { # FOLDER JOBS SEED EXPERIMENT ... -- IMAGES AND FLAGS
    local folder=$1 workers=$2 seed=$3 names=() failed=0
    shift 3
    while [ "$1" != -- ]; do names+=("$1"); shift; done
    shift
    run() {
        [ "$(left)" -gt $((2 * margin)) ] || return 0
        timeout --signal INT --kill-after 10 $(($(left) + margin)) \
            "$python" -m hessian_surgery_nb reproduce "${images[@]}" --experiment "$@" --seed "$seed" --seeds 1 \
            --device "$device" --jobs "$workers" --budget $(($(left) - margin)) --out "$work/runs/$folder"
    }
    local images=("$@")
    run "${names[@]}" && return 0
    for name in "${names[@]}"; do run "$name" || failed=1; done
    return $failed
}

tests() {
    [ "$(left)" -gt $((2 * margin)) ] || return 0
    timeout $(($(left) - margin)) "$python" -m pytest -q -p no:cacheprovider "$root/tests/test_device.py" "${some_tests[@]}"
}
hundred_classes() { reproduce many 1 0 "${many[@]}" -- "${many_images[@]}" "${network[@]}"; }
cifar() {
    local failed=0
    for ((seed = 0; seed < seeds; seed++)); do
        reproduce few "$jobs" "$seed" "${few[@]}" -- "${few_images[@]}" "${network[@]}" || failed=1
    done
    return $failed
}

declare -A running
for part in tests hundred_classes cifar; do
    $part > "$out/$part.log" 2>&1 &
    running[$part]=$!
done
status=0
for part in tests hundred_classes cifar; do
    wait "${running[$part]}" || { echo "$part failed; see $out/$part.log" >&2; status=1; }
done
keep_json
echo "after $SECONDS s: $(find "$out" -name '*.json' | wc -l) runs in $out; $(tail -n 1 "$out/tests.log")"
for part in hundred_classes cifar; do grep -h "^Left are" "$out/$part.log"; done
exit $status
