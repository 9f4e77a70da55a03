#!/bin/sh
# Every figure of docs/benchmarks.md that this machine can give, one bench after the other, or those named.
# usage: bench/run.sh BIN_DIRECTORY [PART...]   parts: control hangup store start copy mover layers share block attention gemm torch replay protect
#   SIDEKV_RATINGS: a MovieLens ratings.csv, for replay; BENCH_OUT: a directory for the tables as CSV (block.csv, torch.csv);
#   BENCH_TIMEOUT: seconds a part may take (default 600)
set -u
bin=$1
shift
parts=${*:-control hangup store start copy mover layers share block attention gemm torch replay protect}
cd "$(dirname "$0")/.."
device=host
gpu=$(nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader 2>/dev/null) && device=cuda || gpu="no GPU"
echo "machine: $(uname -sr), $(nproc) cores, $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1), $gpu"
echo "date: $(date -u +%F), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
run() {
    echo
    echo "\$ $*"
    begin=$(date +%s)
    timeout -k 5 "${BENCH_TIMEOUT:-600}" "$@" || echo "(exit $?)"
    echo "($(($(date +%s) - begin)) s)"
}
# a CSV beside the lines, where one is wanted
table() {
    name=$1
    shift
    if [ -n "${BENCH_OUT:-}" ]; then
        run "$@" --csv >"$BENCH_OUT/$name.raw"
        grep -v '^[$(]\|^$' "$BENCH_OUT/$name.raw" >"$BENCH_OUT/$name.csv"
        cat "$BENCH_OUT/$name.raw"
        rm "$BENCH_OUT/$name.raw"
    else
        run "$@"
    fi
}
on_gpu() {
    [ $device = cuda ] || echo "
$1: SKIPPED, no GPU on this machine"
    [ $device = cuda ]
}
for part in $parts; do
    case $part in
    control) run "$bin/bench_control" --sidekvd "$bin/sidekvd" ;;
    hangup) run "$bin/bench_hangup" --sidekvd "$bin/sidekvd" ;;
    store) run "$bin/bench_store" ;;
    start) run "$bin/bench_start" --device $device --sidekvd "$bin/sidekvd" ;;
    copy) run "$bin/bench_copy" ;;
    mover) run "$bin/bench_mover" ;;
    layers) run "$bin/bench_layers_host" ;;
    share) on_gpu share && run "$bin/bench_share" --sidekvd "$bin/sidekvd" ;;
    block) on_gpu block && table block "$bin/bench_block" ;;
    attention) on_gpu attention && run "$bin/bench_attention" --bench ;;
    gemm) on_gpu gemm && run "$bin/bench_gemm" ;;
    torch) on_gpu torch && table torch python3 bench/torch_block.py ;;
    replay)
        if [ -n "${SIDEKV_RATINGS:-}" ]; then
            run bench/replay.sh "$SIDEKV_RATINGS"
        else
            echo
            echo "replay: name a MovieLens ratings.csv (SIDEKV_RATINGS=... make bench) for its figures"
        fi
        ;;
    protect) # the same requests without and with, in turns
        for option in --trust "" --trust ""; do
            run "$bin/sidekv" replay --generate --device $device --model tiny --workers 2 $option
        done
        ;;
    *)
        echo "bench/run.sh: no part $part" >&2
        exit 2
        ;;
    esac
done
