"""The picture of the datapath's bench: what a packet costs by number of rules, and how many pass a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

STYLES = {
    "ours": ("#0b6e4f", "o", "-"), "2 × kernel LPM": ("#6b7280", "s", "--"), "nft linear": ("#b91c1c", "v", ":"),
    "nft layered": ("#d97706", "^", ":"), "nft tree": ("#7c3aed", "D", ":"), "bare": ("#111827", "x", "-"),
}  # fmt: skip


def draw(curves: Mapping[str, Mapping[int, float]], path: Path, words: str) -> None:
    """Write a PNG. `curves` as `datapath_figures.curve` makes them; `words` say where they were measured."""
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for name, points in curves.items():
        place, label = (right, name.removeprefix("Mpps ")) if name.startswith("Mpps ") else (left, name)
        colour, marker, line = STYLES.get(label, ("#2563eb", ".", "-"))
        numbers = sorted(points)
        place.plot(
            numbers, [points[n] for n in numbers], color=colour, marker=marker, linestyle=line, label=label
        )
    left.set(
        title="A new flow, above the bare program\n(nft: on the veth pair, above bare XDP_DROP)",
        xlabel="rules (LPM: prefixes)",
        ylabel="ns per packet",
    )
    right.set(
        title="Through a veth pair, new flows\n(one CPU for sender and receiver)",
        xlabel="rules",
        ylabel="million packets a second",
    )
    for place in (left, right):
        place.set(xscale="log", yscale="log")
        place.grid(visible=True, which="major", alpha=0.3)
        if place.has_data():
            place.legend(frameon=False)
    drawing.supxlabel(words, fontsize=8, color="#4b5563")
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)
