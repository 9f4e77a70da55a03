#!/bin/sh
# Criterion programs under valgrind's memcheck, the processes of their tests too: a line each, and 0 errors, or exit 1. What is
# still reachable when a process ends is no error. usage: tests/valgrind.sh PROGRAM...   VALGRIND_TIMEOUT: seconds a program (1200)
set -u
log=$(mktemp "${TMPDIR:-/tmp}/sidekv-valgrind.XXXXXX")
trap 'rm -f "$log"' EXIT
failed=0
for program in "$@"; do
    begin=$(date +%s)
    timeout -k 5 "${VALGRIND_TIMEOUT:-1200}" valgrind --quiet --trace-children=yes --error-exitcode=99 --leak-check=full \
        --errors-for-leak-kinds=definite --show-leak-kinds=definite "$program" --timeout 600 -j1 --quiet >"$log" 2>&1
    status=$?
    errors=$(grep -a -c '^==[0-9]*== [A-Z].*\(nvalid\|uninitialised\|definitely lost\|Mismatched\|overlap\)' "$log")
    printf '%-28s %4d errors, exit %d, %4d s\n' "$(basename "$program")" "$errors" $status $(($(date +%s) - begin))
    if [ $status != 0 ] || [ "$errors" != 0 ]; then
        failed=$((failed + 1))
        tail -n 60 "$log"
    fi
done
echo "valgrind: $# programs, $failed with errors"
[ $failed = 0 ]
