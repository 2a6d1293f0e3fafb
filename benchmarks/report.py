"""Makes a report of result files: Markdown with the targets, tables, and pictures beside it.

python -m benchmarks.report benchmarks/results/cpu/results.json [more ...] [--out FOLDER]     (e.g. of two suites)
python -m benchmarks.report --compare OLD.json NEW.json        (exit status 1 if something became slower)
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.cases import LOSSES, shape_name
from benchmarks.jobs import Job
from benchmarks.providers import PLAIN, PROVIDERS
from benchmarks.results import Results, Row, merged
from benchmarks.targets import GOALS, TRAINING, Index, Verdict, judge, judge_accuracy

REGRESSION = 1.10


def table(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    rows = [head, ["---"] * len(head), *([str(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def targets(results: list[Results]) -> str:
    """Every target with the verdict on each device, and the worst case where one fails."""
    index = Index(row for result in results for row in result.rows)
    found: dict[tuple[str, str, str], dict[str, Verdict]] = {}
    for goal in GOALS:
        devices = ("cpu", "cuda") if goal.device is None else (goal.device,)
        found[goal.measure.name, goal.cases, goal.asked] = {d: judge(goal, index, d) for d in devices}
    for result in results:
        for *claim, verdict in judge_accuracy(result):
            unknown = {"cpu": Verdict(None), "cuda": Verdict(None)}
            found.setdefault((claim[0], claim[1], claim[2]), unknown)[result.accuracy[0]["device"]] = verdict
    lines, failures = [], []
    for (measure, cases, asked), verdicts in found.items():
        cells = [verdicts[device].text if device in verdicts else "-" for device in ("cpu", "cuda")]
        lines.append([measure, cases, asked, *cells])
        failures += [f"{d}: {measure}, {cases}: {v.worst}" for d, v in verdicts.items() if v.passed is False]
    text = table(("what is compared", "cases", "asked", "CPU", "GPU"), lines)
    text += "\nForward + backward, unless other words are there. The number is the worst case, for means the mean. "
    text += "Targets without a device are meant for GPUs; the CPU is held to them all the same.\n"
    if not any(result.accuracy for result in results):
        text += "Errors against float64 were not measured.\n"
    if failures:
        text += "\nWorst cases of what failed:\n\n" + "".join(f"- {failure}\n" for failure in failures)
    return text


def losing_cases(index: Index) -> str:
    """Every setting in which another provider of the same loss was faster."""
    lines = []
    for row in index.rows:
        if row.provider == "fused":
            for name, peer in index.peers(row).items():
                if peer.time_us < row.time_us:
                    band = "" if peer.high_us < row.low_us else "within the noise"
                    lines.append((row.time_us / peer.time_us, row.name, name, band))
    if not lines:
        return "In no measured case was another provider faster.\n"
    lines.sort(reverse=True)
    return table(("case", "faster", "our time over its", ""), ((c, p, f"{r:.2f}", b) for r, c, p, b in lines))


def loss_table(index: Index, shape: tuple[int, ...], dtype: str, device: str) -> str:
    """One line for every loss at a shape: times, ratios, memory."""

    def ours(row: Row) -> bool:
        where = (row.shape, row.dtype, row.device, row.layout) == (shape, dtype, device, "contiguous")
        return row.provider == "fused" and where and row.mode == "fwd_bwd" and row.threads == 1

    measured: dict[str, Row] = {}
    for row in filter(ours, index.rows):  # of several suites that have it, the one with the most competitors
        best = measured.get(row.loss)
        if best is None or len(index.peers(row)) > len(index.peers(best)):
            measured[row.loss] = row
    lines = []
    for row in sorted(measured.values(), key=lambda row: list(LOSSES).index(row.loss)):
        peers = index.peers(row)
        plain = index.fastest(row, PLAIN)
        line = [row.loss, f"{row.time_us:.0f}", f"{row.low_us:.0f}-{row.high_us:.0f}", f"{row.copies:.2f}"]
        line += [f"{row.gb_per_s:.1f}", "" if plain is None else f"{plain.provider} {plain.time_us / row.time_us:.1f}"]
        others = [f"{name} {peers[name].time_us / row.time_us:.1f}" for name in PROVIDERS if name in peers]
        line += [", ".join(other for other in others if plain is None or not other.startswith(plain.provider))]
        line += [_sizes(row), "" if plain is None else _sizes(plain), "" if plain is None else _moved(plain)]
        lines.append(line)
    if not lines:
        return ""
    head = ["loss", "us", "quartiles", "copies", "GB/s", "fastest plain PyTorch over ours", "others over ours"]
    head += ["extra memory", "plain's", "plain moves"]
    return f"\n### {shape_name(shape)}, {dtype}\n\n" + table(head, lines)


def _compared(rows: list[Row]) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes at which most losses have plain PyTorch beside them; the sweep over classes is a picture."""

    def losses(provider: str) -> Counter[tuple[tuple[int, ...], str]]:
        keys = {(r.shape, r.dtype, r.loss) for r in rows if r.provider == provider and r.mode == "fwd_bwd"}
        return Counter((shape, dtype) for shape, dtype, _ in sorted(keys))

    ours = losses("fused")
    return [key for key, count in losses("reference").items() if 2 * count > ours[key]]


def _sizes(row: Row) -> str:
    return "" if row.peak_bytes is None else f"{2 * row.peak_bytes / row.floor_bytes:.1f}"


def _moved(row: Row) -> str:
    return "" if row.moved_bytes is None else f"{2 * row.moved_bytes / row.floor_bytes:.0f}"


def against_torch(index: Index, device: str) -> str:
    """Cross entropy against F.cross_entropy in every mode."""
    lines = []
    for row in index.rows:
        peer = index.peers(row).get("torch") if row.provider == "fused" and row.loss == "cross_entropy" else None
        if peer is not None and row.device == device:
            line = [shape_name(row.shape, row.layout), row.dtype, row.threads, row.mode, f"{row.time_us:.1f}"]
            lines.append([*line, f"{peer.time_us:.1f}", f"{peer.time_us / row.time_us:.2f}", f"{row.copies:.2f}"])
    head = ("logits", "dtype", "threads", "mode", "ours, us", "torch, us", "torch over ours", "ours in copies")
    return table(head, lines) if lines else ""


def against_compiler(index: Index, rejected: list[dict[str, Any]]) -> str:
    """How much faster than torch.compile of the reference: a line for every loss, a column for every input."""
    failed = {entry["case"] for entry in rejected if entry["provider"] == "compile"}
    cells: dict[tuple[str, str], dict[str, float]] = {}  # by loss and column, then by mode
    for row in index.rows:
        if row.provider == "fused" and row.mode in TRAINING:
            peer = index.peers(row).get("compile")
            at = (row.loss, _input_name(row))
            if peer is not None:
                modes = cells.setdefault(at, {})
                modes[row.mode] = min(peer.time_us / row.time_us, modes.get(row.mode, math.inf))
            elif Job(row.case, (), threads=row.threads, timer=row.timer).key in failed:
                cells.setdefault(at, {})
    if not cells:
        return ""
    columns = list(dict.fromkeys(column for _, column in cells))
    names = [name for name in LOSSES if any(loss == name for loss, _ in cells)]
    lines = [[name, *(_modes_cell(cells.get((name, column))) for column in columns)] for name in names]
    means = []
    for column in columns:
        modes_of = [modes for (_, c), modes in cells.items() if c == column]
        ratios = {mode: [modes[mode] for modes in modes_of if mode in modes] for mode in TRAINING}
        means.append(_modes_cell({mode: geometric_mean(found) for mode, found in ratios.items() if found}))
    text = table(("loss", *columns), [*lines, ["geometric mean", *means]])
    return text + "\nForward + backward, for an upstream gradient of 1 / another. Failed: see what was not timed.\n"


def _input_name(row: Row) -> str:
    details = [row.layout] * (row.layout != "contiguous") + [row.dtype] * (row.dtype != "float32")
    details += [f"{row.threads} threads"] * (row.threads != 1)
    return ", ".join([shape_name(row.shape), *details])


def _modes_cell(modes: dict[str, float] | None) -> str:
    """``5.10 / 4.32``; None: not measured, without numbers: failed."""
    if modes is None:
        return ""
    return " / ".join(f"{modes[mode]:.2f}" for mode in TRAINING if mode in modes) or "failed"


def end_to_end(rows: list[dict[str, Any]]) -> str:
    """Training steps with plain PyTorch's loss and ours."""
    plain = {(r["model"], r["batch"], r["classes"], r["loss"]): r for r in rows if r["provider"] == "plain"}
    lines = []
    for row in rows:
        if row["provider"] == "fused":
            base = plain[row["model"], row["batch"], row["classes"], row["loss"]]
            line = [row["model"], f"{row['batch']} x {row['classes']}", row["loss"]]
            line += [f"{r['step_us'] / 1e3:.1f}" for r in (base, row)] + [
                f"{r['images_per_s']:.0f}" for r in (base, row)
            ]
            line += [f"{r['loss_us']:.0f} us = {r['loss_share']:.2%}" for r in (base, row)]
            line += [f"{r['step_peak_bytes'] / 1e6:.1f}" for r in (base, row)]
            lines.append(line)
    head = ["model", "batch x classes", "loss"]
    for what in ("step, ms", "images/s", "loss alone, share of the step", "peak extra memory of a step, MB"):
        head += [f"{what}: plain", "fused"]
    return table(head, lines)


def accuracy(rows: list[dict[str, Any]]) -> str:
    """Errors of value and gradient: ours, plain PyTorch's and the reference's."""
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["loss"], row["dtype"]), {})[row["provider"]] = row
    lines = []
    for (name, dtype), providers in cases.items():
        line = [name, dtype]
        for what in ("value_error", "gradient_error", "scaled_gradient_error"):
            line += [_error(providers[p][what]) if p in providers else "" for p in ("fused", "plain", "reference")]
        lines.append(line)
    names = ("ours", "plain", "reference")
    kinds = ("value", "gradient", "gradient, upstream not 1")
    return table(("loss", "dtype", *(f"{kind}: {name}" for kind in kinds for name in names)), lines)


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def first_losses(rows: list[Row]) -> str:
    """How long the first call of each provider took: what timing leaves out."""
    lines = []
    for name in PROVIDERS:
        seconds = sorted(row.first_s for row in rows if row.provider == name)
        if seconds:
            lines.append([name, f"{seconds[len(seconds) // 2]:.3f}", f"{seconds[-1]:.3f}"])
    return table(("provider", "median, s", "largest, s"), lines)


def how_often(rows: list[Row]) -> str:
    """What `--tries` was."""
    tries = sorted({row.tries for row in rows})
    if tries in ([], [1]):
        return "Every job was timed once.\n"
    number = f"{tries[0]}" if len(tries) == 1 else f"{tries[0]} to {tries[-1]}"
    return f"Jobs were timed {number} times (`--tries`); shown is the run in which the plain copy took least time.\n"


def pictures(result: Results, device: str, folder: Path, suffix: str) -> str:
    """Draws them into ``folder``; where matplotlib is missing the text says so."""
    if importlib.util.find_spec("matplotlib") is None:
        return "\nNo pictures: matplotlib is not installed here.\n"
    from benchmarks import plots

    made = plots.draw(result, device, folder, suffix)
    return "".join(f"\n![{path.stem.replace('_', ' ')}]({path.name})\n" for path in made)


def report(results: list[Results], folder: Path) -> str:
    """The whole text, with one part for each machine and build; draws the pictures into ``folder``."""
    text = "# Measurements\n\nMade by `python -m benchmarks.report`; medians, calls take turns, buffers rotate.\n"
    text += "\n## Targets\n\n" + targets(results)
    for number, result in enumerate(results, 1):
        device = "cuda" if "gpu" in result.machine else "cpu"
        machine = result.machine
        index = Index(result.rows)
        text += f"\n## {machine.get('gpu') or machine['processor']}\n\n"
        text += table(("", ""), ((k, f"`{v}`" if isinstance(v, dict) else v) for k, v in machine.items()))
        if any(row.timer == "cpu" for row in result.rows):
            text += "\nThe machine had other work: one thread's times are processor time. Elapsed times of two threads "
            text += "are a rough guide at best.\n"
        text += "\n" + how_often(result.rows)
        text += pictures(result, device, folder, "" if number == 1 else f"_{number}")
        text += "\n### Where we lose\n\n" + losing_cases(index)
        if result.rejected:
            text += "\n### Not timed: failed, or another result than float64 gives\n\n"
            text += "".join(f"- {entry['reason']}\n" for entry in result.rejected)
        text += "\n### Cross entropy against F.cross_entropy\n\n" + against_torch(index, device)
        compiled = against_compiler(index, result.rejected)
        if compiled:
            text += "\n### torch.compile of the reference over ours\n\n" + compiled
        for shape, dtype in _compared(result.rows):
            text += loss_table(index, shape, dtype, device)
        text += "\n### Time to the first loss and gradient, compilation included\n\n" + first_losses(result.rows)
        if machine.get("torch_has_linear_cross_entropy"):
            text += (
                "\nThis torch has `F.linear_cross_entropy`, which takes the features and weights of the last layer and "
                "never holds all logits: another computation, not timed here.\n"
            )
        if result.end_to_end:
            text += "\n### Share of the loss in a training step\n\n" + end_to_end(result.end_to_end)
        if result.accuracy:
            text += "\n### Largest relative errors against float64\n\n" + accuracy(result.accuracy)
    return text


def compare(old: Results, new: Results) -> tuple[str, bool]:
    """Our times in two files; True if any is over 10 % slower by more than the noise."""

    def key(row: Row) -> tuple[object, ...]:
        return (row.case, row.mode, row.threads, row.timer, row.provider)  # in whichever suite

    before = {key(row): row for row in old.rows}
    lines, regressed = [], False
    for row in new.rows:
        past = before.get(key(row))
        if past is None or row.provider != "fused":
            continue
        ratio = row.time_us / past.time_us
        apart = row.low_us > past.high_us if ratio > 1 else row.high_us < past.low_us
        if max(ratio, 1 / ratio) > REGRESSION:
            verdict = ("**slower**" if ratio > 1 else "faster") if apart else "within the noise"
            regressed |= ratio > 1 and apart
            bands = [f"{r.time_us:.1f} ({r.low_us:.1f}-{r.high_us:.1f})" for r in (past, row)]
            lines.append((ratio, [row.name, *bands, f"{ratio:.2f}", verdict]))
    lines.sort(key=lambda line: -line[0])
    common = sum(key(row) in before for row in new.rows if row.provider == "fused")
    text = f"{common} of our cases are in both files; those that differ by more than {REGRESSION - 1:.0%}:\n\n"
    head = ("case", "old, us (quartiles)", "new, us (quartiles)", "new over old", "")
    return text + table(head, (line for _, line in lines)), regressed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Reports on result files.")
    parser.add_argument("results", nargs="*", type=Path, help="JSON files of `python -m benchmarks`")
    parser.add_argument("--out", type=Path, help="folder for report.md and pictures (default: that of the first file)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="list what became slower")
    options = parser.parse_args()
    if options.compare:
        text, regressed = compare(*(Results.load(path) for path in options.compare))
        print(text)
        raise SystemExit(int(regressed))
    if not options.results:
        parser.error("give result files, or --compare OLD NEW")
    results = merged(Results.load(path) for path in options.results)
    folder = options.out or options.results[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    text = report(results, folder)
    (folder / "report.md").write_text(text)
    print(targets(results))
    print(f"written: {folder / 'report.md'}")


if __name__ == "__main__":
    main()
