#!/bin/bash
# sidekv-keeper and sidekv restart, as a person uses them, on the host device.
# usage: tests/proc_restart.sh   SIDEKV_BIN: see process.sh
. "$(dirname "$0")/process.sh"
export SIDEKV_TEST_NO_PAUSE=1
says() { grep -q -- "$1" "$work/out" "$work/err" "$work/log"; }
users() { "$sidekv" --socket "$work/s" stats | sed -n 's/^users_resident *\([0-9]*\).*/\1/p'; }
said() {
    for _ in $(seq 600); do
        says "$1" && return
        sleep 0.05
    done
    return 1
}
daemon_pid() { "$sidekv" --socket "$work/s" ping -c 1 2>/dev/null | sed -n 's/.*process \([0-9]*\).*/\1/p'; }

# As some supervisors start it.
via="env --ignore-signal=CHLD" ok "the keeper starts a daemon" start sidekv-keeper
first=$(daemon_pid)
cli restart
ok "a planned restart" [ "$status" = 0 ]
ok "says so" says "restarted: process"
ok "it is another process" [ "$(daemon_pid)" != "$first" ]

"$sidekv" --socket "$work/s" replay --device host --generate --users 40 --events-total 6000 --verify 0.3 --json >"$work/out.replay" 2>"$work/err" &
run=$!
for i in 1 2 3 4 5 6; do
    sleep 0.4
    kill -0 $run 2>/dev/null || break
    if [ $((i % 2)) = 0 ]; then "$sidekv" --socket "$work/s" restart >/dev/null 2>&1; else kill -9 "$(daemon_pid)" 2>/dev/null; fi
    ready
done
wait $run
status=$?
run=""
ok "a replay runs through kills and restarts" [ "$status" = 0 ]
ok "no score was wrong" grep -q '"scores_wrong":0' "$work/out.replay"
ok "no row was wrong" grep -q '"rows_wrong":0' "$work/out.replay"
ok "nothing had to come from the store" grep -q '"hit_store_tokens":0' "$work/out.replay"
users=$(users)
kill -HUP "$daemon"
kill -9 "$(daemon_pid)"
ok "after one more kill it is back" ready
ok "with all users in the pool" [ -n "$users" -a "$(users)" = "$users" ]
prlimit --pid "$daemon" --nofile=5:
kill -9 "$(daemon_pid)"
ok "a daemon that cannot be started" said "socketpair: Too many open files"
prlimit --pid "$daemon" --nofile=1024:
ok "is started when it can be" ready
ok "and everybody is in the pool" [ "$(users)" = "$users" ]

stop TERM
ok "SIGTERM ends both" [ "$status" = 0 ]
ok "the daemon is gone" [ ! -e "$work/s" ]
"$bin/sidekv-keeper" --nonsense >"$work/log" 2>&1
status=$?
ok "a wrong option is not tried again" [ "$status" = 2 ]
timeout 120 "$bin/sidekv-keeper" --socket "$work/s" --store "$work/kept" --store-bytes 1M --pool-bytes 64M --device host >"$work/log" 2>&1
status=$?
ok "nor is a first start without its store" [ "$status" = 1 ]
timeout 120 "$bin/sidekv-keeper" --socket "$work/kept/data.mdb" --store none --pool-bytes 64M --device host >"$work/log" 2>&1
status=$?
ok "nor one where a file is in the socket's place" [ "$status" = 1 -a "$(grep -c 'not started' "$work/log")" = 1 ]
# A daemon that serves, gives its pool up as not to be trusted, and fails; the next one ends in order. keeper.h has the messages.
mkdir "$work/fake"
cp "$bin/sidekv-keeper" "$work/fake"
cat >"$work/fake/sidekvd" <<'END'
#!/bin/bash
say() { printf "SKvK\\x0$1%b" "$(printf '\\0%.0s' {1..27})" >&"$SIDEKV_KEEPER_FD"; }
echo >>"$0.starts"
[ "$(wc -l <"$0.starts")" = 2 ] && exit 0
say c
say 1
exit 1
END
chmod +x "$work/fake/sidekvd"
timeout 120 "$work/fake/sidekv-keeper" >"$work/log" 2>&1
status=$?
ok "one that has served is started anew, whatever it fails of" [ "$status $(wc -l <"$work/fake/sidekvd.starts")" = "0 2" ]
start sidekvd
"$bin/sidekvd" --socket "$work/second" --store "$work/kept" --pool-bytes 64M --device host --start-wait 700 >"$work/out" 2>&1
status=$?
ok "a second daemon waits for the store" [ "$status" = 1 ]
ok "and says once that it does, and once that it is over" [ "$(grep -c 'waiting for' "$work/out") $(grep -c 'another sidekvd' "$work/out")" = "1 1" ]
cli restart
ok "without a keeper there is no restart" [ "$status" = 1 ]
ok "and what to do is said" says "sidekv-keeper"

finish
