"""The targets as data: what is compared, which of our measurements count, and what is asked of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.cases import CLASS_COUNTS, shape_name
from benchmarks.providers import PLAIN
from benchmarks.results import Results, Row
from benchmarks.suites import PIXELS, PIXELS_LAST

TRAINING = ("fwd_bwd", "fwd_bwd_scaled")
LARGE_BYTES = 2_500_000  # of logits: with fewer, the price of a call counts, not bandwidth


class Index:
    """Finds what a row of ours is compared with."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._by_setting: dict[tuple[object, ...], dict[str, Row]] = {}
        for row in self.rows:
            self._by_setting.setdefault(row.setting, {})[row.provider] = row

    def peers(self, row: Row) -> dict[str, Row]:
        """Other providers' rows of the same setting."""
        return {name: peer for name, peer in self._by_setting[row.setting].items() if name != row.provider}

    def fastest(self, row: Row, providers: Iterable[str]) -> Row | None:
        found = [peer for name, peer in self.peers(row).items() if name in providers]
        return min(found, key=lambda peer: peer.time_us, default=None)


@dataclass(frozen=True)
class Measure:
    """What is compared: its name in the report, and the number for a row of ours; None: not measured."""

    name: str
    of: Callable[[Index, Row], float | None]


def speed_up(name: str, *providers: str) -> Measure:
    """The time of the fastest of ``providers`` over ours."""

    def measure(index: Index, row: Row) -> float | None:
        peer = index.fastest(row, providers)
        return None if peer is None else peer.time_us / row.time_us

    return Measure(f"time of {name} over ours", measure)


def _memory_of_autocast(index: Index, row: Row) -> float | None:
    peer = index.peers(row).get("autocast")
    if peer is None or peer.peak_bytes is None or not row.peak_bytes:
        return None
    return peer.peak_bytes / row.peak_bytes


def _over_cross_entropy(index: Index, row: Row) -> float | None:
    return None if row.ce_us is None or row.mode != "fwd_bwd" else row.time_us / row.ce_us


COPIES = Measure("time over that of a copy of the logits", lambda index, row: row.copies)
OVER_CROSS_ENTROPY = Measure("time over that of our cross entropy in the same loop", _over_cross_entropy)
PLAIN_TIME = speed_up("plain PyTorch", *PLAIN)
TORCH_TIME = speed_up("F.cross_entropy", "torch")
COMPILED_TIME = speed_up("torch.compile", "compile")
AUTOCAST_TIME = speed_up("plain PyTorch under autocast", "autocast")
AUTOCAST_MEMORY = Measure("extra memory of plain PyTorch under autocast over ours", _memory_of_autocast)
LIGER_TIME, QUACK_TIME = speed_up("Liger-Kernel", "liger"), speed_up("QuACK", "quack")
LAUNCHES = Measure("kernel launches", lambda index, row: None if row.launches is None else float(row.launches))

Condition = Callable[[Row], bool]


@dataclass(frozen=True)
class Goal:
    """One sentence of the targets.

    ``measure`` of every row of ours that meets all conditions ``where`` must be ``at_least`` or ``at_most``; with
    ``mean`` their geometric mean must. ``cases`` says in words which rows those are. ``device`` limits it to "cpu" or
    "cuda".
    """

    measure: Measure
    cases: str
    where: tuple[Condition, ...]
    at_least: float | None = None
    at_most: float | None = None
    mean: bool = False
    device: str | None = None

    @property
    def asked(self) -> str:
        sign, number = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        return f"{sign} {number:g}"

    def value(self, index: Index, row: Row) -> float | None:
        """The measure of a row of ours; None where the row does not count."""
        return self.measure.of(index, row) if all(condition(row) for condition in self.where) else None


def trains(row: Row) -> bool:
    """Forward and backward."""
    return row.mode in TRAINING


def large(row: Row) -> bool:
    """A training step on more than a few classes that is about bandwidth, not about the price of a call."""
    return trains(row) and row.floor_bytes >= 2 * LARGE_BYTES and row.num_classes >= CLASS_COUNTS[0]


def large_forward(row: Row) -> bool:
    """The same for a forward alone."""
    return row.mode == "fwd" and row.floor_bytes >= LARGE_BYTES


def loss(*names: str) -> Condition:
    return lambda row: row.loss in names


def shape(*expected: int, layout: str = "contiguous") -> Condition:
    return lambda row: row.shape == expected and row.layout == layout


def classes(holds: Callable[[int], bool]) -> Condition:
    return lambda row: holds(row.num_classes)


def z_error(row: Row) -> bool:
    return row.loss.startswith("z_")


def like_cross_entropy(row: Row) -> bool:
    """Losses of logits that are to take as long as cross entropy."""
    return not z_error(row) and row.loss not in ("cross_entropy", "bi_tempered")


def float32(row: Row) -> bool:
    return row.dtype == "float32"


def bfloat16(row: Row) -> bool:
    return row.dtype == "bfloat16"


def upstream_1(row: Row) -> bool:
    """The gradient of the loss is 1, as after ``loss.backward()``."""
    return row.mode == "fwd_bwd"


def upstream_scaled(row: Row) -> bool:
    """It is another number, as with a gradient scaler."""
    return row.mode == "fwd_bwd_scaled"


CROSS_ENTROPY, MAE_AGCE = loss("cross_entropy"), loss("mae_auto", "agce")
HEM_NCE_MAE, BI_TEMPERED = loss("hem", "nce_mae"), loss("bi_tempered")
FROM_32K, OF_EIGHTS = classes(lambda count: count >= 32_000), classes(lambda count: count % 8 == 0)


def _against_torch(cases: str, at_least: float, of_shape: Condition) -> Goal:
    where = (trains, CROSS_ENTROPY, float32, of_shape)
    return Goal(TORCH_TIME, f"cross entropy, {cases}, 1 and 2 threads", where, at_least, device="cpu")


# By default of forward + backward. Goals without a device are meant for GPUs, and judged on the CPU, too.
GOALS = (
    Goal(COPIES, "cross entropy", (large, CROSS_ENTROPY, classes(lambda count: count in CLASS_COUNTS)), at_most=1.15),
    Goal(OVER_CROSS_ENTROPY, "every loss but bi-tempered", (large, like_cross_entropy), at_most=1.05),
    Goal(OVER_CROSS_ENTROPY, "bi-tempered", (large, BI_TEMPERED), at_most=1.5),
    Goal(PLAIN_TIME, "cross entropy", (large, CROSS_ENTROPY), 2.5),
    Goal(PLAIN_TIME, "MAE with automatic bias, AGCE", (large, MAE_AGCE), 6),
    Goal(PLAIN_TIME, "HEM, NCE + MAE", (large, HEM_NCE_MAE), 12),
    Goal(PLAIN_TIME, "HEM, NCE + MAE", (large, HEM_NCE_MAE), 10, device="cpu"),
    Goal(PLAIN_TIME, "bi-tempered", (large, BI_TEMPERED), 25),
    Goal(PLAIN_TIME, "Z-Error", (trains, z_error, lambda row: row.shape[0] <= 65536), 8),
    Goal(PLAIN_TIME, "256 x 10, elapsed time", (trains, shape(256, 10), lambda row: row.timer != "device"), 2),
    Goal(AUTOCAST_TIME, "cross entropy, bfloat16", (large, CROSS_ENTROPY, bfloat16), 7),
    Goal(AUTOCAST_MEMORY, "cross entropy, bfloat16", (large, CROSS_ENTROPY, bfloat16), 5),
    Goal(
        AUTOCAST_TIME,
        "segmentation, 150 classes, bfloat16",
        (large, bfloat16, classes(lambda count: count == 150), lambda row: len(row.shape) == 4),
        7,
        device="cuda",
    ),
    Goal(COMPILED_TIME, "geometric mean", (trains,), 1.5, mean=True),
    Goal(COMPILED_TIME, "every case", (trains,), 1.0),
    Goal(LIGER_TIME, "up to 1000 classes", (large, classes(lambda count: count <= 1000)), 3, device="cuda"),
    Goal(LIGER_TIME, "from 32 000 classes, upstream gradient 1", (large, FROM_32K, upstream_1), 1, device="cuda"),
    Goal(
        LIGER_TIME,
        "from 32 000 classes, upstream gradient not 1",
        (large, FROM_32K, upstream_scaled),
        1.3,
        device="cuda",
    ),
    Goal(QUACK_TIME, "class counts divisible by 8, forward", (large_forward, OF_EIGHTS), 0.97, device="cuda"),
    Goal(QUACK_TIME, "class counts divisible by 8", (large, OF_EIGHTS), 1.3, device="cuda"),
    Goal(QUACK_TIME, "odd class counts", (large, classes(lambda count: count % 2 == 1)), 2, device="cuda"),
    Goal(LAUNCHES, "Z-Error", (trains, z_error), at_most=3, device="cuda"),
    _against_torch("4096 x 1000", 5, shape(4096, 1000)),
    _against_torch("65536 x 10", 15, shape(65536, 10)),
    _against_torch("2048 x 10000", 2.5, shape(2048, 10_000)),
    _against_torch(shape_name(PIXELS), 2.5, shape(*PIXELS)),
    _against_torch(f"{shape_name(PIXELS_LAST)} channels_last", 6, shape(*PIXELS_LAST, layout="channels_last")),
)


@dataclass(frozen=True)
class Verdict:
    """``value`` is the worst case or the mean; None: not measured."""

    value: float | None
    cases: int = 0
    worst: str = ""
    passed: bool | None = None

    @property
    def text(self) -> str:
        if self.value is None:
            return "not measured"
        cases = f" ({self.cases} cases)" if self.cases > 1 else ""
        return f"{'pass' if self.passed else '**fail**'}: {self.value:.3g}{cases}"


def judge(goal: Goal, index: Index, device: str) -> Verdict:
    """What the rows of ``device`` say."""
    if goal.device not in (None, device):
        return Verdict(None)
    found = []
    for row in index.rows:
        if row.provider == "fused" and row.device == device:
            value = goal.value(index, row)
            if value is not None:
                found.append((value, row.name))
    if not found:
        return Verdict(None)
    value, worst = max(found) if goal.at_most is not None else min(found)
    if goal.mean:
        value = geometric_mean(v for v, _ in found)
    passed = value <= goal.at_most if goal.at_most is not None else value >= (goal.at_least or 0.0)
    return Verdict(value, len(found), worst, passed)


# Results that are rounded to the same dtype differ by so much at random.
LUCK = 1.05


def judge_accuracy(results: Results) -> list[tuple[str, str, str, Verdict]]:
    """What is compared, cases, what is asked and verdict, of rows of :mod:`benchmarks.accuracy`."""
    by_case: dict[tuple[str, str], dict[str, dict[str, float | None]]] = {}
    for row in results.accuracy:
        by_case.setdefault((row["loss"], row["dtype"]), {})[row["provider"]] = row
    gradients, values = [], []
    for (name, dtype), providers in by_case.items():
        plain = providers.get("plain") or providers["reference"]
        ours = providers["fused"]
        for what, upstream in (("gradient_error", "upstream 1"), ("scaled_gradient_error", "upstream not 1")):
            gradients.append((_ratio(ours[what], plain[what]), f"{name} {dtype}, {upstream}"))
        if dtype == "bfloat16" and name == "cross_entropy":
            values.append((_ratio(plain["value_error"], ours["value_error"]), f"{name} {dtype}"))
    verdicts = []
    if gradients:
        value, worst = max(gradients)
        verdict = Verdict(value, len(gradients), worst, value <= LUCK)
        verdicts.append(
            ("error of the gradient over plain PyTorch's", "every dtype", f"<= 1 (+ {LUCK - 1:.0%})", verdict)
        )
    if values:
        value, worst = min(values)
        verdict = Verdict(value, 1, worst, value >= 10)
        verdicts.append(("error of F.cross_entropy over ours", "loss of bfloat16 logits", ">= 10", verdict))
    return verdicts


def _ratio(a: float | None, b: float | None) -> float:
    """``a / b`` of two errors; None is an error without bounds: the result was not finite."""
    if a == b:
        return 1.0
    if a is None or b is None:
        return math.inf if a is None else 0.0
    return a / max(b, 1e-30)
