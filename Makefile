# sidekv: one non-recursive Makefile. `make help` says what there is.
#
# A configuration is a build directory: build/ (CUDA when nvcc is there), build/host (HOST=1), build/asan, build/tsan,
# build/cov, build/fuzz (SAN=...). build/host links other objects of build/obj than build/ does: none is compiled differently.
# Sources are found by name, so that a new file needs no line here:
#   common/*.c               libskv-common     log, status, hashes, clock
#   kernels/device*.c        libskv-device     device.h and its backends: all that daemon and libsidekv link of kernels/
#   kernels/*.c, *.cu        libhstu-layers    reference, fast host version, CUDA
#   storage/*.c              libskv-storage
#   daemon/*.c               libskv-daemon     all but main.c and keeper.c; on top: bin/sidekvd, bin/sidekv-keeper
#   client/skv_*.c           libsidekv         client/runner*.c: libsidekv-hstu
#   client/cli_*.c           libskv-cli        all but cli_main.c; bin/sidekv is cli_main.c on top
#   tests/test_*.c           a Criterion program each; tests/stress_*.c, prove_*.c: plain programs; tests/proc_*.sh: process tests;
#                            tests/fuzz_*.c: libFuzzer's (SAN=fuzz); tests/shim_*.c: what provers preload
#   bench/bench_*.c, *.cu    bin/bench_*
# Who may include whom is the -I list of each folder, nothing else.

CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(firstword $(wildcard $(addsuffix /bin/nvcc,/usr/local/cuda /usr/local/cuda-13.0 /opt/cuda))))
NVCC ?= $(firstword $(wildcard $(CUDA_HOME:%=%/bin/nvcc)) $(shell command -v nvcc 2>/dev/null))
ifneq ($(HOST)$(SAN),)
NVCC := # sanitizers know nothing of device code
endif
ifeq ($(CUDA_HOME),) # an nvcc that PATH found: its home is above its bin
CUDA_HOME := $(patsubst %/bin/,%,$(dir $(realpath $(shell command -v $(NVCC) 2>/dev/null))))
endif
CUDA := $(if $(NVCC),1,)

CONFIG := $(if $(SAN),$(SAN),$(if $(HOST),host,))
B := build$(if $(CONFIG),/$(CONFIG),)
O := build$(if $(SAN),/$(SAN),)/obj
# V=1 shows whole commands.
Q := $(if $(V),,@)
say = $(if $(V),,@echo '  $(1)')
PREFIX ?= /usr/local
DESTDIR ?=

CC = gcc
OPT ?= -O2 -g
WARN = -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith -Wvla \
       -Wno-missing-field-initializers -Werror=implicit-function-declaration $(if $(WERROR),-Werror)
CFLAGS = -std=c17 -D_GNU_SOURCE $(OPT) $(WARN) -fno-strict-aliasing -fPIC -fvisibility=default -pthread
# More accesses are left to look at than with -O2, and it compiles in half the time.
ifneq ($(filter asan tsan,$(SAN)),)
OPT = -O1 -g1
endif
ifeq ($(SAN),asan)
CFLAGS += -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
LDFLAGS += -fsanitize=address,undefined
endif
ifeq ($(SAN),tsan)
CFLAGS += -fsanitize=thread -fno-omit-frame-pointer -Wno-tsan
LDFLAGS += -fsanitize=thread
endif
ifeq ($(SAN),fuzz)
CC = clang
OPT = -O1 -gline-tables-only
CFLAGS += -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer \
          -fprofile-instr-generate -fcoverage-mapping -Wno-unknown-pragmas
LDFLAGS += -fsanitize=address,undefined -fprofile-instr-generate
endif
ifeq ($(SAN),cov)
CFLAGS += --coverage -include tests/coverage_exit.h
LDFLAGS += --coverage
endif
LDFLAGS += -pthread
LIBS_COMMON = -lxxhash -lm -ldl -lrt
# Not /usr/include (a distribution's nvcc): that is where gcc looks, behind its C++ headers.
CUDA_INC := $(if $(CUDA),$(addprefix -isystem ,$(filter-out /usr/include,$(CUDA_HOME)/include)),)
CUDART := $(if $(CUDA),-L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt -lpthread,)
NVFLAGS = -O3 -std=c++17 -lineinfo -Xcompiler=-fno-exceptions,-fno-rtti,-fno-threadsafe-statics,-fPIC \
          --threads 2 --expt-relaxed-constexpr -Xptxas=-v
# sm_90a holds every kernel; sm_80 SASS serves 8.0, 8.6 and 8.9, its PTX the rest.
NVARCH_ALL = -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80
NVARCH_90 = -gencode arch=compute_90a,code=sm_90a

I_common  = -Iinclude -Icommon
I_kernels = -Iinclude -Icommon -Ikernels $(CUDA_INC)
I_storage = -Iinclude -Icommon -Istorage
I_daemon  = -Iinclude -Icommon -Ikernels -Istorage -Idaemon
I_client  = -Iinclude -Icommon -Ikernels -Iclient
I_tests   = -Iinclude -Icommon -Ikernels -Istorage -Idaemon -Iclient -Itests $(CUDA_INC)
I_bench   = $(I_tests) -Ibench

SRC_common  := $(wildcard common/*.c)
ABSENT      := kernels/device_cuda_absent.c kernels/layers_cuda_absent.c
SRC_device  := $(filter-out $(if $(CUDA),$(ABSENT),$(filter-out $(ABSENT),$(wildcard kernels/device_cuda*.c))),$(wildcard kernels/device*.c))
SRC_layers  := $(filter-out kernels/device% $(if $(CUDA),$(ABSENT),$(wildcard kernels/cuda_*.c)),$(wildcard kernels/*.c))
CU_layers   := $(if $(CUDA),$(wildcard kernels/*.cu),)
SRC_storage := $(wildcard storage/*.c)
SRC_daemon  := $(filter-out daemon/main.c daemon/keeper.c,$(wildcard daemon/*.c))
SRC_sidekv  := $(wildcard client/skv_*.c)
SRC_runner  := $(wildcard client/runner*.c)
SRC_cli     := $(filter-out client/cli_main.c,$(wildcard client/cli_*.c))
# Tests and benches of the CUDA layers need its headers, and share a plain CUDA reference.
CUDA_ONLY   := $(wildcard tests/test_*_cuda.c) $(addprefix bench/bench_,block.c gemm.c)
NEEDS_CUDA  := $(if $(CUDA),,$(CUDA_ONLY))
TESTS       := $(patsubst tests/%.c,$(B)/tests/%,$(filter-out $(NEEDS_CUDA),$(wildcard tests/test_*.c tests/stress_*.c)))
FUZZERS     := $(patsubst tests/%.c,$(B)/tests/%,$(wildcard tests/fuzz_*.c))
PROVERS     := $(patsubst tests/%.c,$(B)/tests/%,$(wildcard tests/prove_*.c))
SHIMS       := $(patsubst tests/%.c,$(B)/tests/%.so,$(wildcard tests/shim_*.c))
BENCHES     := $(patsubst bench/%.c,$(B)/bin/%,$(filter-out $(NEEDS_CUDA),$(wildcard bench/bench_*.c))) \
               $(if $(CUDA),$(patsubst bench/%.cu,$(B)/bin/%,$(wildcard bench/bench_*.cu)))

obj = $(patsubst %,$(O)/%.o,$(1))
A_common  = $(B)/lib/libskv-common.a
A_device  = $(B)/lib/libskv-device.a
A_layers  = $(B)/lib/libhstu-layers.a
A_storage = $(B)/lib/libskv-storage.a
A_daemon  = $(B)/lib/libskv-daemon.a
A_sidekv  = $(B)/lib/libsidekv.a
A_runner  = $(B)/lib/libsidekv-hstu.a
A_cli     = $(B)/lib/libskv-cli.a
BINS := $(if $(wildcard daemon/main.c),$(B)/bin/sidekvd $(B)/bin/sidekv-keeper) $(if $(wildcard client/cli_main.c),$(B)/bin/sidekv)

.PHONY: all
all: deps $(BINS) $(BENCHES) ## build the daemon, the CLI, the libraries and the benches

.PHONY: deps test-deps
deps: ## check for (as root: install) the Debian packages that the build needs
	@CUDA=$(CUDA) contrib/deps.sh $(DEPS)
test-deps: deps # and those that the tests need beside
	@contrib/deps.sh tests

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14
.PHONY: help

$(A_common): $(call obj,$(SRC_common))
$(A_device): $(call obj,$(SRC_device))
$(A_layers): $(call obj,$(SRC_layers) $(CU_layers))
$(A_storage): $(call obj,$(SRC_storage))
$(A_daemon): $(call obj,$(SRC_daemon))
$(A_sidekv): $(call obj,$(SRC_sidekv))
$(A_runner): $(call obj,$(SRC_runner))
$(A_cli): $(call obj,$(SRC_cli))
$(B)/lib/%.a:
	@mkdir -p $(@D)
	@rm -f $@
	$(Q)ar rcs $@ $^

# $(1) folder, $(2) what it needs. A change of flags is a change of configuration: clean by hand.
define cc_rule
$(O)/$(1)/%.c.o: $(1)/%.c | $(2)
	@mkdir -p $$(@D)
	$$(call say,CC $$<)
	$$(Q)$$(CC) $$(CFLAGS) $$(CFLAGS_$$(*F)) $$(I_$(1)) -MMD -MP -c $$< -o $$@
$(O)/$(1)/%.cu.o: $(1)/%.cu | deps
	@mkdir -p $$(@D)
	$$(call say,NVCC $$<)
	$$(Q)$$(NVCC) $$(NVFLAGS) $$(if $$(findstring sm90,$$*),$$(NVARCH_90),$$(NVARCH_ALL)) $$(I_$(1)) -MMD -MP -c $$< -o $$@ 2>$$@.ptxas || { cat $$@.ptxas >&2; exit 1; }
	$$(Q)tests/kernels.sh $$@.ptxas || { rm -f $$@; exit 1; }
endef
$(foreach d,common kernels storage daemon client bench,$(eval $(call cc_rule,$(d),deps)))
$(eval $(call cc_rule,tests,test-deps))

# The fast host layers are compiled for the instruction sets they dispatch on.
-include kernels/flags.mk

$(B)/bin/sidekvd $(B)/tests/bin/sidekvd: $(O)/daemon/main.c.o $(A_daemon) $(A_device) $(A_storage) $(A_common)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ -luring -llmdb $(LIBS_COMMON)
$(B)/bin/sidekv-keeper $(B)/tests/bin/sidekv-keeper: $(O)/daemon/keeper.c.o $(A_daemon) $(A_common)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LIBS_COMMON)
# Replays are arithmetic, which is five times slower when checked; the checked one is test_layers_host's.
ifeq ($(SAN),asan)
UNCHECKED := $(patsubst kernels/%,$(O)/unchecked/%.o,$(wildcard kernels/host_math_*.c))
$(UNCHECKED): $(O)/unchecked/%.c.o: kernels/%.c | deps
	@mkdir -p $(@D)
	$(call say,CC $<)
	$(Q)$(CC) $(CFLAGS) $(CFLAGS_$*) -fno-sanitize=all $(I_kernels) -MMD -MP -c $< -o $@
endif
$(B)/bin/sidekv: $(O)/client/cli_main.c.o $(UNCHECKED) $(A_cli) $(A_runner) $(A_sidekv) $(A_layers) $(A_device) $(A_common)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(CUDART) -ljansson $(LIBS_COMMON)
ALL_A = $(A_cli) $(A_daemon) $(A_runner) $(A_sidekv) $(A_layers) $(A_device) $(A_storage) $(A_common)
CORE_A = $(A_daemon) $(A_sidekv) $(A_device) $(A_storage) $(A_common)
$(B)/bin/bench_%: $(O)/bench/bench_%.c.o $(ALL_A)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(CUDART) -luring -llmdb $(LIBS_COMMON)
$(B)/bin/bench_%: $(O)/bench/bench_%.cu.o $(ALL_A)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(CUDART) -luring -llmdb $(LIBS_COMMON)
$(B)/tests/test_%: $(O)/tests/test_%.c.o $(ALL_A)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(CUDART) -lcriterion -luring -llmdb -ljansson $(LIBS_COMMON)
CUDA_A = $(if $(CUDA),$(call obj,tests/cuda_reference.cu)) $(A_layers) $(A_device) $(A_common)
$(patsubst %.c,$(B)/%,$(filter tests/%,$(CUDA_ONLY))): $(B)/tests/%: $(O)/tests/%.c.o $(CUDA_A)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(CUDART) -lcriterion $(LIBS_COMMON)
$(patsubst bench/%.c,$(B)/bin/%,$(filter bench/%,$(CUDA_ONLY))): $(B)/bin/%: $(O)/bench/%.c.o $(CUDA_A)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(CUDART) $(LIBS_COMMON)
$(filter $(B)/tests/stress_%,$(TESTS)) $(PROVERS): $(B)/tests/%: $(O)/tests/%.c.o $(CORE_A)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(CUDART) -luring -llmdb $(LIBS_COMMON)
$(patsubst %,$(B)/tests/%,test_adopt test_cache test_cache_store test_extents stress_cache stress_cache_all): LDFLAGS += -Wl,--wrap=calloc
$(B)/tests/test_ping: LDFLAGS += -Wl,--wrap=skv_open,--wrap=skv_ping,--wrap=skv_server,--wrap=skv_close
$(B)/tests/stress_cache_all: LDFLAGS += -Wl,--wrap=mmap,--wrap=munmap,--wrap=madvise
# These die, or stop, where a prover or a test tells them to: common/failpoint.h.
FAIL_BINS := $(B)/tests/bin/sidekvd $(B)/tests/bin/sidekv-keeper
$(B)/tests/test_takeover: | $(FAIL_BINS)
$(FAIL_BINS) $(B)/tests/prove_kills: $(O)/tests/failpoint.c.o
$(FUZZERS): $(B)/tests/%: $(O)/tests/%.c.o $(call obj,client/cli_log.c) $(CORE_A)
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -fsanitize=fuzzer -o $@ $^ -luring -llmdb $(LIBS_COMMON)
$(B)/tests/fuzz_entries: LDFLAGS += -Wl,--wrap=calloc
$(B)/tests/fuzz_answers: LDFLAGS += -Wl,--wrap=skv_log,--wrap=poll,--wrap=clock_gettime,--wrap=mmap,--wrap=munmap
$(B)/tests/fuzz_keeper: LDFLAGS += -Wl,--wrap=skv_log,--wrap=poll,--wrap=skv_notify_open,--wrap=skv_notify_store,--wrap=skv_notify_drop

.PHONY: binaries programs
binaries: deps $(BINS) ## build the daemon and the CLI only
# Criterion does not run under TSan: there the threaded programs are plain ones. stress_cache% has one thread, and nothing to find.
THREADED = $(filter-out %/stress_cache %/stress_cache_all,$(filter $(B)/tests/stress_%,$(TESTS)))
programs: $(if $(filter tsan,$(SAN)),$(THREADED),$(TESTS)) ## build the test programs of this configuration

.PHONY: provers
provers: $(PROVERS) $(B)/tests/stress_cache $(B)/tests/stress_cache_all $(FAIL_BINS) $(SHIMS)
# What provers preload into other programs.
$(B)/tests/shim_%.so: $(O)/tests/shim_%.c.o
	@mkdir -p $(@D)
	$(call say,LD $@)
	$(Q)$(CC) $(LDFLAGS) -shared -o $@ $^ -ldl

.PHONY: fuzzers
fuzzers: $(FUZZERS)

PROCS := $(wildcard tests/proc_*.sh)
ASAN_TESTS := $(patsubst build/%,build/asan/%,$(filter-out %_cuda,$(TESTS)))
# proc_systemd takes a minute there, and what it has of the keeper test_fdstore has too.
ASAN_PROCS := $(filter-out %_systemd.sh,$(PROCS))
TSAN_TESTS := $(patsubst build/%,build/tsan/%,$(THREADED))

.PHONY: check
check: all $(TESTS) ## unit and process tests of this configuration
	@tests/run.sh $(TESTS) SIDEKV_BIN=$(B)/bin $(PROCS)

.PHONY: test
test: all $(TESTS) others ## everything that CI runs: both builds, all tests, sanitizers, linters
	@contrib/deps.sh lint
	@tests/run.sh tests/lint.sh $(TESTS) $(PROCS) $(ASAN_TESTS) $(TSAN_TESTS) SIDEKV_BIN=build/asan/bin $(ASAN_PROCS)

# The other configurations, beside this one but for the host's, which takes its objects.
.PHONY: others asan tsan host
others: asan tsan host
asan: deps
	@$(MAKE) --no-print-directory SAN=asan binaries programs
tsan: deps
	@$(MAKE) --no-print-directory SAN=tsan programs
host: all $(TESTS)
	@$(MAKE) --no-print-directory HOST=1 all

# test_plan_cuda makes no CUDA call, which compute-sanitizer takes for an error.
GPU_TESTS := $(addprefix $(B)/tests/,test_device test_plan_cuda test_gate_cuda test_products_cuda test_attention_cuda test_layers_cuda test_waits_cuda)
.PHONY: test-gpu
test-gpu: all $(TESTS) ## on a machine with a GPU: its tests on both kernel paths, the grid's every cell, then memcheck
	@SIDEKV_TEST_GRID=1 tests/run.sh $(GPU_TESTS) $(addprefix $(B)/tests/,test_pool_fds test_restart test_standby test_protect) tests/proc_systemd.sh HSTU_KERNELS=portable $(filter %_cuda,$(GPU_TESTS))
	@tests/sanitize_cuda.sh memcheck $(filter-out %/test_plan_cuda,$(GPU_TESTS))

# SCALE=full|ci|FACTOR: the full counts, a sixteenth of them, or so many times them.
SCALE ?= full
PROVE_SCALE := $(patsubst full,1,$(patsubst ci,0.0625,$(SCALE)))
# The longest first, so that none is left alone at the end.
PROVED := $(addprefix build/host/tests/,$(notdir $(PROVERS))) $(wildcard tests/prove_*.sh)
PROVED_FIRST := $(addprefix build/host/tests/prove_,faults kills hostile)
.PHONY: guarantees
guarantees: host-provers fuzz-programs ## prove the promises of docs/guarantees.md: SCALE=full (most of an hour), or ci (a sixteenth)
	@PROVE_SCALE=$(PROVE_SCALE) tests/guarantees.sh $(PROVED_FIRST) $(filter-out $(PROVED_FIRST),$(PROVED))
.PHONY: host-provers fuzz-programs
host-provers: deps
	@$(MAKE) --no-print-directory HOST=1 binaries provers
fuzz-programs: deps
	@contrib/deps.sh fuzz
	@$(MAKE) --no-print-directory SAN=fuzz fuzzers

.PHONY: torture
torture: host-provers ## kill daemon, workers and keeper until one dies wrong, or for HOURS=N; a new seed each round
	@tests/torture.sh build/host/tests/prove_kills $(HOURS)

.PHONY: fuzz
fuzz: fuzz-programs ## libFuzzer over all decoders, SCALE as for guarantees (full: a minute each)
	@PROVE_SCALE=$(PROVE_SCALE) tests/prove_fuzz.sh

.PHONY: coverage
coverage: ## line coverage of all tests on the host; less than 90 % is a failure
	@$(MAKE) --no-print-directory SAN=cov binaries programs
	@find build/cov -name '*.gcda' -delete
	@tests/run.sh SIDEKV_BIN=build/cov/bin $(addprefix build/cov/tests/,$(notdir $(filter-out %_cuda,$(TESTS)))) $(PROCS)
	@tests/coverage.sh build/cov

# Not under valgrind: threads by the hundred, whole daemons, what is in the page cache, and the layers' arithmetic.
VALGRIND_NOT := stress_% %_cuda test_admin test_restart test_standby test_takeover test_refusals test_hostile test_gates test_protect test_fdpass test_fdstore \
                test_client% test_mover% test_direct test_store_crash test_layers_host test_reference test_model
.PHONY: valgrind
valgrind: ## memcheck over the unit tests of the host build
	@contrib/deps.sh valgrind
	@$(MAKE) --no-print-directory HOST=1 programs
	@HSTU_HOST_MATH=portable tests/valgrind.sh $(addprefix build/host/tests/,$(filter-out $(VALGRIND_NOT),$(notdir $(TESTS))))

.PHONY: lint
lint: ## clang-format, cppcheck, clang-tidy, and who includes whom
	@contrib/deps.sh lint
	@tests/lint.sh

.PHONY: demo
demo: all ## the main job: two workers on one cache, one of them killed, beside the same work without a cache
	@$(B)/bin/sidekv replay --generate --workers 2 --kill-worker-every 40 --verify 0.05 --compare

.PHONY: bench
bench: all ## the figures of docs/benchmarks.md that this machine can give; PARTS="block torch": only these
	@bench/run.sh $(B)/bin $(PARTS)

.PHONY: install
install: DEPS = check # it installs this project, and nothing else unasked
install: binaries ## programs, libraries, headers, man pages and the systemd unit, under $(DESTDIR)$(PREFIX)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/sbin $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib/pkgconfig \
	    $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/share/man/man8
	install -m 755 $(B)/bin/sidekv $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(B)/bin/sidekvd $(B)/bin/sidekv-keeper $(DESTDIR)$(PREFIX)/sbin
	install -m 644 include/sidekv.h include/hstu.h $(DESTDIR)$(PREFIX)/include
	install -m 644 $(INSTALLED_A) $(DESTDIR)$(PREFIX)/lib
	install -m 644 $(wildcard man/*.1) $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 644 $(wildcard man/*.8) $(DESTDIR)$(PREFIX)/share/man/man8
	for unit in sidekvd.service libsidekv.pc libsidekv-hstu.pc; do \
	    case $$unit in *.pc) to=lib/pkgconfig ;; *) to=lib/systemd/system ;; esac; \
	    sed -e 's|@PREFIX@|$(PREFIX)|g' -e "s|@VERSION@|$$(sed -n 's/.*SKV_VERSION *"\(.*\)"/\1/p' include/sidekv.h)|g" \
	        -e 's|@CUDART@|$(CUDART)|g' contrib/$$unit.in >$(DESTDIR)$(PREFIX)/$$to/$$unit || exit 1; done

# What a worker links: each archive whole, what it needs merged in.
INSTALLED_A := $(B)/lib/installed/libsidekv.a $(B)/lib/installed/libsidekv-hstu.a
$(B)/lib/installed/libsidekv.a: $(A_sidekv) $(A_device) $(A_common)
$(B)/lib/installed/libsidekv-hstu.a: $(A_runner) $(A_layers)
$(B)/lib/installed/%.a:
	@mkdir -p $(@D)
	@(echo "create $@"; for a in $^; do echo "addlib $$a"; done; echo save; echo end) | ar -M
install: $(INSTALLED_A)

.SECONDARY:
-include $(shell find $(O) -name '*.d' 2>/dev/null)

clean: ## remove every build directory
	rm -rf build
.PHONY: clean
