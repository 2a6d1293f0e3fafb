"""Collectives that bring the news of a failure along: an error of one rank is an error of all, and nobody waits.

A loss lists the collectives that its call takes, in an :class:`Agreement` around what may raise. A rank with an error
takes part in the next one with nothing but that news, and raises; the others learn of it there and raise as well. Where
ranks communicate between GPUs nobody waits to look: there the others get a device assertion.
"""

from __future__ import annotations

import threading
import zlib
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fused_losses._plain import outside_transforms

Group: TypeAlias = "dist.ProcessGroup | None"  # quoted: torch may have been built without

MOST_SUMS = 3  # numbers of a sum: with the news they make a message of one length for all calls
_HEADER = 16  # bytes before what is gathered: a number for the call and one for the target
_FAILED = -1  # in place of the call's number
_TOO_LONG = 4  # times a message that is gathered: ranks agree about a shorter one
_NEWS = "another rank of the process group has raised an error, or was given other arguments"


class Exchange(NamedTuple):
    """A collective of a call: a sum, or a gathering with a name of its own."""

    group: dist.ProcessGroup
    gathers: str = ""
    # Of a gathered message, in bytes, where the ranks know it from an earlier exchange; or of a sum, how many numbers.
    length: int = 0
    dtype: torch.dtype = torch.float64  # of a sum

    @staticmethod
    def over(group: Group, gathers: str = "", length: int = 0) -> Exchange:
        """Checks that this process may take part; None is the default group. A gathering of so many bytes at most."""
        check_member(group)
        group = dist.group.WORLD if group is None else group
        assert group is not None
        if not gathers:
            return Exchange(group, length=MOST_SUMS)
        return Exchange(group, gathers, _with_header(length) if length else 0)

    @staticmethod
    def adding(group: Group, count: int, dtype: torch.dtype) -> Exchange:
        """A sum of so many numbers."""
        return Exchange.over(group)._replace(length=count, dtype=dtype)


def _with_header(size: int) -> int:
    return _HEADER + -(-size // 8) * 8


class _Known:
    """What the ranks of a group have agreed upon, in the same way on each of them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        # Of the tensors that are exchanged. Before the first, of those that the group is for.
        on_gpu = "nccl" in dist.get_backend_config(group) and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.lengths: dict[str, int] = {}  # of the messages that are gathered, in bytes


_known: WeakKeyDictionary[dist.ProcessGroup, _Known] = WeakKeyDictionary()


class _Open(threading.local):
    """The agreements that a call is within, the innermost last."""

    def __init__(self) -> None:
        self.agreements: list[Agreement] = []


_open = _Open()


def check_member(group: Group) -> None:
    """Raises unless torch.distributed is initialised and this process belongs to the group."""
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed must be initialised (init_process_group) before process_group or all_reduce is used"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"process_group must contain the calling process, got a group without rank {dist.get_rank()}")


class Agreement:
    """Whatever raises within it is told to the ranks that wait in one of these exchanges.

    Agreements may be nested: an exchange is over in all of them, and nobody is told twice. One that is traced by
    torch.compile tells nobody: what a compiled call raises comes from outside this code, and the other ranks wait until
    the timeout of the group, or until the process that has failed is gone.
    """

    def __init__(self, *exchanges: Exchange) -> None:
        self.ahead = list(exchanges)

    def __enter__(self) -> Agreement:
        if not torch.compiler.is_compiling():
            _open.agreements.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.compiler.is_compiling():
            return
        _open.agreements.remove(self)
        if isinstance(error, Exception):
            for exchange in self.ahead:
                if exchange.group not in _who_knows(error):
                    _tell(exchange, error)


_nobody_waits: AbstractContextManager[Any] = nullcontext()


def telling(exchanges: list[Exchange]) -> AbstractContextManager[Any]:
    """An agreement about these exchanges; nothing, and no time, where there are none."""
    return Agreement(*exchanges) if exchanges else _nobody_waits


def sum_over_ranks(numbers: Tensor, group: Group) -> Tensor:
    """Sums over the ranks of up to ``MOST_SUMS`` numbers, in float64; one all-reduce."""
    exchange = Exchange.over(group)
    message = F.pad(numbers.detach().double(), (0, MOST_SUMS + 1 - len(numbers)))
    if torch.compiler.is_compiling():
        dist.all_reduce(message, group=exchange.group)
        return message[: len(numbers)]
    return _sum(exchange, message)[: len(numbers)]


def add_up(exchange: Exchange, numbers: Tensor) -> Tensor:
    """Sums over the ranks of as many numbers as the exchange says, in its dtype and any shape; one all-reduce."""
    message = torch.cat([numbers.detach().flatten(), numbers.new_zeros(1)])
    return _sum(exchange, message).view(numbers.shape)


def _sum(exchange: Exchange, message: Tensor) -> Tensor:
    """All but the last number, which is the news."""
    _take_part(exchange, message)
    if message.is_cpu:
        if message[-1].item() != 0.0:
            raise _error_of_another(exchange)
    else:
        torch._assert_async(message[-1] == 0, _NEWS)
    return message[:-1]


def gather(exchange: Exchange, call: str, numbers: Tensor, target: Tensor | None = None) -> Tensor:
    """``numbers`` of every rank, ``(ranks, ...)``. Raises unless all ranks make the same call, in words.

    One all-gather of a message as long as all ranks expect it, so that a rank can take part that has nothing to say. A
    call that needs a longer one needs it on all ranks; they gather once more. ``target`` has to be the same, too.
    """
    if torch.compiler.is_compiling():
        parts = [torch.empty_like(numbers) for _ in range(dist.get_world_size(exchange.group))]
        dist.all_gather(parts, numbers.contiguous(), group=exchange.group)
        return torch.stack(parts)
    size = numbers.numel() * numbers.element_size()
    needed, lengths = _with_header(size), _known_of(exchange.group).lengths
    expected = exchange.length or lengths.get(exchange.gathers, _HEADER)
    number = zlib.crc32(call.encode())
    message = _message(max(expected, needed), number, target, numbers)
    found = _take_part(exchange, message[:expected])
    _check_alike(exchange, found[:, :_HEADER].view(torch.int64), number, call)
    if needed > expected:
        found = _take_part(exchange, message)
    if not exchange.length and not needed <= expected <= _TOO_LONG * needed:
        lengths[exchange.gathers] = needed  # is expected of the next call
    return found[:, _HEADER : _HEADER + size].view(numbers.dtype).reshape(len(found), *numbers.shape)


def _message(length: int, number: int, target: Tensor | None, numbers: Tensor) -> Tensor:
    """So many bytes: the number of the call, one for the target, ``numbers``, and nothing in particular."""
    message = torch.empty(length, dtype=torch.uint8, device=numbers.device)
    header = message[:_HEADER].view(torch.int64)
    header[0] = number
    header[1] = 0 if target is None else _checksum(target)
    content = numbers.contiguous().view(-1).view(torch.uint8)
    message[_HEADER : _HEADER + len(content)] = content
    return message


def _take_part(exchange: Exchange, message: Tensor) -> Tensor:
    """The collective. Whatever becomes of it, the exchange is over."""
    for agreement in _open.agreements:
        if exchange in agreement.ahead:
            agreement.ahead.remove(exchange)
    _known_of(exchange.group).device = message.device
    try:
        if not exchange.gathers:
            dist.all_reduce(message, group=exchange.group)
            return message
        found = message.new_empty(dist.get_world_size(exchange.group), len(message))
        dist.all_gather(list(found.unbind()), message, group=exchange.group)
        return found
    except Exception as error:  # the others cannot be reached
        _who_knows(error).add(exchange.group)
        raise


def _known_of(group: dist.ProcessGroup) -> _Known:
    if group not in _known:
        _known[group] = _Known(group)
    return _known[group]


def _tell(exchange: Exchange, error: Exception) -> None:
    """Takes part with the news that this rank has failed."""
    known = _known_of(exchange.group)
    _who_knows(error).add(exchange.group)
    with outside_transforms():
        if exchange.gathers:
            length = exchange.length or known.lengths.get(exchange.gathers, _HEADER)
            message = torch.zeros(length, dtype=torch.uint8, device=known.device)
            message[:_HEADER].view(torch.int64).fill_(_FAILED)
        else:
            message = torch.zeros(exchange.length + 1, dtype=exchange.dtype, device=known.device)
            message[-1].fill_(1.0)
        _take_part(exchange, message)
    if message.is_cpu:
        _gather_texts(f"{type(error).__name__}: {error}", exchange.group)


def _check_alike(exchange: Exchange, headers: Tensor, number: int, call: str) -> None:
    if not headers.is_cpu:
        own = headers[dist.get_rank(exchange.group)]
        torch._assert_async((headers == own).all(), _NEWS)
        return
    calls, targets = (set(each) for each in zip(*headers.tolist(), strict=True))
    if _FAILED in calls:
        raise _error_of_another(exchange)
    error = None
    if len(calls) > 1:
        texts = "; ".join(f"rank {rank}: {text}" for rank, text in _gather_texts(call, exchange.group))
        error = RuntimeError(f"all ranks of the process group must make the same call, got {texts}")
    elif len(targets) > 1:
        error = RuntimeError("target must be the same on all ranks that share the classes, got different ones")
    if error is not None:
        _who_knows(error).add(exchange.group)
        raise error


def _error_of_another(exchange: Exchange) -> RuntimeError:
    """What a rank raises that learns of another's failure."""
    rank, text = next((rank, text) for rank, text in _gather_texts(None, exchange.group) if text is not None)
    error = RuntimeError(f"the loss has failed on another rank. Rank {rank} raised {text}")
    _who_knows(error).add(exchange.group)
    return error


def _who_knows(error: Exception) -> set[dist.ProcessGroup]:
    """The groups whose ranks have been told of an error."""
    found: set[dist.ProcessGroup] = error.__dict__.setdefault("_groups_that_know", set())
    return found


def _checksum(target: Tensor) -> Tensor:
    """A number that tells targets apart, and orders of the same targets, but for rare coincidences."""
    # Each place has a factor of 64 bits, which follows no rule that differences of targets could follow as well.
    factor = torch.arange(1, target.numel() + 1, device=target.device) * -0x61C8864680B583EB
    factor = (factor ^ (factor >> 31)) * -0x4B47D0C5A4E5C2B7
    return (target.reshape(-1).long() * (factor ^ (factor >> 29))).sum()


def _gather_texts(text: str | None, group: dist.ProcessGroup) -> list[tuple[int, str | None]]:
    """Every rank's text, with its number among all processes."""
    found: list[Any] = [None] * dist.get_world_size(group)
    with outside_transforms():
        dist.all_gather_object(found, text, group=group)
    return list(zip(dist.get_process_group_ranks(group), found, strict=True))
