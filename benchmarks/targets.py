"""The targets T1 to T12 as data: which of our rows count, what they are compared with, and what is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.cases import CLASS_COUNTS, shape_name
from benchmarks.providers import PLAIN
from benchmarks.results import Results, Row
from benchmarks.suites import PIXELS, PIXELS_LAST

TRAINING = ("fwd_bwd", "fwd_bwd_scaled")
LARGE = 2_500_000  # bytes of logits; below it a call is not about bandwidth


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


Measure = Callable[[Index, Row], "float | None"]


def speed_up(*providers: str) -> Measure:
    """The time of the fastest of ``providers`` over ours."""

    def measure(index: Index, row: Row) -> float | None:
        peer = index.fastest(row, providers)
        return None if peer is None else peer.time_us / row.time_us

    return measure


def memory_ratio(provider: str) -> Measure:
    """A provider's extra memory over ours."""

    def measure(index: Index, row: Row) -> float | None:
        peer = index.peers(row).get(provider)
        if peer is None or peer.peak_bytes is None or not row.peak_bytes:
            return None
        return peer.peak_bytes / row.peak_bytes

    return measure


def copies(index: Index, row: Row) -> float | None:
    return row.copies


def launches(index: Index, row: Row) -> float | None:
    return None if row.launches is None else float(row.launches)


def over_cross_entropy(index: Index, row: Row) -> float | None:
    """Our time over that of our cross entropy in the same loop."""
    return None if row.ce_us is None or row.mode != "fwd_bwd" else row.time_us / row.ce_us


@dataclass(frozen=True)
class Goal:
    """One sentence of a target.

    ``measure`` of every row of ours that ``where`` picks must be ``at_least`` or ``at_most``; with ``mean`` their
    geometric mean must. ``device`` limits it to "cpu" or "cuda".
    """

    target: str
    claim: str
    where: Callable[[Row], bool]
    measure: Measure
    at_least: float | None = None
    at_most: float | None = None
    mean: bool = False
    device: str | None = None

    @property
    def asked(self) -> str:
        sign, number = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        return f"{sign} {number:g}"


def trains(row: Row) -> bool:
    return row.mode in TRAINING


def large(row: Row) -> bool:
    """A training step on more than a few classes that is about bandwidth, not about the price of a call."""
    return trains(row) and row.floor_bytes >= 2 * LARGE and row.num_classes >= CLASS_COUNTS[0]


def loss(*names: str) -> Callable[[Row], bool]:
    return lambda row: row.loss in names


def both(*conditions: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: all(condition(row) for condition in conditions)


def _shape(*shape: int, layout: str = "contiguous") -> Callable[[Row], bool]:
    return lambda row: row.shape == shape and row.layout == layout


_ce, _tempered, _steep = loss("cross_entropy"), loss("bi_tempered"), loss("hem", "nce_mae")
_floats, _half = (lambda row: row.dtype == "float32"), (lambda row: row.dtype == "bfloat16")
_listed = both(large, _ce, lambda row: row.num_classes in CLASS_COUNTS)
_robust = both(large, lambda row: row.loss not in ("cross_entropy", "bi_tempered") and not row.loss.startswith("z_"))
_few, _many = both(large, lambda row: row.num_classes <= 1000), both(large, lambda row: row.num_classes >= 32_000)
_unit, _scaled = (lambda row: row.mode == "fwd_bwd"), (lambda row: row.mode == "fwd_bwd_scaled")
_aligned, _odd = (lambda row: row.num_classes % 8 == 0), (lambda row: row.num_classes % 2 == 1)
_forward = both(_aligned, lambda row: row.mode == "fwd" and row.floor_bytes >= LARGE)
_pixels = both(large, _half, lambda row: len(row.shape) == 4 and row.num_classes == 150)
_z = both(trains, lambda row: row.loss.startswith("z_"))
_tiny = both(trains, _shape(256, 10), lambda row: row.timer != "device")
_plain, _compiled, _autocast = speed_up(*PLAIN), speed_up("compile"), speed_up("autocast")
_liger, _quack = speed_up("liger"), speed_up("quack")


def _t11(claim: str, at_least: float, *where: Callable[[Row], bool]) -> Goal:
    return Goal("T11", claim, both(trains, _ce, _floats, *where), speed_up("torch"), at_least, device="cpu")


GOALS = (
    Goal("T1", "cross entropy, forward + backward, over a copy of the logits", _listed, copies, at_most=1.15),
    Goal("T2", "every robust loss over our cross entropy", _robust, over_cross_entropy, at_most=1.05),
    Goal("T2", "bi-tempered over our cross entropy", both(large, _tempered), over_cross_entropy, at_most=1.5),
    Goal("T3", "fastest plain PyTorch over ours: cross entropy", both(large, _ce), _plain, 2.5),
    Goal("T3", "the same: MAE*, AGCE", both(large, loss("mae_auto", "agce")), _plain, 6),
    Goal("T3", "the same: HEM, NCE+MAE", both(large, _steep), _plain, 12),
    Goal("T3", "the same: bi-tempered", both(large, _tempered), _plain, 25),
    Goal("T4", "cross entropy under autocast over ours on bfloat16: time", both(large, _ce, _half), _autocast, 7),
    Goal("T4", "the same: extra memory", both(large, _ce, _half), memory_ratio("autocast"), 5),
    Goal("T5", "torch.compile of the reference over ours: geometric mean", trains, _compiled, 1.5, mean=True),
    Goal("T5", "the same: every case", trains, _compiled, 1.0),
    Goal("T6", "Liger-Kernel over ours, up to 1000 classes", _few, _liger, 3, device="cuda"),
    Goal("T6", "from 32k classes, upstream not 1", both(_many, _scaled), _liger, 1.3, device="cuda"),
    Goal("T6", "from 32k classes, upstream 1", both(_many, _unit), _liger, 1.0, device="cuda"),
    Goal("T7", "QuACK over ours, class counts divisible by 8: forward", _forward, _quack, 0.97, device="cuda"),
    Goal("T7", "the same: forward + backward through autograd", both(large, _aligned), _quack, 1.3, device="cuda"),
    Goal("T7", "odd class counts: forward + backward", both(large, _odd), _quack, 2, device="cuda"),
    Goal("T8", "segmentation, 150 classes, bfloat16, autocast over ours", _pixels, _autocast, 7, device="cuda"),
    Goal("T9", "Z-Error: launches of forward + backward", _z, launches, at_most=3, device="cuda"),
    Goal("T9", "Z-Error: plain PyTorch over ours", both(_z, lambda row: row.shape[0] <= 65536), _plain, 8),
    Goal("T10", "256 x 10, elapsed time, plain PyTorch over ours", _tiny, _plain, 2),
    _t11("F.cross_entropy over ours, 1 and 2 threads: 4096 x 1000", 5, _shape(4096, 1000)),
    _t11("the same: 65536 x 10", 15, _shape(65536, 10)),
    _t11("the same: 2048 x 10000", 2.5, _shape(2048, 10_000)),
    _t11(f"the same: {shape_name(PIXELS)}", 2.5, _shape(*PIXELS)),
    _t11(f"the same: {shape_name(PIXELS_LAST)} channels_last", 6, _shape(*PIXELS_LAST, layout="channels_last")),
    Goal("T11", "HEM and NCE+MAE, plain PyTorch over ours", both(large, _steep), _plain, 10, device="cpu"),
    Goal("T11", "Inductor over ours: geometric mean", trains, _compiled, 1.5, mean=True, device="cpu"),
    Goal("T11", "the same: every case", trains, _compiled, 1.0, device="cpu"),
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
        if row.provider == "fused" and row.device == device and goal.where(row):
            value = goal.measure(index, row)
            if value is not None:
                found.append((value, row.name))
    if not found:
        return Verdict(None)
    value, worst = max(found) if goal.at_most is not None else min(found)
    if goal.mean:
        value = math.exp(sum(math.log(v) for v, _ in found) / len(found))
    passed = value <= goal.at_most if goal.at_most is not None else value >= (goal.at_least or 0.0)
    return Verdict(value, len(found), worst, passed)


# T12 is judged on rows of benchmarks.accuracy. Results rounded to the same dtype differ by luck: 5 % are allowed.
LUCK = 1.05


def judge_accuracy(results: Results) -> list[tuple[str, str, Verdict]]:
    """Claim, what is asked and verdict of T12's sentences."""
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
            ("error of the gradient, ours over plain PyTorch, every dtype", f"<= 1 (+ {LUCK - 1:.0%})", verdict)
        )
    if values:
        value, worst = min(values)
        verdicts.append(
            ("error of the bfloat16 loss, F.cross_entropy over ours", ">= 10", Verdict(value, 1, worst, value >= 10))
        )
    return verdicts


def _ratio(a: float | None, b: float | None) -> float:
    """``a / b`` of two errors; None is an error without bounds: the result was not finite."""
    if a == b:
        return 1.0
    if a is None or b is None:
        return math.inf if a is None else 0.0
    return a / max(b, 1e-30)
