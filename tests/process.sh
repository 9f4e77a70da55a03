# What the process tests, proc_*.sh, share; they source it.
# SIDEKV_BIN: the directory with the programs (default build/bin). $work is the test's own directory, private daemons' too; $daemon and
# $run are processes that end with it. What a command wrote is in $work/out and $work/err, its exit status in $status.
set -u
bin=${SIDEKV_BIN:-$(dirname "$0")/../build/bin}
sidekv=$bin/sidekv sidekvd=$bin/sidekvd
work=$(mktemp -d "${TMPDIR:-/tmp}/sidekv-proc.XXXXXX")
daemon="" run=""
trap 'kill -TERM $daemon $run 2>/dev/null; wait; rm -rf "$work"' EXIT
export TMPDIR=$work
unset SIDEKV_SOCKET SIDEKV_LOG
passed=0 failed=0 status=0

# ok NAME TEST...: one claim
ok() {
    local name=$1
    shift
    if "$@"; then
        echo "ok - $name"
        passed=$((passed + 1))
    else
        echo "not ok - $name (status $status)"
        tail -n 30 "$work/log" "$work/out" "$work/err" 2>/dev/null | sed 's/^/    /' | cut -c 1-400
        failed=$((failed + 1))
    fi
}
# cli ARGUMENT...: sidekv, at the test's socket
cli() {
    "$sidekv" --socket "$work/s" "$@" >"$work/out" 2>"$work/err"
    status=$?
}
# replay ARGUMENT...
replay() {
    "$sidekv" replay --device host "$@" >"$work/out" 2>"$work/err"
    status=$?
}
# field NAME: of the JSON on the last line
field() { tail -1 "$work/out" | sed -n "s/.*\"$1\": *\"\{0,1\}\([^,}\"]*\).*/\1/p"; }
# ready: waits for a daemon at the test's socket
ready() {
    for _ in $(seq 1200); do
        "$sidekv" --socket "$work/s" ping -c 1 >/dev/null 2>&1 && return
        sleep 0.05
    done
    return 1
}
# start PROGRAM [OPTION...]: sidekvd or sidekv-keeper, with a store, by command $via if there is one; it is $daemon
start() {
    ${via:-} "$bin/$1" --socket "$work/s" --store "$work/kept" --store-bytes 256M --pool-bytes 64M --device host "${@:2}" >"$work/log" 2>&1 &
    daemon=$!
    ready
}
# stop SIGNAL: ends $daemon; its status in $status
stop() {
    kill "-$1" "$daemon"
    wait "$daemon" 2>/dev/null
    status=$?
    daemon=""
}
# the last line of a test
finish() {
    echo "$passed passed, $failed failed"
    [ $failed = 0 ]
}
