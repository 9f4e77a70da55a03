#!/usr/bin/env python3
"""Draws what `bench_block --csv` printed: the HSTU block with a KV cache, time against total and cached length, one SVG for each
batch size in the file, and a table of all cells. Lines: sidekv, the best dense and paged peers, the floor; and PyTorch's plain block where a file of
`torch_block.py --csv` is given too.

usage: plot_block.py BLOCK.csv OUT_PREFIX [TORCH.csv]     writes OUT_PREFIX-batch1.svg, OUT_PREFIX-batch8.svg, ..., OUT_PREFIX-grid.md
"""
import csv
import math
import os
import re
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 440, 64, 150, 44, 90
STYLES = {  # series: colour, dash
    "sidekv (paged)": ("#c0392b", ""),
    "best dense-KV peer": ("#2c6fad", ""),
    "best paged peer": ("#7f8c8d", ""),
    "PyTorch, plain": ("#8e6bbf", "6 3"),
    "floor": ("#27ae60", "2 3"),
}


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def series_of(block, torch):
    """{series: {(history, new): ms}} of one batch size."""
    out = {name: {} for name in STYLES}
    for row in block:
        at, us = (int(row["history"]), int(row["new"])), float(row["block"])
        out["sidekv (paged)"][at] = us / 1e3
        out["floor"][at] = float(row["floor"]) / 1e3
        for name, column in (("best dense-KV peer", "dense_peer_over"), ("best paged peer", "paged_peer_over")):
            over = float(row[column])
            if math.isfinite(over):
                out[name][at] = us * over / 1e3
    for row in torch:
        out["PyTorch, plain"][(int(row["history"]), int(row["new"]))] = float(row["block"]) / 1e3
    return {name: points for name, points in out.items() if points}


def draw(batch, series):
    cells = sorted(series["sidekv (paged)"], key=lambda at: (at[0], -at[1]))
    values = [ms for points in series.values() for ms in points.values()]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
    x = {at: LEFT + (i + 0.5) * (WIDTH - LEFT - RIGHT) / len(cells) for i, at in enumerate(cells)}

    def y(ms):
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - math.log(ms / low) / math.log(high / low))

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="22" font-size="15">HSTU block with KV cache, batch {batch}: ms (log) by history and cached tokens</text>']
    tick = low
    while tick <= high:
        for step in (1, 2, 5):
            if tick * step <= high:
                at = y(tick * step)
                svg.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
                           f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick * step:g}</text>')
        tick *= 10
    for at in cells:
        svg.append(f'<text transform="translate({x[at] + 4:.1f},{HEIGHT - BOTTOM + 8}) rotate(60)">{at[0]} / {at[0] - at[1]}</text>')
    for i, (name, points) in enumerate(series.items()):
        colour, dash = STYLES[name]
        for history in sorted({at[0] for at in points}):  # a line for each total length, from nothing cached on
            line = " ".join(f"{x[at]:.1f},{y(points[at]):.1f}" for at in cells if at in points and at[0] == history)
            svg.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        svg += [f'<circle cx="{x[at]:.1f}" cy="{y(points[at]):.1f}" r="2.5" fill="{colour}"/>' for at in cells if at in points]
        top = TOP + 14 + 18 * i
        svg.append(f'<line x1="{WIDTH - RIGHT + 8}" x2="{WIDTH - RIGHT + 28}" y1="{top}" y2="{top}" stroke="{colour}" '
                   f'stroke-width="2" stroke-dasharray="{dash}"/><text x="{WIDTH - RIGHT + 33}" y="{top + 4}">{name}</text>')
    return "\n".join(svg + ["</svg>", ""])


def peers():
    """{cell: (dense, paged)} in ms, which the CSV has as ratios of two digits only."""
    with open(os.path.join(os.path.dirname(__file__), "bench_peers.h")) as file:
        return {cell[:3]: cell[3:] for cell in re.findall(r"{(\d+), (\d+), (\d+), ([\d.]+), ([\d.]+)}", file.read())}


def table(block):
    lines = ["# The block, every cell", "",
             "`bench_block --csv`, ms; written by `bench/plot_block.py`. Machine, date and what the columns are: [benchmarks.md](benchmarks.md).", "",
             "| batch, history, new | sidekv | best dense-KV peer | best paged peer | floor | over dense | over paged | of the floor |",
             "|--|--|--|--|--|--|--|--|"]
    best = peers()
    for row in block:
        cell = row["batch"], row["history"], row["new"]
        ms, floor = float(row["block"]) / 1e3, float(row["floor"]) / 1e3
        dense, paged = best[cell]
        lines.append(f"| {', '.join(cell)} | {ms:.3f} | {dense} | {paged} | {floor:.3f} | {float(dense) / ms:.2f} | {float(paged) / ms:.2f} | {floor / ms:.2f} |")
    return "\n".join(lines + [""])


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    block, torch = rows_of(sys.argv[1]), rows_of(sys.argv[3]) if len(sys.argv) == 4 else []
    if not block:
        sys.exit(f"plot_block.py: no cells in {sys.argv[1]}: it takes the output of bench_block --csv")
    for batch in sorted({row["batch"] for row in block}, key=int):
        path = f"{sys.argv[2]}-batch{batch}.svg"
        with open(path, "w") as file:
            file.write(draw(batch, series_of(*([row for row in rows if row["batch"] == batch] for rows in (block, torch)))))
        print(path)
    path = f"{sys.argv[2]}-grid.md"
    with open(path, "w") as file:
        file.write(table(block))
    print(path)


main()
