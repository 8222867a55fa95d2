"""What each optimisation gains, alone."""

import argparse
from statistics import median

from peers import PRECISIONS, gains
from report import Row
from weights_cache import v1_weights

from ldm.log import notice
from ldm.weights.loading import ROOT, V1_CONFIG


def measure_ideas(options: argparse.Namespace) -> list[Row]:
    files = {"config": ROOT / V1_CONFIG, "weights": v1_weights(options)}
    rows = []
    for precision in options.precisions or (["full", "bf16"] if options.device == "cpu" else ["half"]):
        notice(f"ideas: {PRECISIONS[precision]}")
        found = gains(files, precision, options.device, options.repeats)
        times = {ideas: {part: median(of[part]) for part in of} for ideas, of in found.items()}
        for ideas, ours in times.items():
            shown = f"step {ours['step']:.3g} s, decode {ours['decode']:.3g} s"
            if ideas:
                before = times[ideas[:-1] if ideas[0] != "compiled" else ideas[1:]]
                shown += "; gain {step:.3f}x, {decode:.3f}x".format_map(
                    {k: before[k] / ours[k] for k in ours}
                )
            name = ", ".join(ideas) or "plain (`--eager`)"
            rows.append(Row(f"{PRECISIONS[precision]}: {name}", "", shown, values=found[ideas]))
    return rows
