"""Result files: what was measured, as rows, and on what."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, shape_name

# What is the same in two result files of one machine and build.
SAME_MACHINE = ("processor", "gpu", "packages", "build", "environment")


@dataclass(frozen=True)
class Row:
    """One provider's call in one mode. Times are microseconds: median and quartiles.

    ``copy_us`` is ``copy_`` of the same logits, ``ce_us`` our cross entropy's forward and backward on them, both timed
    in the same loop. ``floor_bytes`` must move at least; ``moved_bytes`` do move, counted operator by operator or as a
    library's authors say (None: unknown). ``checked_rows``: on how many rows value and gradient were compared with
    float64. ``first_s``: the first call, compilation included.
    ``tries``: how often the job was timed; the run in which the copy took least time is kept.
    """

    loss: str
    provider: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    layout: str
    threads: int
    timer: str
    time_us: float
    low_us: float
    high_us: float
    copy_us: float
    floor_bytes: int
    moved_bytes: int | None
    checked_rows: int
    first_s: float
    ce_us: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    suite: str = ""
    tries: int = 1

    @property
    def setting(self) -> tuple[Any, ...]:
        """What two providers must share to be compared: the suite, too, as only then they took turns."""
        return (self.suite, self.mode, self.case, self.threads, self.timer)

    @property
    def case(self) -> Case:
        return Case(self.loss, self.shape, self.dtype, self.device, self.layout)

    @property
    def num_classes(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def gb_per_s(self) -> float:
        """Useful bytes over time: of the floor, not of what was moved."""
        return self.floor_bytes / self.time_us / 1e3

    @property
    def copies(self) -> float:
        """Time in copies of the logits."""
        return self.time_us / self.copy_us

    @property
    def share_of_copy(self) -> float:
        """Useful bytes per second relative to ``copy_``; a copy moves every logit twice."""
        reads_only = self.mode == "fwd"
        return (0.5 if reads_only else 1.0) / self.copies

    @property
    def name(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.device == "cpu" else ""
        return f"{self.loss} {shape_name(self.shape, self.layout)} {self.dtype} {self.mode}{threads}"


@dataclass
class Results:
    """A result file. ``accuracy`` and ``end_to_end`` are rows of :mod:`benchmarks.accuracy`, `.end_to_end`.

    ``rejected`` says which providers were not timed because they failed the check against float64.
    """

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    end_to_end: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """JSON with one row to a line, so that versions of it can be compared."""

        def lines(rows: list[dict[str, Any]]) -> str:
            return "[" + ",".join(f"\n  {json.dumps(_rounded(row))}" for row in rows) + "\n ]"

        parts = {
            "machine": json.dumps(self.machine, indent=1).replace("\n", "\n "),
            "rows": lines([asdict(row) for row in self.rows]),
            "accuracy": lines(self.accuracy),
            "end_to_end": lines(self.end_to_end),
            "rejected": lines(self.rejected),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n" + ",\n".join(f' "{name}": {text}' for name, text in parts.items()) + "\n}\n")

    @staticmethod
    def load(path: Path) -> Results:
        """Raises ``SystemExit`` with one line for a file that is none of ours."""
        try:
            found = json.loads(path.read_text())
            rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in found["rows"]]
            return Results(found["machine"], rows, found["accuracy"], found["end_to_end"], found["rejected"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is not a result file of `python -m benchmarks`: {error!r}") from error


def merged(results: Iterable[Results]) -> list[Results]:
    """One for every machine and build; of what several files measured in the same suite the last file counts."""
    groups: list[list[Results]] = []
    for result in results:
        for group in groups:
            if all(group[0].machine.get(name) == result.machine.get(name) for name in SAME_MACHINE):
                group.append(result)
                break
        else:
            groups.append([result])
    return [group[0] if len(group) == 1 else _one(group) for group in groups]


def _one(group: list[Results]) -> Results:
    settings: dict[tuple[Any, ...], list[Row]] = {}
    one = Results({})
    for result in group:
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in result.rows:
            found.setdefault(row.setting, []).append(row)
        settings |= found  # whole settings: rows of different runs are not compared
        one.accuracy = result.accuracy or one.accuracy
        one.end_to_end = result.end_to_end or one.end_to_end
        one.rejected += [entry for entry in result.rejected if entry not in one.rejected]
    one.rows = [row for rows in settings.values() for row in rows]
    for name in {name: None for result in group for name in result.machine}:
        values = [result.machine[name] for result in group if name in result.machine]
        alike = all(value == values[0] for value in values)
        one.machine[name] = values[0] if alike else "; ".join(map(str, values))
    return one


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
