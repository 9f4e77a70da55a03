#!/bin/sh
# The cache core against the simulated world of cache_workers.h, at full length (promises 1 and 3). A failing run prints its seed and a
# shrunk trace. usage: tests/prove_core.sh   SIDEKV_TESTS: the directory of the test programs; PROVE_SCALE, PROVE_SEED: see prove.h
set -u
tests=${SIDEKV_TESTS:-$(dirname "$0")/../build/host/tests}
scale=${PROVE_SCALE:-1} seed=${PROVE_SEED:-1} bad=0
proved() { printf 'proved\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4"; }

operations=$(awk -v s="$scale" 'BEGIN { n = int(10000000 * s); print (n < 1000 ? 1000 : n) }')
"$tests/stress_cache" "$operations" "$seed"
status=$?
[ $status = 0 ] || bad=1
proved 1 "random operations on the core, beside a simulated world" "$operations" $status

length=$(awk -v s="$scale" 'BEGIN { print (s >= 1 ? 4 : s >= 0.05 ? 3 : 2) }')
said=$("$tests/stress_cache_all" "$length")
status=$?
echo "$said"
[ $status = 0 ] || bad=1
proved 1 "every sequence of up to $length operations, 3 users, 2 clients" "$(echo "$said" | sed -n 's/.*: \([0-9]*\) worlds, ok/\1/p')" $status
exit $bad
