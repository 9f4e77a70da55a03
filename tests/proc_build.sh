#!/bin/bash
# What a build asks for and where it looks, on a machine that PATH plays; nothing is built.
# usage: tests/proc_build.sh   SIDEKV_BIN: see process.sh
. "$(dirname "$0")/process.sh"
cd "$(dirname "$0")/.." || exit 1
unset MAKEFLAGS MFLAGS HOST SAN NVCC

mkdir -p "$work/path" "$work/cuda/bin"
for tool in gcc make tr id find echo; do
    ln -s "$(type -P $tool)" "$work/path"
done
# make_there ARGUMENT...: on that machine, which has no g++
make_there() {
    env PATH="$work/path" CUDA_HOME= make -s "$@" >"$work/out" 2>"$work/err"
    status=$?
}
make_there deps DEPS=check
ok "without nvcc no g++ is asked for" [ "$status" = 0 ]
printf '#!/bin/sh\n' >"$work/cuda/bin/nvcc"
chmod +x "$work/cuda/bin/nvcc"
ln -s "$work/cuda/bin/nvcc" "$work/path"
home=$(realpath "$work/cuda")
make_there deps DEPS=check
ok "with nvcc it is" grep -q 'apt-get install g++$' "$work/err"
make_there deps DEPS=check HOST=1
ok "but not for the host's build" [ "$status" = 0 ]
make_there --eval 'flags: ; @echo $(CUDA_INC) $(CUDART)' flags
ok "an nvcc of PATH alone has its headers and libraries above its bin" grep -q -- "^-isystem $home/include -L$home/lib64 " "$work/out"
make_there --eval 'flags: ; @echo "[$(CUDA_INC)]"' flags CUDA_HOME=/usr
ok "but /usr/include stays behind the compiler's own headers" grep -q '^\[\]$' "$work/out"
finish
