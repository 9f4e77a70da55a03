#!/bin/sh
# Programs under NVIDIA's compute-sanitizer, the processes of their tests too: a line each, and 0 errors, or exit 1. Skips without a GPU.
# usage: tests/sanitize_cuda.sh memcheck|racecheck|initcheck|synccheck PROGRAM...   SANITIZER_TIMEOUT: seconds a program (600)
set -u
tool=$1
shift
nvidia-smi >/dev/null 2>&1 || {
    echo "SKIPPED $tool: no GPU on this machine"
    exit 0
}
log=$(mktemp "${TMPDIR:-/tmp}/sidekv-sanitize.XXXXXX")
trap 'rm -f "$log"' EXIT
failed=0
for program in "$@"; do
    begin=$(date +%s)
    # a test's allocation that is refused on purpose is no error of a kernel
    timeout -k 5 "${SANITIZER_TIMEOUT:-600}" compute-sanitizer --tool "$tool" --target-processes all --report-api-errors no \
        --error-exitcode 99 "$program" --timeout 600 -j1 --quiet >"$log" 2>&1
    status=$?
    errors=$(sed -n 's/^=* ERROR SUMMARY: \([0-9]*\) error.*/\1/p; s/^=* RACECHECK SUMMARY: \([0-9]*\) hazard.*/\1/p' "$log" |
        awk '{ n += $1 } END { print n + 0 }')
    printf '%-28s %s: %d errors, exit %d, %d s\n' "$(basename "$program")" "$tool" "$errors" $status $(($(date +%s) - begin))
    if [ $status != 0 ] || [ "$errors" != 0 ]; then
        failed=$((failed + 1))
        grep -a -v 'ERROR SUMMARY: 0 ' "$log" | head -n 60
        tail -n 20 "$log"
    fi
done
echo "$tool: $# programs, $failed with errors"
[ $failed = 0 ]
