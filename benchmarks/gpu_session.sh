#!/bin/sh
# Everything that needs a GPU, in parts of at most nine minutes, most wanted first.  Every command
# has its own limit, so that one that hangs does not cost the others; records are written row by
# row, so that one that is stopped keeps what it has.
#
#     BMOJO_COMMIT=$(git rev-parse --short HEAD) sh benchmarks/gpu_session.sh PART OUT [SEARCHED]
#
#     tests        kernels against float64 and each other                         270 s
#     model_tests  whole models against float64, in graphs; compute-sanitizer     220 s
#     small        convolution against causal-conv1d; small models as graphs      400 s
#     decode       tokens per second against transformers' Mistral                500 s
#     recall       what the sweeps have not recorded yet                          300 s
#     models       training steps of the kinds, mamba-ssm's stack, Mistral        320 s
#     operations   kernels against mamba-ssm, causal-conv1d, torch's flash        400 s
#     grouped      the same models with grouped heads; 3b forward                 200 s
#     all          one after another
#
# Records and logs go to OUT (default: results).  Seconds are those of earlier records on an H100,
# or estimates from them.  The tests want the card to themselves.
#
# SEARCHED (default: .mamba), if it is there, holds packages of mamba-ssm and causal-conv1d: sources,
# which are built in the background in three to four minutes while other work goes on, or wheels that
# an earlier part has left in OUT/wheels.  (They build sooner with but one architecture and one type
# left in them.)  A failed command is reported at the end.
set -u
parts="tests model_tests small decode recall models operations grouped"
part=${1:?one of: $parts all}
out=${2:-results}
searched=${3:-.mamba}
python=${PYTHON:-python3}
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" PYTHONUNBUFFERED=1
failed=""
build=""
mkdir -p "$out"

run() { # run NAME SECONDS COMMAND...
    name=$1 limit=$2
    shift 2
    echo "== $name (at most $limit s)"
    timeout "$limit" "$@" || failed="$failed $name"
}

install() { # every package at once, each compiling with a share of the cores
    for package in "$searched"/*.whl "$searched"/*.tar.gz; do
        [ -e "$package" ] || continue
        MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-16}" \
            timeout 300 sh -c '
            case $2 in
            *.whl) wheel=$2 ;;
            *) "$1" -m pip wheel -q --no-build-isolation --no-deps -w "$3/wheels" "$2" &&
                wheel=$(ls "$3/wheels/$(basename "$2" .tar.gz)"-*.whl) ;;
            esac
            "$1" -m pip install -q --no-index --no-deps "$wheel"' \
            install "$python" "$package" "$out" >"$out/$(basename "$package").log" 2>&1 &
        build="$build $!"
    done
}

installed() { # wait for them; without them the comparisons with mamba-ssm are left out
    for process in $build; do
        wait "$process" || failed="$failed mamba_ssm"
    done
    build=""
}

tests() {
    run tests 420 "$python" tests/gpu/record.py --workers 6 --output "$out/gpu_tests.json" \
        --files $(cd tests/gpu && ls test_*_gpu.py | grep -v -e model -e decode)
}

model_tests() {
    run model_tests 300 "$python" tests/gpu/record.py --workers 8 \
        --files test_model_gpu.py test_decode_graph_gpu.py --output "$out/gpu_tests_models.json"
    run sanitizer 180 "$python" tests/gpu/record.py --only-sanitize \
        --output "$out/gpu_tests_sanitizer.json"
}

small() { # the graphs first: causal-conv1d is built meanwhile
    install
    run captured 240 "$python" benchmarks/throughput.py --captured --presets 130m 370m \
        --kinds bmojo transformer hybrid mamba --tokens 32768 --lengths 2048 8192 32768 \
        --seconds 200 --out "$out/throughput_captured.json"
    installed
    run conv 120 "$python" benchmarks/ops_gpu.py --only conv,scalar_scan \
        --output "$out/benchmark_ops_small.json"
}

decode() {
    run decode_130m 320 "$python" benchmarks/decode_gpu.py --contexts 32768 \
        --output "$out/decode_gpu.json"
    run decode_370m 200 "$python" benchmarks/decode_gpu.py --preset 370m --contexts 32768 \
        --kinds bmojo mistral --output "$out/decode_gpu_370m.json"
}

recall() { # two sweeps beside each other, from and to results/; OUT gets all their records
    timeout 280 "$python" -m bmojo_core.experiments.external --size gpu &
    run table3 280 "$python" -m bmojo_core.experiments.table3 --size gpu
    wait $! || failed="$failed external"
    tar czf "$out/recall.tar.gz" results/runs/external results/runs/table3
}

models() {
    install
    run throughput_1.4b 200 "$python" benchmarks/throughput.py --presets 1.4b \
        --kinds bmojo transformer mistral hybrid mamba bmojo_f \
        --lengths 32768 8192 2048 --out "$out/throughput_1.4b.json"
    run throughput_small 120 "$python" benchmarks/throughput.py --presets 370m 130m \
        --kinds bmojo transformer mistral hybrid mamba bmojo_f --seconds 100 \
        --lengths 32768 8192 2048 --out "$out/throughput_small.json"
    installed
    run throughput_mamba_ssm 120 "$python" benchmarks/throughput.py --presets 1.4b \
        --kinds mamba_ssm bmojo --lengths 32768 8192 2048 --out "$out/throughput_mamba_ssm.json"
}

operations() {
    install
    run attention 150 "$python" benchmarks/ops_gpu.py --only innovation,attention \
        --output "$out/benchmark_ops_attention.json"
    installed
    run scans 250 "$python" benchmarks/ops_gpu.py --only scan,conv,scalar_scan \
        --output "$out/benchmark_ops_scans.json"
}

grouped() {
    run grouped 120 "$python" benchmarks/throughput.py --presets 1.4b --kv-heads 4 \
        --kinds bmojo transformer --lengths 32768 8192 2048 --out "$out/throughput_grouped.json"
    run large 140 "$python" benchmarks/throughput.py --presets 3b --no-backward \
        --kinds bmojo transformer --lengths 32768 8192 2048 --out "$out/throughput_3b.json"
}

case $part in
all) for each in $parts; do "$each"; done ;;
tests | model_tests | small | decode | recall | models | operations | grouped) "$part" ;;
*) echo "PART is '$part'; allowed: $parts all" >&2; exit 2 ;;
esac
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
