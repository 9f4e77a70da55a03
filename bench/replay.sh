#!/bin/bash
# The replay figures: a MovieLens log served by two workers out of one cache, model tiny. Checks every score and every cached row, then
# compares compute with recomputing everything.
# usage: bench/replay.sh [RATINGS.CSV [replay option...]]
#   RATINGS.CSV: default $SIDEKV_RATINGS, else ../shared/data/ml-latest-small/ratings.csv; SIDEKV_BIN: default build/bin
#   replay option: one that goes with --no-cache too
set -u
here=$(dirname "$0")
log=${1:-${SIDEKV_RATINGS:-$here/../../shared/data/ml-latest-small/ratings.csv}}
[ $# -gt 0 ] && shift
sidekv=${SIDEKV_BIN:-$here/../build/bin}/sidekv
if [ ! -r "$log" ]; then
    echo "SKIPPED: no ratings.csv: give its path, or set SIDEKV_RATINGS (MovieLens ml-latest-small)"
    exit 0
fi
out=$(mktemp) failed=0
trap 'rm -f "$out"' EXIT
field() { tail -1 "$out" | sed -n "s/.*\"$1\":\"\{0,1\}\([^,}\"]*\).*/\1/p"; }
in_compute() { tail -1 "$out" | sed -n "s/.*\"compute_us\":{[^}]*\"$1\":\([^,}]*\).*/\1/p"; }
# figure TEXT VALUE OPERATOR BOUND
figure() {
    local good
    good=$(awk -v a="$2" -v b="$4" "BEGIN { print (a $3 b) ? \"ok\" : \"MISSED\" }")
    [ "$good" = ok ] || failed=1
    printf '%-6s %-58s %14s   (%s %s)\n' "$good" "$1" "$2" "$3" "$4"
}
run() {
    "$sidekv" replay "$log" --workers 2 --json "$@" >"$out" || failed=1
}

echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), load $(cut -d ' ' -f 1-3 /proc/loadavg)"
echo "date: $(date -u +%F); log: $(wc -l <"$log") lines; options: ${*:-none}"

run --verify 1 "$@"
figure "scores wrong, of $(field scores_checked)" "$(field scores_wrong)" == 0
figure "rows of K and V wrong, of $(field rows_checked)" "$(field rows_wrong)" == 0
figure "seconds to serve and verify every request" "$(field wall_s)" "<=" 600

run "$@"
cached=$(in_compute total) cached_cpu=$(in_compute cpu) digest=$(field scores_digest)
share=$(awk -v a="$(field tokens_cached)" -v b="$(field tokens_total)" 'BEGIN { printf "%.2f", 100 * a / b }')
most=$(awk -v a="$(field tokens_cacheable)" -v b="$(field tokens_total)" 'BEGIN { printf "%.2f", 100 * a / b }')
figure "% of history tokens from cache (the most: $most)" "$share" ">=" 95
echo "       with cache: $(field wall_s) s, latency $(tail -1 "$out" | grep -o '"latency_us":{[^}]*}')"
echo "                   $(tail -1 "$out" | grep -o '"acquire_us":{[^}]*}')"

run --no-cache "$@"
echo "       without:    $(field wall_s) s, latency $(tail -1 "$out" | grep -o '"latency_us":{[^}]*}')"
figure "compute with cache / without" "$(awk -v a="$cached" -v b="$(in_compute total)" 'BEGIN { printf "%.3f", a / b }')" "<=" 0.25
figure "the same in CPU time" "$(awk -v a="$cached_cpu" -v b="$(in_compute cpu)" 'BEGIN { printf "%.3f", a / b }')" "<=" 0.25
if [ "$(field device)" = host ]; then
    [ "$digest" = "$(field scores_digest)" ] && echo "ok     all scores with and without cache are the same, bit for bit" ||
        { echo "MISSED scores with and without cache differ"; failed=1; }
fi
exit $failed
