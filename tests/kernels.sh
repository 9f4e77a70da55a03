#!/bin/sh
# Looks through what ptxas said of kernels (build/obj/*.cu.o.ptxas): every kernel is there for sm_80 and sm_90a (for sm_90a alone where
# the file's name says so), none spills registers, and no products of matrices are held up by waits that ptxas put in (C75..: it could not
# tell that a register is left alone while they run). The build runs it on each object; without arguments: on all of build, with a table.
# usage: tests/kernels.sh [FILE...]
set -u
table=0
[ $# -gt 0 ] || {
    table=1
    cd "$(dirname "$0")/.." && set -- build/obj/kernels/*.cu.o.ptxas
}
for log in "$@"; do
    [ -r "$log" ] || { echo "tests/kernels.sh: no $log: build with nvcc first" >&2; exit 1; }
    grep -v '^ptxas info\|bytes stack frame\|^$' "$log" >&2 # warnings and errors, as they are
    awk -v name="$(basename "$log" .o.ptxas)" -v table=$table '
        BEGIN { only90 = name ~ /sm90/ }
        /Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; arch = part[4]; seen[kernel] = seen[kernel] " " arch; count[arch]++
                                     gsub(/__[0-9a-f]+_[0-9]+_/, "", kernel) }
        /\(C75[0-9]+\)/ { print name ": " $0; bad = 1 }
        / spill stores/ { if ($5 + $9 > 0) { print name ": " kernel " spills registers on " arch ": " $0; bad = 1 } }
        END {
            for (k in seen) if (seen[k] !~ /sm_90a/ || (!only90 && seen[k] !~ /sm_80/)) { print name ": " k " is built for" seen[k] " only"; bad = 1 }
            if (table) printf "%-24s %3d kernels for sm_80 %3d for sm_90a\n", name, count["sm_80"], count["sm_90a"]
            exit bad
        }' "$log" || exit 1
done
