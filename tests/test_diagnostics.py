"""OutlierTracker: counts by hand and against a loop, CSV, merging, two processes, bad input."""

from __future__ import annotations

import csv
import math
import pickle
import types
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES
from gloo_group import gloo_group, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_losses as fl
from fused_losses.cutoffs import CutoffCollector
from fused_losses.diagnostics import OutlierTracker

pytestmark = pytest.mark.any_cpu  # counts, no loss
Observation = tuple[int, bool, float]
observations = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.floats(-8, 8, width=16)), max_size=30)


def record(tracker: OutlierTracker, rows: list[Observation]) -> None:
    index, mask, score = zip(*rows, strict=True) if rows else ((), (), ())
    tracker.update(
        torch.tensor(index, dtype=torch.int64),
        torch.tensor(mask, dtype=torch.bool),
        torch.tensor(score, dtype=torch.float64),
    )


def same(tracker: OutlierTracker, other: OutlierTracker) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(tracker.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_two_epochs_by_hand(device: str) -> None:
    tracker = OutlierTracker(5, device=device)
    index = torch.tensor([3, 0, 1], device=device)
    tracker.update(
        index, torch.tensor([True, False, False], device=device), torch.tensor([0.5, 3.0, 2.0], device=device)
    )
    tracker.update(
        index, torch.tensor([True, False, False], device=device), torch.tensor([1.5, 5.0, math.nan]).to(device)
    )
    assert tracker.times_seen.tolist() == tracker.times_judged.tolist() == [2, 1, 0, 2, 0]
    assert tracker.times_flagged.tolist() == [2, 1, 0, 0, 0], "a row with NaN as score was not judged"
    rate, score = tracker.flag_rate().tolist(), tracker.mean_score().tolist()
    assert (rate[:2], rate[3]) == ([1.0, 1.0], 0.0) and math.isnan(rate[2]) and math.isnan(rate[4])
    assert (score[:2], score[3]) == ([4.0, 2.0], 1.0) and math.isnan(score[2])
    assert tracker.flagged(0.5).tolist() == [0, 1]
    assert tracker.flagged(0.5, min_seen=2).tolist() == [0]
    assert tracker.flagged(0.0).tolist() == [0, 1, 3], "samples never seen are not flagged"
    assert tracker.flagged(0.0, min_seen=3).tolist() == []


def test_what_was_not_judged_is_no_observation() -> None:
    """Clean long-tailed labels: classes of one row have no statistics, so nothing is known about those rows."""
    generator = torch.Generator().manual_seed(0)
    target = torch.cat([torch.arange(4).repeat_interleave(60), torch.arange(4, 40)])
    logits = torch.randn(len(target), 40, generator=generator)
    logits[torch.arange(len(target)), target] += 4.0
    alone = target >= 4
    for statistic in ("logit", "prob", "loss"):
        loss = fl.ZErrorCrossEntropyLoss(2.5, statistic=statistic, sided="lower", small_class="drop")
        tracker = OutlierTracker(len(target))
        for _ in range(3):
            rows = torch.randperm(len(target), generator=generator)
            _, mask, scores = loss(logits[rows], target[rows], return_mask=True)
            tracker.update(rows, mask, scores)
        assert not mask[alone[rows]].any(), "the loss itself drops them, as the paper's code"
        assert tracker.times_seen[alone].sum() == tracker.times_flagged[alone].sum() == 0
        assert not alone[tracker.flagged(0.5)].any() and not alone[tracker.rank()].any()
        assert not tracker.mean_score()[tracker.flagged(0.5)].isnan().any()
        assert tracker.times_seen[~alone].tolist() == [3] * 240


def test_ignored_and_missing_rows_are_no_observation() -> None:
    tracker = OutlierTracker(6)
    target = torch.tensor([0, 0, 0, -100, 1, 1])
    _, mask, scores = fl.functional.z_error_cross_entropy(torch.randn(6, 2), target, return_mask=True)
    tracker.update(torch.arange(6), mask, scores)
    assert tracker.times_seen.tolist() == [1, 1, 1, 0, 1, 1]
    binary = OutlierTracker(6)
    label = torch.tensor([0.0, 0.0, 1.0, 1.0, math.nan, 1.0])
    _, mask, scores = fl.functional.z_error_bce_with_logits(torch.randn(6), label, return_mask=True)
    binary.update(torch.arange(6), mask, scores)
    assert binary.times_seen.tolist() == [1, 1, 1, 1, 0, 1]


def test_every_kind_of_input_counts_alike() -> None:
    index, mask, score, prob = [2, 0, 2], [True, False, False], [0.5, -3.0, math.nan], [0.5, 0.25, 0.75]
    readonly = np.array(score)
    readonly.flags.writeable = False
    given: list[tuple[Any, Any, Any, dict[str, Any]]] = [
        (index, mask, score, {"prob": prob}),
        (tuple(index), tuple(mask), tuple(score), {"prob": tuple(prob)}),
        (np.array(index), np.array(mask), readonly, {"log_prob": np.log(prob)}),
        (np.array([2, 0, 2][::-1], dtype=">i2")[::-1], np.array(mask), np.float32(score), {"prob": np.float16(prob)}),
        ([np.int64(2), 0, np.uint8(2)], [np.True_, np.False_, False], [*map(np.float64, score)], {"prob": prob}),
        (torch.tensor(index), torch.tensor(mask), torch.tensor(score), {"prob": torch.tensor(prob)}),
        (index, torch.tensor(mask), np.array(score), {"log_prob": torch.tensor(prob).log()}),
        ([*torch.tensor(index)], mask, [*torch.tensor(score)], {"prob": prob}),
        (index, mask, score, {"row_statistics": types.SimpleNamespace(log_prob=torch.tensor(prob).double().log())}),
        ([[row] for row in index], [[m] for m in mask], [[s] for s in score], {"prob": [[p] for p in prob]}),
    ]
    for arguments in given:
        tracker = OutlierTracker(3)
        tracker.update(*arguments[:3], **arguments[3])
        assert tracker.times_seen.tolist() == [1, 0, 2]
        assert tracker.times_judged.tolist() == [1, 0, 1]
        assert tracker.times_flagged.tolist() == [1, 0, 0]
        assert tracker.mean_score().nan_to_num(9.0).tolist() == [-3.0, 9.0, 0.5]
        assert tracker.mean_probability().nan_to_num(9.0).tolist() == pytest.approx([0.25, 9.0, 0.625], rel=1e-7)


def test_a_mask_or_a_probability_alone_is_an_observation() -> None:
    judged, likely = OutlierTracker(3), OutlierTracker(3)
    judged.update([0, 2], [True, False])
    likely.update([0, 2, 2], prob=[0.5, math.nan, 0.25])
    assert judged.times_seen.tolist() == likely.times_seen.tolist() == [1, 0, 1]
    assert likely.times_judged.tolist() == [0, 0, 0]


def test_empty_batches_and_single_rows() -> None:
    tracker = OutlierTracker(3)
    tracker.update([], [], [], prob=[])
    tracker.update(np.array([], dtype=np.int64), np.array([], dtype=bool))
    assert tracker.rank().tolist() == [] and int(tracker.times_seen.sum()) == 0
    tracker.update(1, True, 2.0)
    tracker.update(np.int64(1), np.False_, np.float32(4.0))
    assert tracker.times_seen.tolist() == [0, 2, 0] and tracker.mean_score()[1] == 3.0
    tracker.update([0, 2], score=[1, 0])
    assert tracker.rank().tolist() == [2, 0, 1]


def test_rank_by_probability_then_by_score() -> None:
    tracker = OutlierTracker(6)
    tracker.update([0, 1, 2, 4], score=[1.0, -2.0, 0.0, 0.0])
    assert tracker.rank().tolist() == [1, 2, 4, 0], "low scores first, equals in the order of the data"
    assert tracker.rank(suspicious="high").tolist() == [0, 2, 4, 1]
    tracker.update([0, 1, 5], prob=[0.2, 0.9, 0.3])
    tracker.update([0, 1], log_prob=[math.log(0.6), -math.inf])
    assert tracker.mean_probability().nan_to_num(-1.0).tolist() == pytest.approx([0.4, 0.45, -1, -1, -1, 0.3])
    assert tracker.rank().tolist() == [5, 0, 1] == tracker.rank(suspicious="high").tolist()
    assert tracker.rank(min_seen=2).tolist() == [0, 1]
    assert tracker.rank(by="score").tolist() == [1, 2, 4, 0]
    assert tracker.flag_rate().isnan().all()


def test_flagged_needs_masks() -> None:
    tracker = OutlierTracker(3)
    assert tracker.flagged(0.0).tolist() == [], "nothing was seen"
    tracker.update([0, 1], mask=[True, False], score=[math.nan] * 2)
    assert tracker.flagged(0.0).tolist() == [], "rows without a score are no observations"
    for recorded in ({"score": [1.0, 2.0]}, {"prob": [0.1, 0.2]}):
        tracker.update([0, 1], **recorded)
        for asked in (tracker, tracker.merge(OutlierTracker(3))):
            with pytest.raises(RuntimeError, match=r"^flagged\(\) needs masks, and update\(\) was given none"):
                asked.flagged(0.0)
    tracker.update([2], mask=[True])
    assert tracker.flagged(0.0).tolist() == [2] and tracker.flagged(0.5).tolist() == []


def test_rank_without_observations_is_empty() -> None:
    assert OutlierTracker(3).rank().tolist() == []
    tracker = OutlierTracker(3)
    tracker.update([0, 1], [True, False])
    assert tracker.rank().tolist() == [], "a mask alone gives no order"


def test_the_probability_of_the_label_finds_planted_errors() -> None:
    """Cross entropy without reduction gives log-probabilities; the rows whose label is not the mode come first."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(500) % 5
    noisy = torch.where(torch.arange(500) < 50, (clean + 1) % 5, clean)
    tracker = OutlierTracker(500)
    for rows in torch.randperm(500, generator=generator).split(64):
        logits = torch.randn(len(rows), 5, generator=generator)
        logits[torch.arange(len(rows)), clean[rows]] += 6.0
        losses = fl.functional.cross_entropy(logits, noisy[rows], reduction="none")
        tracker.update(rows, log_prob=-losses)
    assert (tracker.rank()[:50] < 50).double().mean() > 0.9


@given(observations)
@settings(deadline=None)
def test_counts_duplicates_like_a_loop(rows: list[Observation]) -> None:
    tracker = OutlierTracker(6)
    record(tracker, rows)
    for sample in range(6):
        mine = [row for row in rows if row[0] == sample]
        assert int(tracker.times_seen[sample]) == len(mine)
        assert int(tracker.times_flagged[sample]) == sum(not kept for _, kept, _ in mine)
        if mine:
            assert float(tracker.mean_score()[sample]) == pytest.approx(
                sum(s for _, _, s in mine) / len(mine), abs=1e-12
            )
            assert 0.0 <= float(tracker.flag_rate()[sample]) <= 1.0


@given(observations, observations)
@settings(deadline=None)
def test_merging_is_the_same_as_one_tracker(first: list[Observation], second: list[Observation]) -> None:
    parts = OutlierTracker(6), OutlierTracker(6)
    whole = OutlierTracker(6)
    for part, rows in zip(parts, (first, second), strict=True):
        record(part, rows)
        record(whole, rows)
        for tracker in (part, whole):
            tracker.update([5, 0], prob=[0.5, 0.25])
    seen = parts[0].times_seen
    assert same(parts[0].merge(parts[1]), whole)  # scores are multiples of 2^-24 below 8: their sums are exact
    assert torch.equal(parts[0].times_seen, seen), "merge returns a new tracker"


def test_masks_of_any_shape_and_integer_type() -> None:
    tracker = OutlierTracker(300)
    index = torch.tensor([[0, 1], [255, 7]], dtype=torch.uint8)
    tracker.update(index, torch.tensor([[True, False], [False, True]]), torch.ones(2, 2, dtype=torch.bfloat16))
    assert tracker.flagged(1.0).tolist() == [1, 255]
    tracker.update(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.bool))
    assert int(tracker.times_seen.sum()) == 4


def test_scores_that_require_grad_are_detached() -> None:
    tracker = OutlierTracker(2)
    tracker.update(torch.tensor([1]), torch.tensor([False]), torch.ones(1, requires_grad=True))
    assert not tracker.mean_score().requires_grad
    assert tracker.mean_score()[1] == 1.0


def test_csv(tmp_path: Path) -> None:
    tracker = OutlierTracker(3)
    record(tracker, [(0, False, 0.1), (0, True, 0.2), (0, True, math.inf), (2, False, math.nan)])
    tracker.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == ["0", "1", "2"]
    assert (rows[0]["times_seen"], rows[0]["times_flagged"]) == ("3", "1"), "infinite: judged, but not averaged"
    assert float(rows[0]["flag_rate"]) == 1 / 3 and float(rows[0]["mean_score"]) == pytest.approx(0.15, rel=1e-15)
    assert (rows[1]["times_seen"], rows[1]["flag_rate"], rows[1]["mean_score"]) == ("0", "", "")
    assert (rows[2]["times_seen"], rows[2]["flag_rate"], rows[2]["mean_score"]) == ("0", "", ""), "NaN: not judged"
    assert {row["mean_probability"] for row in rows} == {""}
    tracker.update([2], prob=[0.25])
    tracker.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        last = [*csv.DictReader(file)][2]
    assert (last["times_seen"], last["times_judged"], last["flag_rate"]) == ("1", "0", "")
    assert last["mean_probability"] == "0.25"


def test_state_is_restored() -> None:
    tracker, other = OutlierTracker(6), OutlierTracker(6)
    record(tracker, [(0, False, 1.0), (5, True, 2.0)])
    record(other, [(3, False, 9.0)])
    saved = tracker.state_dict()
    record(tracker, [(1, True, 0.0)])
    other.load_state_dict(saved)
    assert other.times_seen.tolist() == [1, 0, 0, 0, 0, 1]
    record(other, [(1, True, 0.0)])
    assert same(tracker, other)
    with pytest.raises(ValueError, match="state_dict must be for num_samples=4, got counts of shape"):
        OutlierTracker(4).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state_dict must have the keys \['counts', 'sums'\], got \[\]"):
        tracker.load_state_dict({})


RANKS = [[(0, False, 1.0), (1, True, 2.0), (4, False, 0.5)], [(2, True, 4.0), (3, False, 8.0), (0, True, 3.0)]]


def worker(rank: int, world_size: int, folder: str) -> None:
    tracker, collector = OutlierTracker(6), CutoffCollector()
    record(tracker, RANKS[rank])
    collector.update(torch.arange(rank + 1.0), torch.full((rank + 1,), rank))
    with gloo_group(rank, world_size, folder):
        for _ in range(2):  # the second call must not count rows twice
            reduced, collected = tracker.all_reduce(), collector.all_reduce()
        with pytest.raises(RuntimeError, match=r"the same call, .* of 7 samples; rank 1: .* of 8 samples"):
            OutlierTracker(7 + rank).all_reduce()
        with pytest.raises(RuntimeError, match=r"the same call, .* of 2 classes; rank 1: .* of 3 classes"):
            fl.class_statistics(torch.zeros(1), torch.zeros(1, dtype=torch.int64), 2 + rank).all_reduce()
    torch.save({"tracker": reduced.state_dict(), "collector": collected.state_dict()}, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_see_the_sum(tmp_path: Path) -> None:
    # Sample 0 is on both ranks, as the padding of a DistributedSampler has it.
    run_ranks(worker, 2, tmp_path)
    whole = OutlierTracker(6)
    for rows in RANKS:
        record(whole, rows)
    for rank in range(2):
        saved: dict[str, Any] = torch.load(tmp_path / f"{rank}.pt")
        reduced = OutlierTracker(6)
        reduced.load_state_dict(saved["tracker"])
        assert same(reduced, whole)
        assert reduced.flag_rate()[0] == 0.5
        assert saved["collector"]["logits"].tolist() == [0.0, 0.0, 1.0]
        assert saved["collector"]["labels"].tolist() == [0, 1, 1]


ONE, KEPT = torch.tensor([1]), torch.tensor([True])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: OutlierTracker(0), ValueError, "num_samples must be at least 1, got 0"),
        (lambda t: OutlierTracker(2.5), TypeError, "num_samples must be an integer, got 2.5"),
        (lambda t: t.update(torch.tensor([1.0]), KEPT), TypeError, "index must hold integers, got torch.float32"),
        (lambda t: t.update(KEPT, KEPT), TypeError, "index must hold integers, got torch.bool"),
        (lambda t: t.update(ONE, torch.tensor([1.0])), TypeError, "mask must be a bool tensor .*, got torch.float32"),
        (lambda t: t.update(ONE, KEPT, ONE), TypeError, "score must be floating point, got torch.int64"),
        (lambda t: t.update(ONE, KEPT.expand(2)), ValueError, r"mask must have the shape \(1,\) of index, got \(2,\)"),
        (
            lambda t: t.update(ONE, KEPT, torch.ones(1, 1)),
            ValueError,
            r"score must have the shape \(1,\) .*, got \(1, 1\)",
        ),
        (lambda t: t.update(torch.tensor([0, 4]), KEPT.expand(2)), IndexError, r"index must be in \[0, 4\), got 4"),
        (lambda t: t.update(torch.tensor([-1, 9]), KEPT.expand(2)), IndexError, r"index must be in \[0, 4\), got -1"),
        (lambda t: t.update([0.5], KEPT), TypeError, "index must hold integers, got torch.float64"),
        (lambda t: t.update(["a"], KEPT), TypeError, "index must be a tensor, an array or a list of numbers, got list"),
        (lambda t: t.update([0, 4], [True, True]), IndexError, r"index must be in \[0, 4\), got 4"),
        (lambda t: t.update([0], [1]), TypeError, "mask must be a bool tensor .*, got torch.int64"),
        (lambda t: t.update(ONE, fl.row_statistics(torch.zeros(1, 2), ONE)), TypeError, "mask .* as row_statistics="),
        (lambda t: t.update(ONE), TypeError, r"update\(\) needs a mask, a score or a probability"),
        (lambda t: t.update(ONE, prob=[[0.5]]), ValueError, r"prob must have the shape \(1,\) of index, got \(1, 1\)"),
        (lambda t: t.update(ONE, prob=[1.5]), ValueError, "prob must be between 0 and 1, got 1.5"),
        (lambda t: t.update(ONE, prob=[-0.5]), ValueError, "prob must be between 0 and 1, got -0.5"),
        (lambda t: t.update(ONE, log_prob=[2.0]), ValueError, "log_prob must not be above 0, got 2.0"),
        (lambda t: t.update(ONE, prob=torch.ones(1).long()), TypeError, "prob must be floating point, got torch.int64"),
        (
            lambda t: t.update(ONE, prob=[0.5], log_prob=[0.5]),
            ValueError,
            "the probability must be given in one way, got log_prob and prob",
        ),
        (lambda t: t.update(ONE, row_statistics=ONE), TypeError, "row_statistics must have log_prob, got Tensor"),
        (lambda t: t.rank(by="loss"), ValueError, "by must be 'auto', 'probability' or 'score', got 'loss'"),
        (lambda t: t.rank(suspicious="far"), ValueError, "suspicious must be 'low', 'high' or 'both', got 'far'"),
        (lambda t: t.rank(min_seen=0), ValueError, "min_seen must be at least 1, got 0"),
        (lambda t: t.flagged(1.5), ValueError, "min_rate must be between 0 and 1, got 1.5"),
        (lambda t: t.flagged(math.nan), ValueError, "min_rate must be between 0 and 1, got nan"),
        (lambda t: t.flagged(0.5, min_seen=0), ValueError, "min_seen must be at least 1, got 0"),
        (lambda t: t.merge(OutlierTracker(5)), ValueError, "other must have num_samples=4, got 5"),
        (lambda t: t.all_reduce(), RuntimeError, "all_reduce needs torch.distributed.init_process_group"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    tracker = OutlierTracker(4)
    with pytest.raises(error, match=message):
        call(tracker)
    assert int(tracker.times_seen.sum()) == 0, "a rejected batch leaves no trace"


def test_scores_that_are_suspicious_on_either_side():
    target = torch.randn(500, generator=torch.Generator().manual_seed(0))
    target[:10] += 30
    target[10:20] -= 30
    _, kept, scores = fl.ZMSELoss()(torch.zeros(500), target, return_mask=True)
    tracker = fl.OutlierTracker(500)
    tracker.update(torch.arange(500), kept, scores)
    assert set(tracker.rank(suspicious="both")[:20].tolist()) == set(range(20))


def test_scores_of_yes_no_labels_turned_as_rank_wants_them():
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0))
    logits[:200] += 5
    logits[200:] -= 5
    answers = torch.arange(400) < 200
    answers[:10], answers[-10:] = False, True
    criterion = fl.ZErrorBCEWithLogitsLoss(sided="lower")
    _, kept, z = criterion(logits, answers.float(), return_mask=True)
    tracker = fl.OutlierTracker(400)
    tracker.update(torch.arange(400), kept, torch.where(answers, z, -z))
    wrong = {*range(10), *range(390, 400)}
    assert len(wrong & set(tracker.rank()[:20].tolist())) >= 18  # some right answers look as bad
    assert wrong <= set(tracker.flagged(0.5).tolist())


@pytest.mark.parametrize("state", [None, [1], {"counts": None, "sums": None}])
def test_a_state_that_is_none(state):
    with pytest.raises(TypeError, match=r"state_dict must (be a dictionary|hold tensors), got"):
        fl.OutlierTracker(3).load_state_dict(state)


def test_a_spawned_process_has_a_tracker_of_its_own() -> None:
    other = pickle.loads(ForkingPickler.dumps(tracker := fl.OutlierTracker(2)))  # torch shares the memory of tensors
    other.update([0], prob=[0.5])
    assert (other.times_seen.tolist(), tracker.times_seen.tolist()) == ([1, 0], [0, 0])
