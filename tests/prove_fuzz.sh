#!/bin/sh
# libFuzzer over everything that decodes what others wrote: a minute each at scale 1, from the corpora in tests/corpus; then how
# much of the decoders the corpora reach. A crash names the input that makes it. usage: tests/prove_fuzz.sh [NAME...]
# PROVE_SCALE, PROVE_SEED: see prove.h; SIDEKV_FUZZ: the directory of the fuzzers (default: build/fuzz/tests, from make fuzz-programs)
set -u
cd "$(dirname "$0")/.." || exit 1
fuzzers=${SIDEKV_FUZZ:-build/fuzz/tests}
seconds=$(awk -v s="${PROVE_SCALE:-1}" 'BEGIN { t = int(50 * s + 0.5); print (t < 5 ? 5 : t > 60 ? t : s >= 1 ? 60 : t) }')
work=$(mktemp -d "${TMPDIR:-/tmp}/sidekv-fuzz.XXXXXX")
trap 'rm -rf "$work"' EXIT
bad=0

# promise, fuzzer, what it is, files of its decoders, their functions
run() {
    promise=$1 name=$2 what=$3 files=$4 decoders=$5
    mkdir -p "$work/$name" "build/fuzz/found"
    # the corpus alone: what it reaches, and that nothing of it fails
    failed=0
    for round in 1 2 3; do # threads take turns as they like
        LLVM_PROFILE_FILE="$work/$name.$round.profraw" "$fuzzers/fuzz_$name" -runs=0 "tests/corpus/$name" >"$work/log" 2>&1 || failed=1
    done
    [ $failed = 0 ] || tail -n 40 "$work/log"
    coverage "$name" "$files" "$decoders"
    LLVM_PROFILE_FILE=/dev/null "$fuzzers/fuzz_$name" -max_total_time="$seconds" -timeout=120 -rss_limit_mb=4096 \
        -len_control=0 -seed="${PROVE_SEED:-1}" -print_final_stats=1 -artifact_prefix=build/fuzz/found/"$name"- \
        "$work/$name" "tests/corpus/$name" >"$work/log" 2>&1
    status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/log")
    if [ $status != 0 ]; then
        failed=1
        tail -n 60 "$work/log" | cut -c 1-300
        sed -n 's/.*Test unit written to /the input: /p' "$work/log"
    fi
    [ $failed = 0 ] || bad=1
    printf 'proved\t%s\t%s\t%s\t%s\n' "$promise" "fuzzed for $seconds s: $what" "${runs:-0}" "$failed"
}

# Lines of the decoders that the corpus runs; below 95 % is a failure.
coverage() {
    llvm-profdata-14 merge -o "$work/$1.profdata" "$work/$1".*.profraw &&
        llvm-cov-14 report -show-functions -instr-profile="$work/$1.profdata" "$fuzzers/fuzz_$1" $2 >"$work/report"
    awk -v name="$1" -v wanted="$3" '
        BEGIN { count = split(wanted, list, " "); for (i in list) want[list[i]] = 1 }
        { f = $1; sub(/.*:/, "", f) }
        f in want { lines += $5; missed += $6; seen[f] = 1; if ($6 > 0) left = left sprintf(" %s (%d of %d)", f, $6, $5) }
        END {
            for (f in want) if (!(f in seen)) { print "no such decoder: " f; exit 1 }
            share = lines ? 100 * (lines - missed) / lines : 0
            printf "%s: the corpus runs %.1f %% of %d decoder lines%s\n", name, share, lines, left ? "; not:" left : ""
            exit share < 95
        }' "$work/report" || failed=1
}

# the fuzzers named, or all
wanted() {
    [ -z "$only" ] || case " $only " in *" $1 "*) ;; *) return 1 ;; esac
}
only="$*"
wanted handshake && run 7 handshake "handshakes: messages, descriptors, hang-ups" "daemon/peer.c common/fdpass.c" \
    "skv_receive_fds receive all_zero check_hello check_process map_gates release_drained let_in on_hello refuse on_hangup"
wanted entries && run 7 entries "ring entries and arenas, while a second thread changes them" daemon/commands.c \
    "skv_peer_serve check_entry copy_requests acquire_now do_acquire do_end name next_named do_lookup truncate_one do_truncate try_evict do_evict do_flush do_list do_nop records_found"
wanted answers && run 7 answers "the library: a daemon's welcome, fds, completions, grants, views, goodbye" \
    "client/skv_link.c client/skv_session.c client/skv_ring.c client/skv_batch.c client/skv_views.c client/skv_admin.c client/skv_watch.c" \
    "receive_welcome receive_extents check_welcome check_pool check_memory plain_text all_zero skv_link_open describe_server take skv_call skv_call_again read_grant read_grants tail_equal acquire_once acquire_all skv_views_grant skv_views_look skv_commit skv_lookup skv_list skv_stats read_goodbye"
wanted keeper && run 3 keeper "keeper and daemon: each other's messages, the manager's copies" "daemon/keeper_held.c daemon/kept.c common/notify.c" \
    "skv_held_open skv_held_listen skv_held_give take_back numbered end_daemon hold drop_worker skv_notify_stored skv_kept_take receive take map_sessions check_left on_keeper"
wanted records && run 5 records "store: records, pages, sidekv.store" "storage/store_read.c storage/state.c" \
    "skv_record_parse skv_store_scan skv_reader_record skv_reader_locate skv_page_verify slot_version parse_slot looks_ours read_slots"
wanted csv && run 6 csv "CSV logs" client/cli_log.c \
    "next_line split number rating header_role header_has read_header parse_event skip append read_events replay_log_read by_user_time_order by_value replay_log_finish"
exit $bad
