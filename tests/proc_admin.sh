#!/bin/bash
# The commands of sidekv that look and manage, against a real daemon with users that a replay left there.
# usage: tests/proc_admin.sh   SIDEKV_BIN: see process.sh
. "$(dirname "$0")/process.sh"
is() { [ "$status" = "$1" ] && { [ $# = 1 ] || grep -q -- "$2" "$work/out" "$work/err"; }; }
value() { sed -n "s/^ *$1  *\([0-9]*\).*/\1/p" "$work/out"; } # of `user` and `stats`

cli ping
ok "without a daemon a command fails and says how to start one" is 1 "sidekvd"
ok "with the time in front" grep -Eq '^20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z sidekv\[[0-9]+\] error: ' "$work/err"
export JOURNAL_STREAM
JOURNAL_STREAM=$(stat -c %d:%i "$work/err") cli ping
ok "or, for the journal, its priority" grep -q '^<3>sidekv\[' "$work/err"
JOURNAL_STREAM=$(stat -c %d:%i "$work/out") cli ping
ok "but not where stderr is another file" grep -q '^20.*Z sidekv\[' "$work/err"
unset JOURNAL_STREAM
cli --socket "$work/err" ping
ok "a file that is no socket is said to be none" is 1 "err is not a sidekvd socket"
start sidekvd
awk 'BEGIN { print "userId,movieId,rating,timestamp"
    for (i = 0; i < 96; i++) for (u = 1; u <= 4; u++) printf "%d,%d,%.1f,%d\n", u, (i * 7 + u) % 50, i % 10 / 2, 1000 + i }' >"$work/log.csv"
replay "$work/log.csv" --socket "$work/s" --workers 1
ok "a replay fills the daemon that --socket names" is 0

cli ping -c 5
ok "ping names the daemon and its round trips" is 0 "5 round trips"
cli users
ok "users lists all four" [ "$(grep -c '^[0-9a-f]\{32\}' "$work/out")" = 4 ]
model=$(sed -n 's/^\([0-9a-f]\{32\}\) .*/\1/p' "$work/out" | head -1)
cli users --limit 2 --json
ok "users takes a limit, and speaks JSON" [ "$(grep -o '"committed_tokens"' "$work/out" | wc -l)" = 2 ]
cli users --model 00000000000000000000000000000001
ok "users of another model are none" [ "$(grep -c '^[0-9a-f]\{32\}' "$work/out")" = 0 ]
cli flush
ok "flush says that everything is stored" is 0 "everything committed is stored"
cli user 1
committed=$(value committed)
ok "a user is committed, resident and stored" [ "${committed:-0}" -gt 64 -a "$(value resident)" = "$(value stored)" ]
cli user 1 --json
ok "a user in JSON" is 0 "\"committed_tokens\": *$committed"
cli user 9
ok "an unknown user is an error in words" is 1 "user 9"

cli evict 1
ok "evict frees the pool" is 0 "no longer in the pool"
cli user 1 --model "$model"
ok "an evicted user stays committed and stored, and is not resident" [ "$(value resident)" = 0 -a "$(value stored)" = "$committed" ]
cli truncate 1 64
ok "an evicted user is truncated in the store" is 0 "64 tokens committed"
cli truncate 2 70
ok "a resident one to whole pages" is 0 "64 tokens committed"
cli user 2
ok "what was cut is gone from pool and store" [ "$(value committed)" = 64 -a "$(value stored)" = 64 ]
cli forget 3
ok "forget says so" is 0 "forgotten"
cli user 3
ok "a forgotten user is unknown" is 1
cli forget 3
ok "and cannot be forgotten twice" is 1
key=$(printf '%032x' 4)
cli evict --key "$key"
ok "a user by key" is 0 "no longer in the pool"
cli forget somebody
ok "a named user is another one" is 1 "somebody"
cli restart
ok "restart without a keeper says what it lacks" is 1 "keeper"
cli stats
ok "stats counts the cuts" [ "$(value cuts)" -ge 3 ]
ok "stats knows the users" [ "$(value users_known)" = 3 ]
cli stats --json
ok "stats in JSON" is 0 '"users_known": *3'

# cut_short ARGUMENT...: what it prints cannot be written
cut_short() {
    "$sidekv" --socket "$work/s" "$@" >/dev/full 2>"$work/err"
    status=$?
    : >"$work/out"
}
for line in "ping -c 1" stats "stats --json" users "users --json" "user 1" flush --version --help help "help truncate" "help replay" \
    "replay --generate --users 2 --events-total 32 --device host --json"; do
    cut_short $line
    ok "sidekv $line: output that is lost is a failure" is 1 "output is not complete"
done

stop TERM
ok "the daemon ends well" [ $status = 0 ]
start sidekvd
cli user 3
ok "forgotten stays forgotten in the next daemon" is 1
cli user 1
ok "truncated stays truncated" [ "$(value committed)" = 64 ]

for line in "" "nonsense" "ping -c 0" "ping -c x" "users --limit x" "user" "user 1 2" "user 1 --key $key" "user --key xyz" "truncate 1" \
    "truncate 1 x" "stats --limit 3" "evict 1 --model 12" "flush now" "ping --nothing" "help nonsense" "help ping pong"; do
    cli $line
    ok "wrong: sidekv $line" is 2
done
cli ping -xy
ok "of letters the one that is unknown is named" is 2 "no such option: -x;"
cli -xy
ok "before the command too" is 2 "no such option: -x;"
cli ping --help=yes
ok "and the word, of an option that takes no value" is 2 "no such option: --help=yes;"
"$sidekvd" --epoll -xy >"$work/out" 2>"$work/err"
status=$?
ok "by the daemon as well" is 2 "missing value: -x$"
for line in --help --version "help truncate" "stats --help" help "help help" "help --help" "help -h" "replay -h" "replay --generate -h"; do
    cli $line
    ok "sidekv $line" is 0
done
finish
