# Runs programs beside each other and measures them: what tests/run.sh and tests/guarantees.sh, which source it, share.
# TEST_JOBS: how many at a time: 2, as most sleep half of their time; 1 where there is a GPU, whose memory is not for two. $work is
# the caller's own directory.
set -u
cores=$(nproc)
at_once=${TEST_JOBS:-$([ -e /dev/nvidiactl ] && echo 1 || echo 2)}
began=$(date +%s)
work=$(mktemp -d "${TMPDIR:-/tmp}/sidekv-tests.XXXXXX")
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT
TIMEFORMAT='%R %U %S'

# beside COMMAND...: starts it as soon as fewer than $at_once run; `wait` waits for all
beside() {
    while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n; done
    "$@" &
}
# measured NUMBER NAME SECONDS COMMAND...: for so long at most. What it says goes to $work/NUMBER.log; its exit status is returned
measured() {
    local number=$1 name=$2 limit=$3 status
    shift 3
    { time timeout -k 5 "$limit" "$@" >"$work/$number.log" 2>&1; } 2>"$work/$number.time"
    status=$?
    echo "$(tail -n 1 "$work/$number.time") $name" >"$work/$number.took"
    return $status
}
# seconds NUMBER: that it took
seconds() { cut -d . -f 1 "$work/$1.took"; }
# say FILE: all of it in one piece
say() { flock "$work" cat "$1"; }
# What took longest, and what all took: CPU time over cores is the least that it can.
slowest() {
    sort -rn "$work"/*.took | awk -v cores="$cores" -v wall=$(($(date +%s) - began)) '
        NR == 1 { printf "\n%-32s %8s %8s\n", "the slowest", "s", "CPU s" }
        NR <= 10 { printf "%-32s %8.1f %8.1f\n", $4 " " $5, $1, $2 + $3 }
        { all += $2 + $3 }
        END { printf "all: %d s, %.0f CPU s: %.0f s at least on %d cores\n\n", wall, all, all / cores, cores }'
}
