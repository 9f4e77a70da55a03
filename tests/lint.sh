#!/bin/sh
# Linters over the tree: clang-format, cppcheck, who may include what, and a few rules of the house. Exit 1 on any finding.
set -u
cd "$(dirname "$0")/.."
bad=0
found=$(mktemp)
trap 'rm -f "$found"' EXIT
sources=$(ls common/*.[ch] include/*.h kernels/*.[ch] storage/*.[ch] daemon/*.[ch] client/*.[ch] tests/*.[ch] bench/*.[ch] 2>/dev/null)

clang-format --dry-run --Werror $sources 2>"$found" || {
    bad=1
    echo "clang-format: run clang-format -i on:"
    sed -n 's/^\([^:]*\):.*/  \1/p' "$found" | sort -u
}

cppcheck --quiet --std=c11 --language=c --inline-suppr --error-exitcode=1 --enable=warning \
    --suppress=missingIncludeSystem --suppress=unknownMacro --suppress=normalCheckLevelMaxBranches \
    -j2 -Iinclude -Icommon -Ikernels -Istorage -Idaemon -Iclient common daemon client storage kernels/*.c >"$found" 2>&1 || {
    bad=1
    cat "$found"
}

# The analyzer follows a third of the paths that it would: its default of 225,000 nodes a function doubles the linters' time.
printf '%s\n' daemon/*.c client/skv_*.c | xargs -P2 -n4 clang-tidy --quiet \
    -checks='-*,bugprone-*,clang-analyzer-core.*,-clang-analyzer-core.NullDereference,-bugprone-easily-swappable-parameters,-bugprone-reserved-identifier,-bugprone-branch-clone,-bugprone-sizeof-expression,-bugprone-narrowing-conversions,-bugprone-assignment-in-if-condition,-bugprone-implicit-widening-of-multiplication-result' \
    --warnings-as-errors='*' \
    --extra-arg=-std=c17 --extra-arg=-D_GNU_SOURCE --extra-arg=-Iinclude --extra-arg=-Icommon --extra-arg=-Ikernels \
    --extra-arg=-Istorage --extra-arg=-Idaemon --extra-arg=-Iclient \
    --extra-arg=-Xclang --extra-arg=-analyzer-config --extra-arg=-Xclang --extra-arg=max-nodes=75000 >"$found" 2>/dev/null || {
    bad=1
    grep -E 'error|warning' "$found" | sort -u | head -40
}

# Who may include whom, beyond what the -I lists already forbid.
if grep -ln '#include <lmdb.h>' common/* kernels/* daemon/* client/* 2>/dev/null; then
    echo "lmdb.h belongs to storage/"; bad=1
fi
if grep -ln '#include <liburing.h>' common/* kernels/* client/* 2>/dev/null || grep -ln '#include <liburing.h>' daemon/* 2>/dev/null | grep -v loop_uring.c; then
    echo "liburing.h belongs to daemon/loop_uring.c and storage/direct.c"; bad=1
fi
if grep -nE '(gmtime|localtime)(_r)?\(|strftime\(' common/*.c storage/*.c daemon/*.c client/skv_*.c; then
    echo "libc's calendar takes a lock, which a forked child may never get: common/utc.h"; bad=1
fi
if grep -rnE '\.\./shared' common include kernels storage daemon client Makefile 2>/dev/null; then
    echo "the project stands alone"; bad=1
fi
if grep -rnIE '\b(hstu|design|facts|style)\.md' --exclude-dir=build --exclude-dir=.git --exclude-dir='.gpu-*' .; then
    echo "no such document here: say it in place, or cite a file of the project"; bad=1
fi
[ $bad = 0 ] && echo "lint: clean"
exit $bad
