#!/bin/bash
# sidekvd --protect with real workers, on the host device: right scores, a hot restart, what it does not go with.
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
