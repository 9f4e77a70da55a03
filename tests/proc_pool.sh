#!/bin/bash
# The pool that a daemon takes without --pool-bytes, and what it says of it; a GPU is played, on the host device.
# usage: tests/proc_pool.sh   SIDEKV_BIN: see process.sh
. "$(dirname "$0")/process.sh"
warned() { grep -c 'a pool of only' "$work/log"; }
bytes() { # of the pool: of tiny's pages of 32 KiB
    cli stats
    echo $(($(sed -n 's/^pool_pages  *\([0-9]*\).*/\1/p' "$work/out") * 32768))
}
memory=$(($(getconf _PHYS_PAGES) * $(getconf PAGESIZE) / 8))
[ $memory -gt $((4 << 30)) ] && memory=$((4 << 30))

export SIDEKV_TEST_GPU_FREE=$((8 << 30))
start sidekvd --pool-bytes 0
ok "a GPU with no more than 8 GiB free gives 64 pages" [ "$(bytes)" = $((64 * 32768)) ]
ok "with a warning, said once, of how much is free and what to do" [ "$(warned) $(grep -c 'warn: .* 64 pages: 8192 MiB .* --pool-bytes' "$work/log")" = "1 1" ]
stop TERM
start sidekvd --pool-bytes 2M
ok "64 pages that were asked for are no reason to warn" [ "$(bytes) $(warned)" = "$((64 * 32768)) 0" ]
stop TERM
SIDEKV_TEST_GPU_FREE=$(((8 << 30) + (64 << 20)))
start sidekvd --pool-bytes 0
ok "64 MiB more are the pool, without one" [ "$(bytes) $(warned)" = "$((64 << 20)) 0" ]
stop TERM
unset SIDEKV_TEST_GPU_FREE
start sidekvd --pool-bytes 0
taken=$(bytes)
ok "the host gives an eighth of its memory, 4 GiB at most" [ "$taken" -ge $memory -a "$taken" -lt $((memory + (128 << 20))) ]
ok "without a warning" [ "$(warned)" = 0 ]
stop TERM
finish
