#!/bin/sh
# Runs test programs and prints one line each, then "N passed, N failed, N skipped" over all of them.
# usage: tests/run.sh [VARIABLE=VALUE|PROGRAM]...   test_*: Criterion; stress_*: plain, by exit status; proc_*.sh: lines "ok"/"not ok"
# and a count. A variable is set for the programs behind it. What a sanitizer has to say of any process that a program started, a
# daemon too, fails the program. What failed is said where it failed, with the end of the program's output, and in short once more at
# the end.
set -u
passed=0 failed=0 skipped=0
log=$(mktemp "${TMPDIR:-/tmp}/sidekv-test.XXXXXX")
reports=$(mktemp -d "${TMPDIR:-/tmp}/sidekv-reports.XXXXXX")
short=$(mktemp "${TMPDIR:-/tmp}/sidekv-test.XXXXXX")
trap 'rm -rf "$log" "$reports" "$short"' EXIT
export ASAN_OPTIONS="detect_leaks=1:log_path=$reports/asan${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports/ubsan${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
export TSAN_OPTIONS="log_path=$reports/tsan${TSAN_OPTIONS:+:$TSAN_OPTIONS}"
limit=${TEST_TIMEOUT:-600}
for program in "$@"; do
    case $program in *=*) export "$program" && continue ;; esac
    name=$(basename "$program")
    begin=$(date +%s)
    case $name in
    test_*) timeout -k 5 "$limit" "$program" --verbose --short-filename -j2 >"$log" 2>&1 ;;
    *) timeout -k 5 "$limit" "$program" >"$log" 2>&1 ;;
    esac
    status=$?
    p=0 f=0 s=0
    case $name in
    test_*)
        line=$(grep -a 'Synthesis: Tested' "$log" | tail -1 | sed 's/\x1b\[[0-9;]*m//g')
        p=$(echo "$line" | sed -n 's/.*Passing: *\([0-9]*\).*/\1/p')
        f=$(echo "$line" | sed -n 's/.*Failing: *\([0-9]*\).*/\1/p')
        s=$(grep -a -c '\[.*SKIP' "$log")
        p=${p:-0} f=${f:-0} # which counts the crashing ones too
        ;;
    proc_*)
        line=$(grep -a ' passed, .* failed' "$log" | tail -1)
        p=$(echo "$line" | sed -n 's/\([0-9]*\) passed.*/\1/p')
        f=$(echo "$line" | sed -n 's/.* \([0-9]*\) failed.*/\1/p')
        s=$(echo "$line" | sed -n 's/.* \([0-9]*\) skipped.*/\1/p')
        p=${p:-0} f=${f:-0} s=${s:-0}
        ;;
    *) [ $status = 0 ] && p=1 ;;
    esac
    [ $status = 0 ] || [ "$f" -gt 0 ] || f=1
    # a process that is killed while its sanitizer looks around leaves a line, and no finding
    found=$(grep -ls 'ERROR: \|runtime error' "$reports"/*)
    [ -z "$found" ] || f=$((f + 1))
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    printf '%-28s %4d passed %3d failed %3d skipped %4d s\n' "$name" "$p" "$f" "$s" $(($(date +%s) - begin))
    grep -a -h 'SKIPPED\|^# skip\|^ok.*# SKIP' "$log" | sed 's/^/    /' | sort -u | head -5
    if [ "$f" -gt 0 ]; then
        echo "---- $name exited with $status; the end of its output:"
        grep -a -v '\[.*\(PASS\|RUN\)' "$log" | tail -60
        [ -z "$found" ] || head -n 80 $found
        echo "----"
        {
            echo "failed: $program (status $status)"
            grep -a -h '\[.*FAIL\|CRASH\|\[.*----\|^not ok\|ERROR: \|runtime error\|timed out' "$log" $found |
                sed 's/\x1b\[[0-9;]*m//g' | grep -v '^\[----\] *$\|Criterion v' | cut -c 1-160 | head -n 8
        } >>"$short"
    fi
    rm -f "$reports"/*
done
cat "$short"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
