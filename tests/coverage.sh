#!/bin/sh
# Line coverage by gcov of what the programs of a build with SAN=cov have run: a line a file, the least covered first, then the sum.
# A header counts as the object that runs most of it. Exit 1 below 90 %. usage: tests/coverage.sh [BUILD]   (default build/cov)
set -u
cd "$(dirname "$0")/.." || exit 1
find "${1:-build/cov}"/obj/common "${1:-build/cov}"/obj/kernels "${1:-build/cov}"/obj/storage "${1:-build/cov}"/obj/daemon \
    "${1:-build/cov}"/obj/client -name '*.gcno' | sort | xargs gcov -n 2>/dev/null | awk '
    /^File/ { file = substr($2, 2, length($2) - 2) }
    /^Lines executed/ && file ~ /^(common|kernels|storage|daemon|client)\// {
        split($2, part, /[:%]/)
        run = int(part[2] * $4 / 100 + 0.5)
        if (!(file in lines) || run > ran[file]) { lines[file] = $4; ran[file] = run }
        file = ""
    }
    END {
        for (f in lines) {
            all += lines[f]; hit += ran[f]
            printf "%5.1f %% of %4d  %s\n", 100 * ran[f] / lines[f], lines[f], f | "sort -n"
        }
        close("sort -n")
        printf "coverage: %.1f %% of %d lines\n", all ? 100 * hit / all : 0, all
        exit !all || hit < 0.9 * all
    }'
