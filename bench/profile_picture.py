"""Draw the profile of a run from its receipts: what each stage of each unit did.

`python bench/profile_picture.py DATASET PICTURE.svg`; bench/run.py draws one of its own run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from latentcache.bottleneck import STAGES, PipelineLoad, StageLoad
from latentcache.dataset.receipts import Receipt, list_receipt_names, read_receipts
from latentcache.storage import Store

_WIDTH, _BAR, _GAP, _LEFT, _RIGHT, _TOP = 780, 22, 14, 150, 150, 74

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1d2733 }
.title { font-size: 16px; font-weight: 600 }
.small { font-size: 12px; fill: #5a6675 }
.busy { fill: #2f6fb2 } .wait { fill: #d5dbe3 } .slowest { fill: #c2532d }
"""


def write(receipts: Sequence[Receipt], path: Path) -> None:
    """Write the picture.

    Each stage has a bar: the busy time of its threads, then the time in which units had work for it
    and it was idle. An actor has two units at once.
    """
    loads = PipelineLoad()
    for receipt in receipts:
        loads.add_receipt(receipt.stages)
    num_images = sum(receipt.record.num_samples for receipt in receipts)
    stages = [(name, loads.stages[name]) for name in STAGES if loads.stages[name].busy_s]
    figures = loads.bottleneck
    assert figures
    longest = max(load.alone_s + load.wait_s for _, load in stages)
    height = _TOP + len(stages) * (_BAR + _GAP) + 30
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="16" y="26">{escape(str(figures))}</text>',
        f'<text class="small" x="16" y="48">{num_images:,} images in {len(receipts)} units: '
        "busy seconds, on all threads of the stage, and seconds that units waited for it</text>",
    ]
    for number, (name, load) in enumerate(stages):
        y = _TOP + number * (_BAR + _GAP)
        lines += _bar(name, load, y, (_WIDTH - _LEFT - _RIGHT) / longest, name == figures.stage)
    legend_y = height - 12
    for x, kind, label in ((_LEFT, "busy", "busy"), (_LEFT + 90, "wait", "units waited")):
        lines += [
            f'<rect class="{kind}" x="{x}" y="{legend_y - 10}" width="12" height="12"/>',
            f'<text class="small" x="{x + 18}" y="{legend_y}">{label}</text>',
        ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")
    print(f"written to {path}")


def _bar(name: str, load: StageLoad, y: float, scale: float, is_slowest: bool) -> list[str]:
    busy, wait = load.alone_s * scale, load.wait_s * scale
    threads = f", {load.num_threads} threads" if load.num_threads > 1 else ""
    kind = "slowest" if is_slowest else "busy"
    text_y = y + _BAR - 6
    return [
        f'<text x="{_LEFT - 12}" y="{text_y}" text-anchor="end">{escape(name)}{threads}</text>',
        f'<rect class="{kind}" x="{_LEFT}" y="{y}" width="{busy:.1f}" height="{_BAR}"/>',
        f'<rect class="wait" x="{_LEFT + busy:.1f}" y="{y}" width="{wait:.1f}" height="{_BAR}"/>',
        f'<text class="small" x="{_LEFT + busy + wait + 8:.1f}" y="{text_y}">'
        f"{load.alone_s:.1f} s + {load.wait_s:.1f} s</text>",
    ]


def main() -> None:
    store = Store(sys.argv[1])
    write(read_receipts(store, list_receipt_names(store)), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
