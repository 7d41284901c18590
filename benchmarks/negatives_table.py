"""The tables of negatives.py."""

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Student's t for a 95 % interval, by degrees of freedom."""
MAX_TIME_ERROR = 0.15
"""The time of "InfoNCE, 2 x" may differ by this fraction from twice the time of InfoNCE."""
Row = dict[str, Any]


def read(path: Path, **chosen: Any) -> list[Row]:
    """Read what was run so far: the rows with these values."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [{"device": "cpu"} | json.loads(line) for line in lines]
    return [row for row in rows if chosen.items() <= row.items()]


def interval(differences: list[float]) -> str:
    """Return the mean of paired differences with the half width of its 95 % interval."""
    if not differences:
        return ""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}"
    half = T_95[len(differences) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.1f} ± {half:.1f}"


def factor_of(name: str) -> float | None:
    """Return for how many times the epochs this row is InfoNCE, None if it is something else."""
    if name == "InfoNCE":
        return 1.0
    method, _, factor = name.rpartition(", ")
    return float(factor[:-2]) if method == "InfoNCE" and factor.endswith(" x") else None


def rsum_after(rows: list[Row], seed: int, factor: float) -> float | None:
    """Return rsum of InfoNCE from a seed for ``factor`` times the epochs, interpolated. None if no row is that long."""
    known = sorted((factor_of(row["method"]) or 0.0, row["rsum"]) for row in rows if row["seed"] == seed)
    for (low, before), (high, after) in itertools.pairwise(known):
        if factor <= low:
            return float(before)
        if factor <= high:
            return float(before + (after - before) * (factor - low) / (high - low))
    return None


def knobs_beside(rows: list[Row], base: str) -> list[str]:
    """Name the methods whose knobs differ from those of ``base``, with what differs."""
    knobs = {row["method"]: row["knobs"] for row in rows}
    changed = {
        name: {knob: value for knob, value in one.items() if value != knobs[base][knob]} for name, one in knobs.items()
    }
    return [
        f"{name} ({', '.join(f'{knob} {value}' for knob, value in some.items())})"
        for name, some in changed.items()
        if some
    ]


def why_no_table(rows: list[Row], seeds: set[int]) -> str | None:
    """Say why the rows can't be compared, None if they can. ``seeds`` are those of InfoNCE."""
    if missing := sorted({row["seed"] for row in rows} - seeds):
        return f"InfoNCE was not run from seed {missing}, and the others are compared with it."
    settings = {(row["method"], json.dumps(row["knobs"], sort_keys=True)) for row in rows}
    if len(settings) > len({row["method"] for row in rows}):
        return "some method has rows with several settings. Keep those of one, or begin another file (`--results`)."
    return None


def print_table(rows: list[Row]) -> None:
    """Print one line per method: means over the seeds, and paired differences to InfoNCE."""
    plain = [row for row in rows if factor_of(row["method"]) is not None]
    base = {row["seed"]: row for row in rows if row["method"] == "InfoNCE"}
    if problem := why_no_table(rows, set(base)):
        print(f"No table: {problem}")
        return
    print(
        f"\n{'method':26}{'seeds':>6}{'val':>7}{'rsum':>15}{'gain':>15}{'at equal time':>15}{'best by val':>15}",
        end="",
    )
    print(f"{'R@1':>7}{'whole set':>15}{'step':>8}{'time':>8}")
    uneven: list[str] = []
    for name in sorted({row["method"] for row in rows}, key=lambda name: (factor_of(name) or 9.0, name)):
        own = [row for row in rows if row["method"] == name]
        pairs = [(row, base[row["seed"]]) for row in own if row["seed"] in base]
        rsum = [row["rsum"] for row in own]
        spread = f" ± {statistics.stdev(rsum):4.1f}" if len(rsum) > 1 else ""
        step, time = (statistics.median(row[key] / one[key] for row, one in pairs) for key in ("step", "seconds"))
        after = [(row["rsum"], rsum_after(plain, row["seed"], time)) for row in own]
        cells = [
            f"{statistics.mean(rsum):.1f}{spread}",
            *("" if name == "InfoNCE" else interval([row[key] - one[key] for row, one in pairs]) for key in ("rsum",)),
            "" if factor_of(name) else interval([value - other for value, other in after if other is not None]),
            *("" if name == "InfoNCE" else interval([row[key] - one[key] for row, one in pairs]) for key in ("best",)),
        ]
        gallery = interval([row["gallery"] - one["gallery"] for row, one in pairs])
        cells.append(f"{statistics.mean(row['gallery'] for row in own):.1f}" if name == "InfoNCE" else gallery)
        recall = f"{statistics.mean(row['r1'] for row in own):7.1f}"
        val = statistics.mean(row["val"] for row in own)
        print(f"{name:26}{len(own):6}{val:7.1f}" + "".join(f"{cell:>15}" for cell in cells[:4]), end="")
        print(f"{recall}{cells[4]:>15}{step:6.2f} x{time:6.2f} x")
        if abs(time / (factor_of(name) or time) - 1) > MAX_TIME_ERROR:
            uneven.append(f"{name} took {time:.2f} times as long")
    if own_knobs := knobs_beside(rows, "InfoNCE"):
        print(f"Chosen for themselves on the validation set: {', '.join(own_knobs)}.")
    if uneven:
        print(f"These rows were not timed side by side, so do not trust equal time: {', '.join(uneven)}.")
    measured = [row["total"] for row in rows if "total" in row]
    if measured:
        print(
            f"{len(measured)} of {len(rows)} runs, evaluation included: {sum(measured) / 3600:.2f} h of one processor."
        )


def print_tuning(rows: list[Row]) -> None:
    """Print rsum on the validation set for all knobs that were tried, at the end and in the best epoch."""
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        tried: list[dict[str, Any]] = []
        tried += [
            row["knobs"] for number, row in enumerate(own) if row["knobs"] not in (one["knobs"] for one in own[:number])
        ]
        knobs = [knob for knob in tried[0] if any(one[knob] != tried[0][knob] for one in tried)]
        print(
            f"\n{name}\n"
            + "".join(f"{knob:>15}" for knob in knobs)
            + f"{'seeds':>7}{'val':>9}{'best':>9}{'at epoch':>10}"
        )
        for one in sorted(tried, key=lambda one: [str(one[knob]) for knob in knobs]):
            some = [row for row in own if row["knobs"] == one]
            val, best, at = (statistics.mean(row[key] for row in some) for key in ("val", "best_val", "best_epoch"))
            words = "".join(f"{one[knob]!s:>15}" for knob in knobs)
            print(f"{words}{len(some):7}{val:9.1f}{best:9.1f}{at:10.1f}")
