"""Early-learning regularisation: a loss that remembers the predictions for every sample."""

from __future__ import annotations

import math
import operator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler at once
from torch.nn import functional as F

from fused_losses._arguments import RowLossArguments
from fused_losses._autograd import needs_reference
from fused_losses._checks import is_integer_tensor, kind_of, row_shape
from fused_losses._elr import LARGEST, ElrStep, fused_loss, next_memory, plain_values
from fused_losses._logit_bias import class_dim
from fused_losses._parameters import Choice, Count, OrTensor, assigned, closed_fraction, factor, positive_integer
from fused_losses._plain import in_backward, is_plain, reads_values
from fused_losses._row_values import (
    RowsModule,
    RowValues,
    checked_rows,
    maybe_any,
    plain_arguments,
    row_weights,
)

_several_classes = Count("be an integer >= 2", lambda v: 2 <= v < math.inf and v == int(v))
_places = Choice(("device", "host"))
_BETA, _LAM = OrTensor(closed_fraction), OrTensor(factor)


class _Pending(NamedTuple):
    """Rows on their way from the device to the memory on the host."""

    place: Tensor
    rows: Tensor
    arrived: torch.cuda.Event | None


class ELRLoss(RowsModule):
    """Cross entropy plus a term that pulls every prediction towards the sample's earlier predictions.

    For training to the end with many wrong labels: early in training predictions are right even where labels are wrong,
    and the term holds on to them. With p the probabilities of a row and t the memory of its sample, ``(C,)`` and 0 at
    first, a step in training mode first replaces t by ``beta t + (1 - beta) c``, where c is p clamped to ``[1e-4, 1 -
    1e-4]`` and divided by its sum. The loss is then ``-log p_y + lam log(1 - s)`` with ``s = sum_k t_k p_k``, and its
    gradient in a logit ``p_j - [j = y] - lam p_j (t_j - s) / (1 - s)``. It can be negative. In eval mode the memory is
    read and not changed.

    Drawbacks: it needs the number of every sample, and a memory of ``num_samples * num_classes`` numbers; ``beta`` and
    ``lam`` depend on the data; early mistakes are remembered as well.

    Args:
        num_samples: size of the training set, at least 1.
        num_classes: C, at least 2.
        beta: how much of the memory an update keeps, in [0, 1], a number or a 0-dim tensor. .7 for CIFAR-10, .9 for
            CIFAR-100.
        lam: weight of the term, >= 0, a number or a 0-dim tensor. 3 for CIFAR-10, 7 for CIFAR-100.
        memory_dtype: ``torch.float32`` or ``torch.bfloat16``. The latter takes half the space, and does not follow
            changes ``|t - p|`` below ``t / (512 (1 - beta))``: .7 % of t for ``beta=.7``, 2 % for .9.
        memory: ``"device"``: a buffer that moves with the Module. ``"host"``: the memory stays on the CPU, pinned where
            there is CUDA, and a step copies its rows to the device and back without waiting, if ``index`` is on the
            CPU; :meth:`flush` completes the last step.
        shard: ``(rank, world_size)``: hold only the samples with ``index % world_size == rank``. None: all.
        weight: class weights ``(C,)``, a buffer: a row's loss is multiplied by ``weight[target]``.
        ignore_index: rows with this target have loss and gradient 0 and do not change the memory.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum of the weighted losses divided by the sum of the
            weights, or 0 where that is 0.

    Returns:
        Called with ``(logits, target, index, sample_weight=None)``: the loss in float32, float64 for float64 logits.
        Logits are ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, ``target`` holds class indices, ``index`` the numbers of
        the samples, integers of the shape of ``target``.

    Raises:
        TypeError: ``index`` is no integer tensor, an argument is of another type, or logits are a DTensor.
        ValueError: an argument is out of range, or logits have another number of classes.
        RuntimeError: shapes, dtypes or devices do not fit; ``torch.func`` transforms in training mode.
        IndexError: a sample does not exist or belongs to another rank, or a target is out of range (on CUDA: device
            assertions).

    A step reads and writes the rows of the memory once, together with logits and gradient. A row whose logits are not
    finite has loss NaN and does not change the memory. If a sample occurs twice in a batch, the last row is remembered.
    ``state_dict`` holds the memory, so that training resumes exactly. What ``torch.utils.checkpoint`` recomputes in
    the backward pass reads the memory and does not change it again: the gradient is that of the loss, unless a row's
    sample has come once more since, in the same batch or a later one. In compiled code keep the loss outside.

    Under DistributedDataParallel every rank has a memory of its own, so a sample must always come to the same rank.
    ``DistributedSampler`` does not do that: it deals out the samples anew in every epoch. Give each rank its own part
    of the data, with an ordinary sampler, and the loss the same ``shard``. Keep the loss out of the wrapped model,
    because DDP overwrites buffers by those of rank 0, and save the ``state_dict`` of every rank. The loss itself
    communicates nothing: where it raises on one rank, the others wait in DDP's sum of gradients until the timeout of
    the group, or until that process is gone. Within a wrapper with ``process_group`` they are told at once.

    Example:
        >>> rank, world_size, samples = 0, 2, 6  # this process of two
        >>> mine = torch.arange(rank, samples, world_size)  # its samples: Subset(data, mine) with shuffle=True
        >>> criterion = ELRLoss(samples, num_classes=3, shard=(rank, world_size))
        >>> criterion(torch.zeros(3, 3), torch.tensor([0, 1, 2]), index=mine)
        tensor(0.7825)

    Source: 2007.00151, Eq. 5 and 6, with the clamp of its code. Deviations: the clamped p goes into the memory only; in
    the term its derivative would be 0 at the ends. Weights multiply both terms.
    """

    _checks: ClassVar = {
        "num_samples": assigned(positive_integer),
        "num_classes": assigned(_several_classes),
        "beta": assigned(_BETA),
        "lam": assigned(_LAM),
    }
    memory: Tensor
    _precise = ("memory",)
    weight: Tensor | None
    beta: float | Tensor
    lam: float | Tensor

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        beta: float | Tensor = 0.7,
        lam: float | Tensor = 3.0,
        *,
        memory_dtype: torch.dtype = torch.float32,
        memory: str = "device",
        shard: tuple[int, int] | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.num_samples = int(positive_integer.pack("num_samples", num_samples))
        self.num_classes = int(_several_classes.pack("num_classes", num_classes))
        self._set("beta", beta, _BETA)
        self._set("lam", lam, _LAM)
        if not isinstance(memory_dtype, torch.dtype) or memory_dtype not in LARGEST:
            raise ValueError(f"memory_dtype must be torch.float32 or torch.bfloat16, got {memory_dtype!r}")
        self.on_host = bool(_places.pack("memory", memory))
        self.shard = (0, 1) if shard is None else _check_shard(shard, self.num_samples)
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = ignore_index, reduction
        shape = len(range(self.shard[0], self.num_samples, self.shard[1])), self.num_classes
        pinned = self.on_host and torch.cuda.is_available()
        device = "cpu" if self.on_host else None
        self.register_buffer("memory", torch.zeros(shape, dtype=memory_dtype, device=device, pin_memory=pinned))
        self._pending: _Pending | None = None

    def forward(self, logits: Tensor, target: Tensor, index: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` for ``target``; ``index`` are the numbers of the samples."""
        args, place = self._call(logits, target, index, sample_weight)
        if self.reduction == "none" or not self._is_fused(args):
            return self._rows(args, place).reduce(self.reduction)
        weight, kept = row_weights(args)
        scale = torch.where(kept, weight, 0.0).flatten()
        if self.reduction == "mean":
            total = scale.sum()
            scale = scale / torch.where(total == 0, 1.0, total)
        return self._fused(args, place, scale)

    def rows(self, logits: Tensor, target: Tensor, index: Tensor, sample_weight: Tensor | None = None) -> RowValues:
        """Every row's loss; in training mode the memory is updated."""
        return self._rows(*self._call(logits, target, index, sample_weight))

    def _call(
        self, logits: Tensor, target: Tensor, index: Tensor, sample_weight: Tensor | None
    ) -> tuple[RowLossArguments, Tensor]:
        tensors = isinstance(logits, Tensor) and isinstance(target, Tensor)
        if tensors and target.is_floating_point() and not logits.is_floating_point():  # the order of the authors' code
            raise RuntimeError(f"ELRLoss: it is called with (logits, target, index), got logits of {logits.dtype}")
        args = plain_arguments(
            "ELRLoss",
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            sample_weight=sample_weight,
        )
        return args, self._place(index, logits, target)

    def _updates(self) -> bool:
        """Whether a call changes the memory: in training mode, once."""
        return self.training and not in_backward()

    def _is_fused(self, args: RowLossArguments) -> bool:
        """Whether the kernel takes the call: no other derivative than that in the logits, nothing traced."""
        logits, *others = args.logits, args.weight, args.sample_weight, self.memory, self.beta, self.lam
        tensors = [other for other in others if isinstance(other, Tensor)]
        on_device = logits.is_cpu or logits.is_cuda
        return on_device and is_plain(logits) and is_plain(self.memory) and not needs_reference(logits, *tensors)

    def _rows(self, args: RowLossArguments, place: Tensor) -> RowValues:
        if self._is_fused(args):
            return RowValues(self._fused(args, place).view(row_shape(args.logits)), *row_weights(args))
        rows = checked_rows(args)
        z = rows.logits.movedim(rows.dim, -1).flatten(0, -2) if args.logits.dim() > 1 else rows.logits.unsqueeze(0)
        memory = self._read(place, z.device).to(z.dtype)
        if self._updates():
            p = torch.softmax(z.detach(), 1)
            usable = ~rows.ignored.flatten() & p.sum(1).isfinite()
            memory = next_memory(memory, p, usable, self.beta, self.memory.dtype)
            self._write(place, memory, usable)
        return RowValues.of(rows, plain_values(memory, rows.target.flatten(), self.lam, z).view(rows.target.shape))

    def _fused(self, args: RowLossArguments, place: Tensor, scale: Tensor | None = None) -> Tensor:
        """As :func:`fused_loss`. Of a memory elsewhere the kernel gets the rows of the samples that it is about."""
        logits, device = args.logits, args.logits.device
        self.flush()
        staged = self.memory.device != device
        memory, samples, one_row_each = self.memory, place, False
        if staged:
            samples, place = torch.unique(place.cpu(), return_inverse=True)
            one_row_each = len(samples) == len(place)
            memory = self._read_host(samples, device)
            place = place.pin_memory().to(device, non_blocking=True)
        target, updates = args.target, self._updates()
        step = ElrStep(target, args.ignore_index, place, memory, self.beta, self.lam, updates, one_row_each)
        loss = fused_loss(step, logits, scale)
        if staged and updates:
            self._write_host(samples, memory)
        return loss

    def _place(self, index: Any, logits: Tensor, target: Tensor) -> Tensor:
        """Where the rows' samples are in the memory."""
        if not is_integer_tensor(index):
            raise TypeError(f"index must be an integer tensor, got {kind_of(index)}")
        if index.shape != target.shape:
            raise RuntimeError(f"index must have the shape {list(target.shape)} of target, got {list(index.shape)}")
        if logits.shape[class_dim(logits)] != self.num_classes:
            raise ValueError(
                f"logits must have the {self.num_classes} classes of the memory, got shape {list(logits.shape)}"
            )
        if self.training and torch._C._are_functorch_transforms_active():
            raise RuntimeError("ELRLoss updates its memory in training mode: call eval() under torch.func transforms")
        index = index.flatten().long()
        self._check_index(index)
        if not self.on_host:
            if self.memory.device != logits.device:
                raise RuntimeError(
                    f"the memory of ELRLoss must be on the device of logits ({logits.device}), got "
                    f"{self.memory.device}: move the loss there, or keep it in memory='host'"
                )
            index = index.to(logits.device)
        return torch.div(index, self.shard[1], rounding_mode="floor") if self.shard[1] > 1 else index

    def _check_index(self, index: Tensor) -> None:
        """Raises on the CPU; on CUDA a device assertion."""
        rank, world_size = self.shard
        good = (index >= 0) & (index < self.num_samples)
        if not reads_values(index):
            if not torch._C._are_functorch_transforms_active():
                torch._assert_async((good & (index % world_size == rank)).all(), "index of a sample is out of range")
            return
        if not good.all():
            raise IndexError(f"index must be in [0, {self.num_samples}), got {int(index[~good][0])}")
        other = index[index % world_size != rank] if world_size > 1 else index[:0]
        if len(other):
            raise IndexError(
                f"index must be a sample of this shard, index % {world_size} == {rank}, got {int(other[0])}; every "
                "rank has samples of its own (see the class)"
            )

    def _read(self, place: Tensor, device: torch.device) -> Tensor:
        """The memory of the rows' samples on that device."""
        if not self.on_host:
            return F.embedding(place, self.memory)
        return self._read_host(place, device)

    @_disable_dynamo
    def _read_host(self, place: Tensor, device: torch.device) -> Tensor:
        self.flush()
        shape, pinned = (len(place), self.num_classes), device.type == "cuda"
        rows = torch.empty(shape, dtype=self.memory.dtype, device="cpu", pin_memory=pinned)
        torch.index_select(self.memory, 0, place.cpu(), out=rows)
        return rows.to(device, non_blocking=True)

    def _write(self, place: Tensor, rows: Tensor, usable: Tensor) -> None:
        """Remembers ``rows``; of rows with the same place the last usable one, whatever the order of the writes."""
        here = place.to(rows.device)
        key = 2 * here + usable
        order = torch.argsort(key, stable=True)
        last = order[torch.searchsorted(key[order], 2 * here + 1, right=True) - 1]
        if maybe_any(last != torch.arange(last.shape[0], device=last.device)):
            rows = rows[last]
        stored = rows.detach().to(self.memory.dtype)  # torch.export.save fails on no_grad() around what returns nothing
        if self.on_host:
            self._write_host(place, stored)
        else:
            self.memory.detach().index_copy_(0, place, stored)

    @_disable_dynamo
    def _write_host(self, place: Tensor, rows: Tensor) -> None:
        on_cuda = rows.is_cuda
        staged = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=on_cuda)
        staged.copy_(rows, non_blocking=True)
        arrived = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        if arrived is not None:
            arrived.record(torch.cuda.current_stream(rows.device))
        self._pending = _Pending(place.cpu(), staged, arrived)

    @torch.no_grad()
    def flush(self) -> None:
        """Completes the update of a memory on the host by the last step; ``state_dict`` and the next step do it too."""
        pending, self._pending = self._pending, None
        if pending is not None:
            if pending.arrived is not None:
                pending.arrived.synchronize()
            self.memory.index_copy_(0, pending.place, pending.rows)

    def _apply(self, fn: Any, recurse: bool = True) -> ELRLoss:
        memory = self.memory
        if self.on_host:  # it stays where it is
            self._buffers["memory"] = None
        super()._apply(fn, recurse)
        if self.on_host:
            self._buffers["memory"] = memory
        return self

    def reset_parameters(self) -> None:
        """Forgets the memory, as after ``to_empty``; there is nothing else to reset."""
        self._pending = None
        self.memory.zero_()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.flush()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.flush()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return self.__dict__.copy()

    def _shown(self) -> dict[str, Any]:
        shown = {name: getattr(self, name) for name in ("num_samples", "num_classes", "beta", "lam")}
        shown |= {"memory_dtype": self.memory.dtype} if self.memory.dtype != torch.float32 else {}
        shown |= {"memory": "host"} if self.on_host else {}
        return shown | self._unusual(shard=(0, 1), weight=None, ignore_index=-100, reduction="mean")


def _check_shard(shard: Any, num_samples: int) -> tuple[int, int]:
    """A rank and the number of ranks."""
    try:
        rank, world_size = (operator.index(number) for number in shard)
    except (TypeError, ValueError):
        raise TypeError(f"shard must be a pair of integers (rank, world_size), got {shard!r}") from None
    if not 0 <= rank < world_size <= num_samples:
        raise ValueError(f"shard must satisfy 0 <= rank < world_size <= num_samples, got {(rank, world_size)}")
    return rank, world_size
