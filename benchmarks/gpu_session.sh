#!/bin/sh
# Everything that needs a GPU, in one command, most wanted first; every part under its own limit, so
# that one that hangs does not cost the others. Records go to $1 (default: results).
#
#     MAMBA_SSM=wheels/mamba_ssm-2.3.2.tar.gz sh benchmarks/gpu_session.sh results
#
# MAMBA_SSM, a source package, is built in the background (a few minutes; only for the cards here);
# the operations' benchmark compares with it if it is ready by then. A failed part is reported at
# the end and fails the whole, after all others have run.
set -u
out=${1:-results}
python=${PYTHON:-python}
failed=""
mkdir -p "$out"

part() { # part NAME SECONDS COMMAND...
    name=$1 limit=$2
    shift 2
    echo "== $name (at most $limit s)"
    timeout "$limit" "$@" || failed="$failed $name"
}

if [ -n "${MAMBA_SSM:-}" ]; then
    MAMBA_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-16}" timeout 400 "$python" -m pip install -q \
        --no-build-isolation --no-deps "$MAMBA_SSM" >"$out/mamba_ssm_build.log" 2>&1 &
    build=$!
fi
part tests 300 "$python" -m pytest -q tests/gpu
if [ -n "${MAMBA_SSM:-}" ]; then
    wait "$build" || failed="$failed mamba_ssm_build"
fi
part throughput 420 "$python" benchmarks/throughput.py --presets 1.4b 370m \
    --lengths 2048 8192 16384 32768 --out "$out/throughput.json"
part operations 240 "$python" benchmarks/ops_gpu.py --output "$out/benchmark_ops_gpu.json"
part grouped 180 "$python" benchmarks/throughput.py --presets 1.4b --kv-heads 4 \
    --kinds bmojo transformer --lengths 2048 8192 32768 --out "$out/throughput_grouped.json"
part large 180 "$python" benchmarks/throughput.py --presets 3b --no-backward \
    --kinds bmojo transformer --lengths 2048 8192 32768 --out "$out/throughput_3b.json"
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
