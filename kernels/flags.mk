# The instruction sets that the fast host layers are compiled for; host_math.c chooses at run time. Contraction is off
# everywhere: fused multiply-adds are written out, so that an optimiser never decides what a number is.
CFLAGS_host_math_avx512 = -O3 -ffp-contract=off -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512
CFLAGS_host_math_avx512bf16 = $(CFLAGS_host_math_avx512) -mavx512bf16
CFLAGS_host_math_avx2 = -O3 -ffp-contract=off -mavx2 -mfma
CFLAGS_host_math_portable = -O3 -ffp-contract=off
CFLAGS_model = -ffp-contract=off
