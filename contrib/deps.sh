#!/bin/sh
# Checks that the Debian packages the build needs are there. As root it installs what is missing; otherwise, and with `check`, it names
# the command. Quiet and fast when nothing is missing. Usage: [CUDA=1] contrib/deps.sh [check|tests|lint|fuzz|valgrind]   CUDA: with nvcc
set -eu
# header to look for, package
need="liburing.h:liburing-dev lmdb.h:liblmdb-dev xxhash.h:libxxhash-dev jansson.h:libjansson-dev"
[ "${1:-}" != tests ] || need="$need criterion/criterion.h:libcriterion-dev"
missing=""
for n in $need; do
    header=${n%%:*} package=${n#*:} found=""
    for dir in /usr/include /usr/local/include $(echo "${CPATH:-}" | tr : ' '); do
        [ -e "$dir/$header" ] && found=1 && break
    done
    [ -n "$found" ] || missing="$missing $package"
done
tools="gcc:gcc make:make"
[ -z "${CUDA:-}" ] || tools="$tools g++:g++" # nvcc has gcc compile C++
case "${1:-}" in
lint) tools="$tools clang-format:clang-format clang-tidy:clang-tidy cppcheck:cppcheck" ;;
fuzz) # libFuzzer, the sanitizers and what reads clang's coverage
    tools="$tools clang:clang llvm-cov-14:llvm-14"
    [ -e /usr/lib/llvm-14/lib/clang/14.0.6/lib/linux/libclang_rt.fuzzer-x86_64.a ] || missing="$missing libclang-rt-14-dev" ;;
valgrind) tools="$tools valgrind:valgrind" ;;
esac
for t in $tools; do
    command -v "${t%%:*}" >/dev/null 2>&1 || missing="$missing ${t#*:}"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && [ "${1:-}" != check ]; then
    echo "installing:$missing"
    exec 9<"$0" # two makes, one apt-get
    flock 9
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >/dev/null
else
    echo "missing Debian packages; run: sudo apt-get install$missing" >&2
    exit 1
fi
