"""Z-Error for class labels (2506.02154): any row loss, without the rows that are unlikely for their class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from fused_losses._agreement import telling
from fused_losses._arguments import LOSSES, LossEntry, ZErrorRule, check_reduction, entry_named
from fused_losses._autograd import is_small, small_row_loss
from fused_losses._checks import check_row_loss, check_targets, check_tensors
from fused_losses._common import RowLossModule, check_forward
from fused_losses._logit_bias import LogitBias, check_logit_bias, class_dim
from fused_losses._ops import (
    PackedConstants,
    ZErrorConstants,
    pack_constants,
    pack_z_error_constants,
    z_error_kept_target,
)
from fused_losses._parameters import check_choice, closed_fraction, integer
from fused_losses._running import Source, source_of
from fused_losses._z_error import (
    FUSED,
    Groups,
    Threshold,
    ZErrorModule,
    ZErrorResult,
    ZOps,
    check_count,
    check_small_class,
    choose,
    fused_and_plain,
    pack_threshold,
)
from fused_losses._z_reference import class_score
from fused_losses.distributed import check_constant, global_mean, kept_weight
from fused_losses.statistics import ClassStatistics

_STATISTICS = ("logit", "prob", "loss")


def resolve_base(base: str | RowLossModule, **options: Any) -> tuple[LossEntry, dict[str, Any]]:
    """The registry entry of ``base`` and the keywords of its call.

    A Module brings its own options, so other ``options`` must then be at their defaults.
    """
    if isinstance(base, RowLossModule):
        check_forward(base)
        for name, default in {"weight": None, "ignore_index": -100, "logit_bias": 0.0}.items():
            given = options[name]
            if given is not default and (isinstance(given, Tensor) or given != default):
                raise ValueError(f"{name} must be set on the Module given as base, got {given!r} beside it")
        return LOSSES[base.stem], base.call_options()
    if not isinstance(base, str):
        raise TypeError(f"base must be the name of a row loss or its Module, got {type(base).__name__}")
    return entry_named(base, "base", ", or a Module"), options


class _Judge(NamedTuple):
    """What rows are judged by and how: what stays the same from call to call, checked, in the operators' words."""

    statistic: str
    base: str | RowLossModule
    tail: str
    min_count: int
    keep_small: bool

    @staticmethod
    def of(statistic: str, base: str | RowLossModule, sided: str, min_count: int, small_class: str) -> _Judge:
        """Raises a ValueError on an unknown word."""
        check_choice("statistic", statistic, _STATISTICS)
        tail = choose("sided", sided, {"two": "both", "lower": "high" if statistic == "loss" else "low"})
        return _Judge(statistic, base, tail, *check_small_class(min_count, small_class))


def _z_cross_entropy(
    ops: ZOps,
    source_of_classes: Callable[[int], Source],
    logits: Tensor,
    target: Tensor,
    judge: _Judge,
    *,
    threshold: Threshold,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    logit_bias: LogitBias,
    sample_weight: Tensor | None,
    return_mask: bool,
) -> Tensor | ZErrorResult:
    statistic, base, tail, min_count, keep_small = judge
    check_reduction(reduction)
    check_tensors(logits=logits, target=target)
    entry, keywords = resolve_base(base, weight=weight, ignore_index=ignore_index, logit_bias=logit_bias)
    num_classes = logits.shape[class_dim(logits)] if logits.dim() else 1
    numbers, tensor = pack_threshold(threshold, Groups("class", num_classes))
    source = source_of_classes(num_classes)
    mean_over_ranks = source.group is not None and reduction == "mean"
    arguments = entry.arguments(
        logits, target, reduction="sum" if mean_over_ranks else reduction, sample_weight=sample_weight, **keywords
    )
    given = {"weight": arguments.weight, "sample_weight": arguments.sample_weight}
    weights = {name: tensor for name, tensor in given.items() if tensor is not None}
    check_tensors(**weights)
    if mean_over_ranks:
        for of_rows in weights.values():
            check_constant(of_rows)
    if source.needs_checks:
        check_row_loss(arguments)
        check_targets(target, arguments.ignore_index, num_classes)
    judged = class_score(ops.row_loss, statistic, arguments) if source.wants_batch else None

    def moments_of_batch() -> Tensor:
        assert judged is not None
        return ops.class_moments(judged[0], target, num_classes, judged[1], arguments.ignore_index)

    moments = source.moments(num_classes, moments_of_batch)
    rule = ZErrorRule(moments, tensor, numbers, statistic, tail, min_count, keep_small, return_mask)
    loss, mask, scores = ops.z_error_row_loss(arguments, rule, judged)
    if mean_over_ranks:
        denominator = kept_weight(mask, target, keywords["weight"], sample_weight)
        loss = global_mean(loss, denominator, source.group)
    return ZErrorResult(loss, mask, scores) if return_mask else loss


def _z_error_cross_entropy(ops: ZOps) -> Callable[..., Any]:
    def z_error_cross_entropy(
        logits: Tensor,
        target: Tensor,
        *,
        threshold: float | Tensor = 2.0,
        statistic: str = "logit",
        base: str | RowLossModule = "cross_entropy",
        sided: str = "two",
        min_count: int = 2,
        small_class: str = "keep",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        logit_bias: LogitBias = 0.0,
        sample_weight: Tensor | None = None,
        statistics: ClassStatistics | None = None,
        process_group: dist.ProcessGroup | None = None,
        return_mask: bool = False,
    ) -> Tensor | ZErrorResult:
        """A row loss without the rows whose score is far from the mean of their class.

        For class labels of which some are wrong. With x the score of a row, and mean and unbiased std those of the rows
        with the same label, ``z = (x - mean) / std``. Rows with ``|z| <= threshold`` are kept, the others dropped: they
        count as ignored. The mask of kept rows is a constant for autograd. On three classes and more the defaults drop
        almost nothing; what works is ``statistic="prob", sided="lower"`` with running statistics
        (:class:`fused_losses.ZErrorCrossEntropyLoss`).

        Args:
            logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, float16 or bfloat16.
            target: class indices in ``[0, C)`` or ``ignore_index``, the shape of ``logits`` without its class
                dimension; int64, int32, int16 or uint8.
            threshold: in standard deviations, > 0: a number, a 0-dim tensor, or one number per class ``(C,)``. 2 is the
                paper's value; inf keeps all finite scores. Of n rows none has ``|z| > (n - 1) / sqrt(n)``, so 2 drops
                nothing from a class with fewer than six rows.
            statistic: the score: ``"logit"`` (of the target), ``"prob"`` (the softmax probability of the target,
                without ``logit_bias``) or ``"loss"`` (of ``base``, without weights).
            base: the row loss: a name such as ``"gce"`` or ``"gce_loss"`` for its default parameters, or a Module,
                whose parameters and options (all but ``reduction``) are used.
            sided: ``"two"`` as the paper's code, or ``"lower"``: drop only rows whose own class looks unlikely, which
                are those with a low logit, a low probability or a high loss.
            min_count: classes with fewer rows have no statistics, an integer >= 1; below 2 rows there are never any.
            small_class: what happens to rows of such classes, whatever the threshold: ``"keep"``, or ``"drop"`` as in
                the paper's code, which at 1000 classes and 256 rows drops 78 % of a batch.
            weight: class weights ``(C,)``: a row's loss is multiplied by ``weight[target]``.
            ignore_index: rows with this target have loss and gradient 0 and count nowhere.
            reduction: ``"none"`` (0 for dropped rows), ``"sum"``, or ``"mean"``: the sum of the weighted losses divided
                by the sum of the weights of the kept rows, or 0 with gradient 0 where that is 0.
            logit_bias: as for the base loss.
            sample_weight: one weight per row, the shape of ``target``.
            statistics: :class:`fused_losses.ClassStatistics` of C classes to use instead of the batch's.
            process_group: statistics and mean are over the rows of all its ranks, scaled so that
                DistributedDataParallel's average of the gradients is the gradient of one process with the whole batch.
                None: every rank on its own.
            return_mask: return :class:`fused_losses.ZErrorResult`: the loss, the mask and every row's z.

        Returns:
            The loss in float32, float64 for float64 ``logits``; a scalar unless ``reduction="none"``.

        Raises:
            TypeError: ``base`` is no row loss, ``logits`` or ``target`` no tensor, a threshold no number.
            ValueError: an option is out of range, ``base`` is unknown, or shapes do not fit.
            RuntimeError: shapes, dtypes or devices do not fit, or another rank of ``process_group`` was given bad
                arguments (between GPUs: a device assertion).
            IndexError: a target is out of range (on CUDA: a device assertion).

        Source: 2506.02154, which has the rule for two classes and names more classes as an extension; the extension is
        ours. Deviations from its code: a score that is not finite drops its own row, not its class; a dropped row
        cannot make loss or gradient NaN; where no score is finite, no row is dropped, and the loss is NaN, not 0; a
        class whose scores have a std below 1e-8 is kept whole; statistics are in float64.

        Example:
            >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
            >>> z_error_cross_entropy(logits, torch.tensor([0, 0, 0, 1, 1]), threshold=1.0)
            tensor(0.1735)
        """
        source = source_of(statistics, process_group)
        with telling(source.exchanges(reduction)):
            return _z_cross_entropy(
                ops,
                lambda num_classes: source,
                logits,
                target,
                _Judge.of(statistic, base, sided, min_count, small_class),
                threshold=threshold,
                weight=weight,
                ignore_index=ignore_index,
                reduction=reduction,
                logit_bias=logit_bias,
                sample_weight=sample_weight,
                return_mask=return_mask,
            )

    return z_error_cross_entropy


z_error_cross_entropy, z_error_cross_entropy_reference = fused_and_plain(_z_error_cross_entropy)


class ZErrorCrossEntropyLoss(ZErrorModule):
    """A row loss without the rows whose score is far from the mean of their class.

    Module form of :func:`fused_losses.functional.z_error_cross_entropy`, which explains the loss; optionally with
    statistics over batches.

    Args:
        threshold: as for the function; a tensor becomes a buffer, and one number per class may also be a list.
        statistic, base, sided, min_count, small_class, ignore_index, reduction, process_group: as for the function.
        weight: as for the function; a buffer.
        logit_bias: as for the function, but only in training mode: ``eval()`` leaves it out. A tensor becomes a buffer.
        running: True: use statistics over batches, which are in ``state_dict``. A batch is added before it is used; a
            class that is not in it keeps what it has. In eval mode they stay as they are; before any training batch, an
            eval call uses its own batch.
        momentum: how fast earlier batches fade, in [0, 1]: a class's earlier weight is multiplied by ``1 - momentum``
            with every batch that has the class. 0.1 remembers about 10 such batches, 0 all of them.
        num_classes: C. It gives running statistics their shape from the start: for copies (``AveragedModel``), replicas
            (``DataParallel``), ``functional_call``, distributed checkpoints and compiled first calls in inference mode.

    Returns:
        Called with ``(logits, target, sample_weight=None, *, return_mask=False)``: the loss, or
        :class:`fused_losses.ZErrorResult`.

    Raises:
        TypeError: ``base`` is no row loss, or a threshold no number.
        ValueError: an option is out of range or unknown, or set beside a Module that has it.

    Example:
        >>> criterion = ZErrorCrossEntropyLoss(1.0, statistic="prob", sided="lower", running=True, num_classes=2)
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
        >>> loss, mask, scores = criterion(logits, torch.tensor([0, 0, 0, 1, 1]), return_mask=True)
        >>> mask
        tensor([ True,  True, False,  True,  True])
    """

    weight: Tensor | None
    logit_bias: LogitBias
    # For calls with nothing but logits and target, of rule and loss. Empty: there are none; None: not made yet.
    _constants: tuple[ZErrorConstants, PackedConstants] | tuple[()] | None = None

    def __init__(
        self,
        threshold: Threshold = 2.0,
        statistic: str = "logit",
        base: str | RowLossModule = "cross_entropy",
        *,
        sided: str = "two",
        min_count: int = 2,
        small_class: str = "keep",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        logit_bias: LogitBias = 0.0,
        running: bool = False,
        momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(
            threshold,
            reduction=reduction,
            running=running,
            momentum=momentum,
            process_group=process_group,
            num_groups=check_count("num_classes", num_classes),
        )
        judge = _Judge.of(statistic, base, sided, min_count, small_class)
        check_logit_bias(logit_bias)
        resolve_base(base, weight=weight, ignore_index=ignore_index, logit_bias=logit_bias)
        self.statistic, self.sided, self.min_count, self.small_class = statistic, sided, judge.min_count, small_class
        self.base = base
        self._judge: _Judge | None = judge  # behind what it is made of, which resets it
        self.ignore_index = integer("ignore_index", ignore_index)
        self.register_buffer("weight", weight)
        self._keep("logit_bias", logit_bias)

    def __setattr__(self, name: str, value: Any) -> None:
        """Notices that an option has a new value, so that calls need not look."""
        super().__setattr__(name, value)
        if name in ("statistic", "base", "sided", "min_count", "small_class"):
            self._judge = self._constants = None
        elif name in ("threshold", "ignore_index", "reduction", "logit_bias", "momentum", "process_group"):
            self._constants = None

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """The same: a schedule makes a number a buffer."""
        super().register_buffer(name, tensor, persistent)
        self._constants = None

    def _make_judge(self) -> _Judge:
        judge = _Judge.of(self.statistic, self.base, self.sided, self.min_count, self.small_class)
        self._judge = judge
        return judge

    def _make_constants(self) -> tuple[ZErrorConstants, PackedConstants] | tuple[()]:
        statistic, base, tail, min_count, keep_small = self._make_judge() if self._judge is None else self._judge
        numbers, tensor = pack_threshold(self.threshold)
        bias, ignore_index, reduction = self.logit_bias, integer("ignore_index", self.ignore_index), self.reduction
        self._constants = ()
        if tensor is not None or len(numbers) != 1 or self.process_group is not None:
            return ()
        if (type(bias), type(ignore_index), type(reduction)) != (float, int, str) or bias != 0.0:
            return ()
        if not isinstance(base, str):  # a Module may change its options
            return ()
        entry, _ = resolve_base(base)
        if statistic != "loss" or entry.name == "cross_entropy":  # other losses take an operator of their own
            momentum = closed_fraction.pack("momentum", self.momentum)
            rule = (numbers[0], statistic, tail, min_count, keep_small, ignore_index, float(momentum))
            self._constants = rule, pack_constants((entry.name, entry.pack({}), 0.0, ignore_index, reduction))
        return self._constants

    def _small_call(self, logits: Tensor, target: Tensor) -> Tensor | None:
        """The loss of a small call; None where another way must take it."""
        constants = self._make_constants() if self._constants is None else self._constants
        if not constants or logits.dim() != 2 or self._tensor("weight") is not None:
            return None
        if target.shape != logits.shape[:1] or not logits.is_floating_point():  # for the error of the other way
            return None
        running, classes = None, logits.shape[1]
        if self.running:
            running = self._tensor("running_moments")
            if not self._learns() or running.shape[1] != classes:
                return None
        elif self.num_groups not in (None, classes):
            return None
        of_rule, of_loss = constants
        kept_target = z_error_kept_target(logits, target, running, pack_z_error_constants(of_rule))
        return small_row_loss(logits, kept_target, of_loss)

    def forward(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None, *, return_mask: bool = False
    ) -> Tensor | ZErrorResult:
        """The loss of ``logits`` for ``target``; see :func:`z_error_cross_entropy`."""
        if sample_weight is None and not return_mask and is_small(logits, target):
            loss = self._small_call(logits, target)
            if loss is not None:
                return loss
        return self.evaluate(FUSED, logits, target, sample_weight, return_mask=return_mask)

    def evaluate(
        self,
        ops: ZOps,
        logits: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        *,
        reduction: str | None = None,
        return_mask: bool = False,
    ) -> Tensor | ZErrorResult:
        """The loss by other operators, or with another ``reduction``."""
        with telling(self._exchanges(reduction)):
            return _z_cross_entropy(
                ops,
                self._source,
                logits,
                target,
                self._make_judge() if self._judge is None else self._judge,
                threshold=self._tensor("threshold"),
                weight=self._tensor("weight"),
                ignore_index=self.ignore_index,
                reduction=self.reduction if reduction is None else reduction,
                logit_bias=self._tensor("logit_bias") if self.training else 0.0,
                sample_weight=sample_weight,
                return_mask=return_mask,
            )

    def _shown(self) -> dict[str, Any]:
        base = {"base": self.base} if isinstance(self.base, str) else {}  # torch shows a Module inside by itself
        own = {"threshold": self.threshold, "statistic": self.statistic, **base, "sided": self.sided}
        options = self._unusual(min_count=2, small_class="keep", weight=None, ignore_index=-100, logit_bias=0.0)
        return {**own, **options, **super()._shown()}
