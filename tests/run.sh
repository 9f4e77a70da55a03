#!/bin/bash
# Runs test programs, some at a time, and prints one line each, then what took longest, and "N passed, N failed, N skipped" over all.
# usage: tests/run.sh [VARIABLE=VALUE|PROGRAM]...   test_*: Criterion; stress_*: plain, by exit status; proc_*.sh: lines "ok"/"not ok"
# and a count. A variable is set for the programs behind it. What a sanitizer has to say of any process that a program started, a
# daemon too, fails the program. What failed is said where it failed, with the end of the program's output, and in short once more at
# the end. TEST_JOBS: see beside.sh; TEST_TIMEOUT: seconds a program
. "$(dirname "$0")/beside.sh"
limit=${TEST_TIMEOUT:-600}
asan=${ASAN_OPTIONS:+:$ASAN_OPTIONS} ubsan=${UBSAN_OPTIONS:+:$UBSAN_OPTIONS} tsan=${TSAN_OPTIONS:+:$TSAN_OPTIONS}

# one NUMBER PROGRAM: its line to the caller's output, its counts to NUMBER.counts, what failed in short to NUMBER.short
one() {
    local number=$1 program=$2 name log=$work/$1.log reports=$work/$1.reports status line found p=0 f=0 s=0
    name=$(basename "$program")
    case ${SIDEKV_BIN:-}:$program in # which configuration it is of
    *build/*/tests/*) name="$name $(echo "$program" | sed 's|.*build/\(.*\)/tests/.*|\1|')" ;;
    build/*/bin:*/proc_*) name="$name $(echo "$SIDEKV_BIN" | sed 's|build/\(.*\)/bin|\1|')" ;;
    esac
    mkdir "$reports"
    export ASAN_OPTIONS="detect_leaks=1:log_path=$reports/asan$asan"
    export UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports/ubsan$ubsan"
    export TSAN_OPTIONS="log_path=$reports/tsan$tsan"
    case $program in
    */test_*) measured "$number" "$name" "$limit" "$program" --verbose --short-filename -j2 ;;
    *) measured "$number" "$name" "$limit" "$program" ;;
    esac
    status=$?
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
    {
        printf '%-28s %4d passed %3d failed %3d skipped %4d s\n' "$name" "$p" "$f" "$s" "$(seconds "$number")"
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
            } >"$work/$number.short"
        fi
    } >"$work/$number.said"
    say "$work/$number.said"
    echo "$p $f $s" >"$work/$number.counts"
}

number=1000
for program in "$@"; do
    case $program in *=*) export "$program" && continue ;; esac
    number=$((number + 1))
    beside one $number "$program"
done
wait
slowest
cat "$work"/*.short 2>/dev/null
cat "$work"/*.counts | awk -v programs=$((number - 1000)) '
    { passed += $1; failed += $2; skipped += $3 }
    END { failed += programs - NR; printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped; exit failed > 0 }'
