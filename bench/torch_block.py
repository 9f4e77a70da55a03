#!/usr/bin/env python3
"""A plain PyTorch HSTU block, as a public yardstick for bench_block: cuBLAS matmuls, F.layer_norm,
F.silu, attention by batched matmul over a contiguous K and V, one CUDA graph. Same model and grid
(8 layers, hidden 1024, 4 heads of 256, 256 candidates, bf16), random data, L2 emptied before each
run, times by CUDA events.

usage: torch_block.py [--batch B] [--history H] [--new N] [--seconds S] [--csv]
"""
import argparse
import sys
import time

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    sys.exit("torch_block.py: no PyTorch here")

LAYERS, E, H, D, T, N = 8, 1024, 4, 256, 256, 4352
HD = H * D


def block(x, weights, cache_k, cache_v, mask):
    """x [B, q, E]; cache_k, cache_v [L, B, H, c, D]; mask [q, c + q]."""
    batch, rows, _ = x.shape
    for layer, (w1, b1, uvqk, bias, w2, b2, proj) in enumerate(weights):
        m = F.silu(F.linear(F.layer_norm(x, (E,), w1, b1), uvqk, bias))
        u, v, q, k = (t.view(batch, rows, H, D).transpose(1, 2) for t in m.split(HD, dim=-1))
        k = torch.cat([cache_k[layer], k], dim=2)
        v = torch.cat([cache_v[layer], v], dim=2)
        p = F.silu(torch.matmul(q, k.transpose(2, 3)) * D**-0.5) * mask
        o = (torch.matmul(p, v) / N).transpose(1, 2).reshape(batch, rows, HD)
        u = u.transpose(1, 2).reshape(batch, rows, HD)
        x = x + F.linear(u * F.layer_norm(o, (HD,), w2, b2), proj)
    return x


def mask_of(history, cached):
    """Causal over history; a candidate sees the history and itself."""
    rows = torch.arange(cached, history + T, device="cuda")[:, None]
    keys = torch.arange(history + T, device="cuda")[None, :]
    allowed = (keys <= rows) & ((keys < history) | (keys == rows))
    return allowed.to(torch.bfloat16)


def measure(batch, history, new, seconds, flush):
    def random(*shape, scale=1.0):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale

    cached = history - new
    weights = [
        (random(E), random(E), random(4 * HD, E, scale=0.06), random(4 * HD), random(HD), random(HD),
         random(E, HD, scale=0.03)) for _ in range(LAYERS)
    ]
    x = random(batch, new + T, E)
    cache_k, cache_v = random(LAYERS, batch, H, cached, D), random(LAYERS, batch, H, cached, D)
    mask = mask_of(history, cached)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        block(x, weights, cache_k, cache_v, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block(x, weights, cache_k, cache_v, mask)
    times, end = [], time.monotonic() + seconds
    while len(times) < 10 or time.monotonic() < end:
        flush.sum()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1000)
    times.sort()
    return times[len(times) // 2], times[len(times) * 9 // 10]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("batch", "history", "new"):
        parser.add_argument("--" + name, type=int)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--csv", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch_block.py: no GPU here")
    print(f"# PyTorch {torch.__version__}, {torch.cuda.get_device_name()}; times in us")
    print("batch,history,new,block,block_p90" if options.csv else "batch history   new     block"
          "       p90")
    flush = torch.ones(64 << 20, device="cuda")
    with torch.no_grad():
        for batch in (1, 2, 4, 8):
            for history in (128, 256, 512, 1024, 2048, 4096):
                new = history
                while new >= 128:
                    wanted = ((options.batch, batch), (options.history, history), (options.new, new))
                    if all(want is None or want == got for want, got in wanted):
                        try:
                            median, p90 = measure(batch, history, new, options.seconds, flush)
                        except torch.OutOfMemoryError:
                            median = p90 = float("nan")
                        form = "%d,%d,%d,%.1f,%.1f" if options.csv else "%5d %7d %5d %9.1f %9.1f"
                        print(form % (batch, history, new, median, p90), flush=True)
                        torch.cuda.empty_cache()
                    new //= 2


if __name__ == "__main__":
    main()
