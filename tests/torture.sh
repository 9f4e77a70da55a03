#!/bin/sh
# Kills (tests/prove_kills.c) round after round, each with another seed, until one fails, or for so many hours.
# usage: tests/torture.sh PROGRAM [HOURS]   PROVE_SEED: the first seed; PROVE_SCALE: of a round
set -u
seed=${PROVE_SEED:-$(date +%s)}
export PROVE_SCALE="${PROVE_SCALE:-0.5}"
until=$(awk -v now="$(date +%s)" -v hours="${2:-876000}" 'BEGIN { printf "%d", now + hours * 3600 }')
log=$(mktemp "${TMPDIR:-/tmp}/sidekv-torture.XXXXXX")
trap 'rm -f "$log"' EXIT
rounds=0
while [ "$(date +%s)" -lt "$until" ]; do
    if ! PROVE_SEED=$seed "$1" >"$log" 2>&1; then
        cat "$log"
        echo "torture: round $((rounds + 1)) failed; to run it again: PROVE_SEED=$seed PROVE_SCALE=$PROVE_SCALE $1"
        exit 1
    fi
    rounds=$((rounds + 1))
    echo "torture: $(date -u +%FT%TZ) round $rounds, seed $seed: $(awk -F '\t' '$1 == "proved" { n += $4 } END { print n }' "$log") deaths and looks, no failure"
    seed=$((seed + 1))
done
