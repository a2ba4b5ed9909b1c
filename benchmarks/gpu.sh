#!/usr/bin/env bash
# What the GPU path does on a GPU, in under ten minutes: benchmarks/results/gpu.json. Installs nothing.
#
#   benchmarks/gpu.sh                     every part
#   benchmarks/gpu.sh ddp streams         these
#   benchmarks/gpu.sh --rehearse          the same lines on a CPU, small; the result goes to a temporary folder
#
# PYTHON names the Python to run (default: that of .venv, or python3), where torch with CUDA and Triton are installed and
# distcomp is (pip install --editable .). LIMIT_S gives every part that many seconds in the place of its own.
# A part that fails or does not end in time is named, and the others run. Status 0: all went well; 1: a part did
# not; 2: nothing could be started.
set -uo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# Seconds of each part; together less than ten minutes.
declare -A limits=([kernels]=170 [bandwidth]=90 [ddp]=110 [fsdp2]=55 [graphs]=95 [streams]=75)
every=(kernels bandwidth ddp fsdp2 graphs streams)
longer=1

options=() parts=()
for word in "$@"; do
    case $word in
        --rehearse)
            results=$(mktemp -d) || exit 2
            trap 'rm -rf "$results"' EXIT
            options=(--rehearse --to "$results")
            longer=5
            export TRITON_INTERPRET=1
            ;;
        *)
            if [[ -z ${limits[$word]:-} ]]; then
                echo "gpu.sh: $word is no part; there are ${every[*]}, and --rehearse" >&2
                exit 2
            fi
            parts+=("$word")
            ;;
    esac
done
[[ ${#parts[@]} -gt 0 ]] || parts=("${every[@]}")

python=${PYTHON:-}
[[ -n $python ]] || { [[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python3; }
if ! timeout 120 "$python" -m benchmarks.gpu about "${options[@]}"; then
    echo "gpu.sh: $python cannot begin, see above; PYTHON=... names another" >&2
    exit 2
fi

# timeout has a process group of its own, with every rank of a part in it: it hears of an interruption from here.
# Bash's own list of jobs names it from the moment it is begun; a variable set after that would be a moment late.
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT TERM

failed=()
for part in "${parts[@]}"; do
    limit=${LIMIT_S:-$((longer * limits[$part]))}
    echo "== $part, at most $limit s"
    begin=$SECONDS
    timeout --kill-after=10 "$limit" "$python" -m benchmarks.gpu "$part" "${options[@]}" &
    wait "$!"
    status=$?
    case $status in
        0) echo "== $part: well, after $((SECONDS - begin)) s" ;;
        124 | 137) failed+=("$part (not over after $limit s)") ;;
        *) failed+=("$part (status $status)") ;;
    esac
done

if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'gpu.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "gpu.sh: all went well: ${parts[*]}"
