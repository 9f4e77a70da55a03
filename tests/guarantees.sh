#!/bin/sh
# Runs provers (tests/prove.h) and prints what they proved as one table, then "N passed, N failed".
# usage: tests/guarantees.sh PROGRAM...   PROVE_SCALE: full counts times this; PROVE_SEED
set -u
limit=${PROVE_TIMEOUT:-3600}
log=$(mktemp "${TMPDIR:-/tmp}/sidekv-prove.XXXXXX")
table=$(mktemp "${TMPDIR:-/tmp}/sidekv-prove.XXXXXX")
trap 'rm -f "$log" "$table"' EXIT
began=$(date +%s)
echo "guarantees: scale ${PROVE_SCALE:-1}, seed ${PROVE_SEED:-1}, $(date -u +%F), $(nproc) cores of $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)"
for program in "$@"; do
    name=$(basename "$program")
    begin=$(date +%s)
    timeout -k 5 "$limit" "$program" >"$log" 2>&1
    status=$?
    took=$(($(date +%s) - begin))
    grep -a '^proved	' "$log" | sed "s|^proved|$name|" >>"$table"
    grep -a -q '^proved	' "$log" || printf '%s\t-\tends with a line\t1\t1\n' "$name" >>"$table"
    if [ $status != 0 ]; then
        echo "---- $name exited with $status; the end of its output:"
        tail -n 60 "$log"
        echo "----"
        # a prover that died after its last line, or timed out, has not proved all of it
        awk -F '\t' -v name="$name" '$1 == name && $5 > 0 { found = 1 } END { exit !found }' "$table" ||
            printf '%s\t-\tends well\t1\t1\n' "$name" >>"$table"
    fi
    echo "$name: $took s"
done
echo
sort -t '	' -k 2,2n -s "$table" | awk -F '\t' '
    BEGIN { printf "%-8s %-26s %-66s %9s %8s\n", "promise", "test", "what", "count", "failures" }
    { row = sprintf("%-8s %-26s %-66s %9s %8s", $2, $1, $3, $4, $5); print row }
    $5 > 0 { failed++; again = again "failed: " row "\n" }
    $5 == 0 { passed++ }
    END { printf "\n%s%d passed, %d failed\n", again, passed, failed; exit failed > 0 || passed == 0 }'
status=$?
echo "in $(($(date +%s) - began)) s" >&2
exit $status
