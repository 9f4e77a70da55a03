#!/bin/bash
# sidekv replay against the real daemon, on the host device: right scores from a shared cache whatever dies, and clear refusals.
# usage: tests/proc_replay.sh   SIDEKV_BIN: see process.sh
. "$(dirname "$0")/process.sh"
# is NAME OPERATOR NUMBER
is() {
    local value
    value=$(field "$1")
    [ -n "$value" ] && [ "$value" "$2" "$3" ]
}
says() { grep -q -- "$1" "$work/err"; }
refused() { [ "$status" = 2 ] && says "$1"; }
nothing_left() { ! ls -d "$work"/sidekv-replay-* >/dev/null 2>&1 && ! pgrep -f "$work/sidekv-replay-" >/dev/null; }
small="--generate --users 30 --events-total 1500 --json"

# ---- right numbers

replay $small --no-cache
ok "without cache it runs without a daemon" [ "$status" = 0 ]
uncached=$(field scores_digest)
requests=$(field requests)
ok "requests were planned" [ "${requests:-0}" -gt 100 ]

replay $small --verify 1
ok "two workers share the cache" [ "$status" = 0 ]
ok "every score is right" is scores_wrong -eq 0
ok "every score was checked" is scores_checked -eq $((requests * 128))
ok "every row of K and V is right" is rows_wrong -eq 0
ok "rows were checked" is rows_checked -gt 1000
ok "all that the log allows came from the cache, but tails in the other's extent" is tokens_cached -ge $(($(field tokens_cacheable) * 98 / 100))
ok "the scores are those of a run without cache" [ "$(field scores_digest)" = "$uncached" ]
ok "daemon and temporary files are gone" nothing_left

replay $small --verify 1 --trust
ok "two that trust each other" [ "$status" = 0 ]
ok "all that the log allows came from the cache" is tokens_cached -eq "$(field tokens_cacheable)"
ok "every score of theirs is right" is scores_wrong -eq 0
ok "and every row" is rows_wrong -eq 0
ok "with the same scores" [ "$(field scores_digest)" = "$uncached" ]

replay $small --verify 0.3 --kill-worker-every 10
ok "workers may be killed" [ "$status" = 0 ]
ok "they were" is worker_restarts -ge 5
ok "scores stay right when workers die" is scores_wrong -eq 0
ok "the same scores as ever" [ "$(field scores_digest)" = "$uncached" ]
ok "a killed worker's users stay cached" is tokens_cached -ge $(($(field tokens_cacheable) * 98 / 100))

replay $small --batch 4 --workers 3 --verify 0.3
ok "batches of several users" [ "$status" = 0 ]
ok "a batch changes no score" [ "$(field scores_digest)" = "$uncached" ]

replay $small --limit-requests 40 --verify 1 --flip-token
ok "a flipped token is found" [ "$status" = 1 ]
ok "it shows in the scores" is scores_wrong -ge 1
ok "it shows in the rows" is rows_wrong -ge 1

replay $small --limit-requests 60 --compare --kill-worker-every 20
ok "cached and uncached side by side" [ "$status" = 0 ]
ok "both with the same scores" grep -q '"scores_same":true' "$work/out"

# ---- the store

replay $small --store "$work/store" --store-bytes 256M
ok "a store of one's own" [ "$status" = 0 ]
ok "it is kept" [ -e "$work/store/data.mdb" ]
replay $small --store "$work/store" --store-bytes 256M --verify 1
ok "the next run finds users stored" is hit_store_tokens -gt 0
ok "what the store gave is right" is scores_wrong -eq 0
ok "bit for bit" is rows_wrong -eq 0

replay $small --store "$work/store" --store-bytes 256M --pool-bytes 1M --verify 0.5
ok "a pool for few users makes shorter hits, not wrong ones" [ "$status" = 0 ]
ok "and the same scores" [ "$(field scores_digest)" = "$uncached" ]

# ---- where the private daemon is found

mkdir -p "$work/usr/bin" "$work/usr/sbin"
cp "$sidekv" "$work/usr/bin"
sidekv=$work/usr/bin/sidekv PATH=/usr/bin:/bin replay $small --limit-requests 4
ok "no sidekvd anywhere" [ "$status" = 1 ]
ok "is said" says "nor in PATH"
ok "and nothing of users or models" says "failed: no daemon"
cp "$sidekvd" "$work/usr/sbin"
sidekv=$work/usr/bin/sidekv PATH=/usr/bin:/bin replay $small --limit-requests 4
ok "as installed, in bin and sbin, with no sbin in PATH" [ "$status" = 0 ]

# ---- the daemon dies

export SIDEKV_LOG=error
start sidekvd
"$sidekv" --socket "$work/s" replay --device host --generate --users 40 --events-total 6000 --verify 0.3 --json \
    >"$work/out" 2>"$work/err" &
run=$!
commits() { "$sidekv" --socket "$work/s" stats --json 2>/dev/null | sed -n 's/.*"commits": *\([0-9]*\).*/\1/p'; }
for _ in $(seq 400); do # well begun: most of it is still to come
    n=$(commits)
    [ "${n:-0}" -ge 30 ] && break
    sleep 0.05
done
stop KILL
start sidekvd
wait $run
status=$?
run=""
ok "a killed daemon fails no run" [ "$status" = 0 ]
ok "the workers found the new one" is reconnects -ge 1
ok "and no score was wrong" is scores_wrong -eq 0
stop KILL
unset SIDEKV_LOG
replay $small --socket "$work/s"
ok "no daemon at --socket" [ "$status" = 1 ]
ok "is said" says "nobody listens\|hung up" # io_uring may close a dead daemon's socket a little later

# ---- logs and options

{
    echo "userId,movieId,rating,timestamp"
    for i in $(seq 64); do echo "1,$i,3.5,$((1000 + i))"; done
    echo "1,2,x,5"
    echo "1,2"
} >"$work/broken.csv"
replay "$work/broken.csv" --no-cache --json
ok "broken lines are skipped" [ "$status" = 0 ]
ok "counted" is lines_skipped -eq 2
ok "and named by number" says "broken.csv:66: column 3"
replay "$work/absent.csv"
ok "no such log" refused "No such file"
: >"$work/empty.csv"
replay "$work/empty.csv"
ok "an empty log" refused "is empty"
echo "a,b,c" >"$work/other.csv"
replay "$work/other.csv"
ok "another format" refused "neither MovieLens"
replay
ok "no log" refused "what to replay"
replay "$work/broken.csv" --generate
ok "two logs" refused "exclude"
replay --generate --workers 0
ok "no workers" refused "--workers: 0"
replay --generate --model huge
ok "an unknown model" refused "--model: huge"
replay --generate --verify 1.5
ok "a fraction above one" refused "--verify: 1.5"
replay --generate --flip-token
ok "a flip that nobody looks for" refused "--verify"
replay --generate --no-cache --verify 1
ok "nothing to verify" refused "--no-cache"
for option in "--store $work/store" "--pool-bytes 1M" "--store-bytes 64M" --protect --trust; do
    replay --generate --no-cache $option
    ok "no daemon for ${option%% *}" refused "and --no-cache has none"
done
replay --generate --socket "$work/s" --store "$work/store"
ok "a store for a foreign daemon" refused "--socket"
replay --generate --socket "$work/s" --trust
ok "nor is its protection ours to choose" refused "--trust"
replay --generate --nonsense
ok "an unknown option" refused "no such option: --nonsense"
replay --generate -xy
ok "an unknown letter" refused "no such option: -x$"
replay $small --store "$work/broken.csv"
ok "a store that is none" [ "$status" = 1 ]
ok "nothing is left behind" nothing_left

finish
