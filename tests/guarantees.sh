#!/bin/bash
# Runs provers (tests/prove.h), some at a time, and prints what they proved as one table, then what took longest, and "N passed,
# N failed". usage: tests/guarantees.sh PROGRAM...   PROVE_SCALE: full counts times this; PROVE_SEED; PROVE_TIMEOUT: seconds a
# program; TEST_JOBS: see beside.sh
. "$(dirname "$0")/beside.sh"
limit=${PROVE_TIMEOUT:-3600}

# one NUMBER PROGRAM: what it proved to NUMBER.proved
one() {
    local number=$1 program=$2 name log=$work/$1.log proved=$work/$1.proved status
    name=$(basename "$program")
    measured "$number" "$name" "$limit" "$program"
    status=$?
    grep -a '^proved	' "$log" | sed "s|^proved|$name|" >"$proved"
    [ -s "$proved" ] || printf '%s\t-\tends with a line\t1\t1\n' "$name" >"$proved"
    {
        if [ $status != 0 ]; then
            echo "---- $name exited with $status; the end of its output:"
            tail -n 60 "$log"
            echo "----"
            # a prover that died after its last line, or timed out, has not proved all of it
            awk -F '\t' '$5 > 0 { found = 1 } END { exit !found }' "$proved" || printf '%s\t-\tends well\t1\t1\n' "$name" >>"$proved"
        fi
        echo "$name: $(seconds "$number") s"
    } >"$work/$number.said"
    say "$work/$number.said"
}

echo "guarantees: scale ${PROVE_SCALE:-1}, seed ${PROVE_SEED:-1}, $(date -u +%F), $cores cores of $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)"
number=1000
for program in "$@"; do
    number=$((number + 1))
    beside one $number "$program"
done
wait
slowest
cat "$work"/*.proved | sort -t '	' -k 2,2n -s | awk -F '\t' '
    BEGIN { printf "%-8s %-26s %-66s %9s %8s\n", "promise", "test", "what", "count", "failures" }
    { row = sprintf("%-8s %-26s %-66s %9s %8s", $2, $1, $3, $4, $5); print row }
    $5 > 0 { failed++; again = again "failed: " row "\n" }
    $5 == 0 { passed++ }
    END { printf "\n%s%d passed, %d failed\n", again, passed, failed; exit failed > 0 || passed == 0 }'
