#!/bin/bash
# Protected pools with real workers, on the host device: which are, right scores, a hot restart, what protection does not go with.
# usage: tests/proc_protect.sh   SIDEKV_BIN: see process.sh; the test programs are beside it
. "$(dirname "$0")/process.sh"
made_up() { replay --generate --users 30 --events-total 1500 --json "$@"; }
right() { [ "$status" = 0 ] && [ "$(field scores_wrong)" = 0 ] && [ "$(field rows_wrong)" = 0 ] && [ "$(field scores_checked)" -gt 0 ]; }
cached() { [ "$(field tokens_cached)" -ge $(($(field tokens_cacheable) * $1 / 100)) ]; }

made_up --no-cache
digest=$(field scores_digest)
made_up --protect --verify 1
ok "two workers that write to nothing but extents of their own get every score right" right
ok "and the scores of a run without cache" [ "$(field scores_digest)" = "$digest" ]
ok "only tails in another's extent are computed anew" cached 98
made_up --protect --verify 1 --workers 4 --batch 4 --kill-worker-every 10 --pool-bytes 16M
ok "four on a small pool, killed now and then" right
ok "with workers killed" [ "$(field worker_restarts)" -ge 5 ]
made_up --protect --verify 1 --workers 3 --pool-bytes 2M
ok "one extent for three workers: less is cached, nothing is wrong" right

protected() { cli stats && [ "$(sed -n 's/^pool_protected *\([0-9]*\).*/\1/p' "$work/out")" = "$1" ]; }
start sidekvd
ok "a pool of 64M is protected by default" protected 1
ok "of which the log says nothing" [ "$(grep -c protect "$work/log")" = 0 ]
stop TERM
start sidekvd --pool-bytes 8M
ok "one of 8M is not" protected 0
ok "which the log says, and what to do" grep -q "not protected: .*4 extents.*--pool-bytes" "$work/log"
stop TERM
start sidekvd --trust
ok "nor is one under --trust" protected 0
ok "as it was told" [ "$(grep -c protect "$work/log")" = 0 ]
stop TERM

"$sidekvd" --protect --export ipc --socket "$work/s" --store none >"$work/out" 2>&1
status=$?
ok "an IPC handle cannot be protected" [ "$status" = 2 ]
ok "which is said" grep -q -- "--protect needs --export fd" "$work/out"
"$sidekvd" --protect --trust --export ipc --max-users 1 >"$work/out" 2>&1 # what it stumbles over comes later
ok "--trust takes it back" grep -q -- "--max-users takes" "$work/out"

for test in test_restart test_standby; do
    RESTART_PROTECT=1 RESTART_KILLS=${RESTART_KILLS:-20} timeout 300 "$bin/../tests/$test" >"$work/out" 2>&1
    status=$?
    ok "hot restarts, as without protection: $test" [ "$status" = 0 ]
done

finish
