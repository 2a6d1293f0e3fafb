"""Published losses as their authors' code has them, for tests/test_migrating.py.

In our own words and without speed; clamps, epsilons, constant parts and factors are theirs. A loss gives one number
per row, but where its mean is of another kind.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

N, C = 49, 7

# The arguments of the published losses; where a name has several meanings, its value suits most.
G = SimpleNamespace(
    alpha=0.6, beta=0.7, scale=1.7, q=0.7, k=0.3, a=2.5, gamma=1.3, tau=4.0, power=0.3, m=1e3, min_prob=1e-7, s=0.1,
    threshold=0.2, Lambda=3.0, delta=2.5, t=0.5, t1=0.7, t2=1.3, label_smoothing=0.1, num_iters=4, epsilon=1.5, lam=0.7,
    temp=1.2, c=1.5, smooth_rate=-0.8, margin=0.5, sigma=1.2, num_samples=N, order=3, init=2.0,
)  # fmt: skip
random = torch.Generator().manual_seed(1)
OTHER, NUMBERS = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((N, C), (N,)))
WEIGHT = 0.5 + torch.rand(C, generator=random, dtype=torch.float64)
P = 0.6 * torch.eye(C, dtype=torch.float64) + 0.4 / C
CHOSEN = F.cross_entropy(OTHER, torch.arange(N) % C, reduction="none").argsort()[:20]
SHARES = torch.tensor([1 - G.alpha] + [G.alpha] * (C - 1), dtype=torch.float64)
OLD = (torch.rand(N, generator=random) > 0.5).double()  # rows that are kept


class Data(NamedTuple):
    """Logits and what depends on them, for the published formulas."""

    z: Tensor
    y: Tensor

    def hot(self) -> Tensor:
        return F.one_hot(self.y, self.z.shape[1]).to(self.z)

    def p(self, low: float = 0.0) -> Tensor:
        return torch.softmax(self.z, 1).clamp(min=low)

    def py(self, low: float = 0.0) -> Tensor:
        return self.of_label(self.p(low))

    def logs(self) -> Tensor:
        return torch.log_softmax(self.z, 1)

    def of_label(self, per_class: Tensor) -> Tensor:
        return per_class.gather(1, self.y[:, None]).squeeze(1)

    def ce(self) -> Tensor:
        return -self.of_label(self.logs())


def gce(d: Data, q: float = G.q, low: float = 1e-7) -> Tensor:
    return (1 - d.py(low) ** q) / q


def rce(d: Data) -> Tensor:
    return -(d.p(1e-7) * d.hot().clamp(1e-4, 1.0).log()).sum(1)


def nce(d: Data) -> Tensor:
    return d.of_label(d.logs()) / d.logs().sum(1)


def mae(d: Data) -> Tensor:
    return 1 - d.py()


def ngce(d: Data) -> Tensor:
    return (1 - d.py(1e-7) ** G.q) / (C - (d.p(1e-7) ** G.q).sum(1))


def focal_terms(logs: Tensor, gamma: float = G.gamma) -> Tensor:
    return -((1 - logs.detach().exp()) ** gamma) * logs


def nfl(d: Data) -> Tensor:
    terms = focal_terms(d.logs())
    return d.of_label(terms) / terms.sum(1)


def nnce(d: Data, low: float = 1e-7) -> Tensor:
    terms = d.p(low).log() - torch.tensor(low).log()  # float32
    return 1 - d.of_label(terms) / terms.sum(1)


def nnfl(d: Data) -> Tensor:
    least = float(torch.tensor(G.min_prob).log())
    largest = -((1 - G.min_prob) ** G.gamma) * least
    terms = focal_terms(d.logs().clamp(min=least))
    return 1 - (largest - d.of_label(terms)) / (C * largest - terms.sum(1))


def agce(d: Data) -> Tensor:
    return ((G.a + 1) ** G.q - (G.a + d.py()) ** G.q) / G.q


def aue(d: Data) -> Tensor:
    return ((G.a - d.py()) ** G.q - (G.a - 1) ** G.q) / G.q


def amse(d: Data) -> Tensor:
    return (d.p() - G.a * d.hot()).square().mean(1)


def log_eps_softmax(d: Data) -> Tensor:
    p = d.p()
    top = F.one_hot(p.argmax(1), C)
    return d.of_label(((p + G.m * top) / (G.m + 1)).clamp(min=1e-8).log())


def ldr(d: Data) -> Tensor:
    h = F.softplus(d.z)
    h = h / h.mean(1, keepdim=True)
    gaps = h - d.of_label(h)[:, None] + G.threshold * (1 - d.hot())
    return G.Lambda * (torch.logsumexp(gaps / G.Lambda, 1) - math.log(C))


def clipped_logits(d: Data, longest: float, length: float) -> Tensor:
    norm = d.z.norm(dim=1, keepdim=True) + 1e-7
    return F.cross_entropy(torch.where(norm > longest, d.z / norm * length, d.z), d.y, reduction="none")


def divergence(weights: tuple[float, ...], d: Data, *others: Tensor) -> Tensor:
    parts = [d.hot(), *(torch.softmax(z, 1) for z in (d.z, *others))]
    log_mean = sum(w * part for w, part in zip(weights, parts, strict=True)).clamp(1e-7, 1.0).log()
    terms = [
        w * torch.where(x > 0, x * (x.clamp(min=1e-7).log() - log_mean), 0.0)
        for w, x in zip(weights, parts, strict=True)
    ]
    return sum(terms).sum(1)


def scaled(weight: float) -> float:
    return -1 / ((1 - weight) * math.log(1 - weight))


def phuber(d: Data, q: float) -> Tensor:
    """Partially Huberised cross entropy for q = 0, else GCE."""
    p0 = G.tau ** (1 / (q - 1))
    loss = (lambda p: (1 - p**q) / q) if q else (lambda p: -torch.log(p))
    at = loss(torch.tensor(p0, dtype=d.z.dtype))
    return torch.where(d.py() <= p0, at + G.tau * (p0 - d.py()), loss(d.py()))


def log_t(x: Tensor, t: float) -> Tensor:
    return (x ** (1 - t) - 1) / (1 - t)


def exp_t(x: Tensor, t: float) -> Tensor:
    return (1 + (1 - t) * x).clamp(min=0) ** (1 / (1 - t))


def tempered(z: Tensor, iterations: int) -> Tensor:
    """The normaliser, which is differentiated through all iterations."""
    top = z.amax(1, keepdim=True)
    x = z - top
    for _ in range(iterations):
        x = (z - top) * exp_t(x, G.t2).sum(1, keepdim=True) ** (1 - G.t2)
    return -log_t(1 / exp_t(x, G.t2).sum(1, keepdim=True), G.t2) + top


def bi_tempered(d: Data, smoothing: float = 0.0, iterations: int = 5, exact: bool = True) -> Tensor:
    """``exact``: the derivative of the normaliser is that of the root, as published."""
    labels = (1 - smoothing * C / (C - 1)) * d.hot() + smoothing / (C - 1) if smoothing else d.hot()
    root = tempered(d.z, iterations)
    if exact:
        escort = exp_t(d.z - root, G.t2).detach() ** G.t2
        linear = (d.z * escort).sum(1, keepdim=True) / escort.sum(1, keepdim=True)
        root = root.detach() + linear - linear.detach()
    p, power = exp_t(d.z - root, G.t2), 2 - G.t1
    terms = labels * (log_t(labels + 1e-10, G.t1) - log_t(p, G.t1)) - (labels**power - p**power) / power
    return terms.sum(1)


def of_two(d: Data) -> Data:
    return Data(torch.stack([torch.zeros(N, dtype=torch.float64), d.z[:, 0]], 1), d.y % 2)


def smoothed(d: Data, share: float) -> Tensor:
    return (1 - share) * d.ce() - share * d.logs().mean(1)


def entropy(share: float) -> float:
    """Of a smoothed label."""
    others, own = share / C, 1 - share + share / C
    return -own * math.log(own) - (C - 1) * others * math.log(others)


def sigmoid_focal(x: Tensor, answers: Tensor) -> Tensor:
    p, yes = torch.sigmoid(x), answers.to(x)
    p_t, share = torch.where(answers == 1, p, 1 - p), G.alpha * yes + (1 - G.alpha) * (1 - yes)
    return share * (1 - p_t) ** G.gamma * F.binary_cross_entropy_with_logits(x, yes, reduction="none")


def elr(d: Data) -> Tensor:
    p = d.p().clamp(1e-4, 1 - 1e-4)
    memory = (1 - G.beta) * (p / p.sum(1, keepdim=True)).detach()
    return d.ce() + G.lam * torch.log(1 - (memory * p).sum(1))


def super_loss(d: Data) -> Tensor:
    special = pytest.importorskip("scipy.special")
    loss = d.ce()
    y = 0.5 * torch.clamp((loss.detach() - math.log(C)).float() / G.lam, min=-2 / math.e)
    sigma = torch.exp(-torch.from_numpy(special.lambertw(y.numpy()).real)).double()
    return (loss - math.log(C)) * sigma + G.lam * sigma.log() ** 2


def corrected(d: Data, P: Tensor, forward: bool) -> Tensor:
    p = d.p().clamp(1e-7, 1 - 1e-7)
    return -d.of_label((p @ P).log()) if forward else -((d.hot() @ torch.linalg.inv(P)) * p.log()).sum(1)


def volume(d: Data) -> Tensor:
    one = torch.eye(C, dtype=torch.float64)
    T = F.normalize(one + (1 - one) / (1 + math.exp(G.init)), p=1, dim=1)
    return F.nll_loss((d.p() @ T).log(), d.y) + G.lam * T.slogdet().logabsdet


def cores(d: Data, sieve: bool = False) -> Tensor:
    all_labels = -torch.log(d.p() + 1e-8).mean(1)
    kept = (d.ce() - all_labels).detach() <= 0 if sieve else torch.ones(len(d.y), dtype=torch.bool)
    return (d.ce() - G.beta * all_labels)[kept].mean()


def hem(d: Data) -> Tensor:
    errors = (d.z - d.of_label(d.z)[:, None] + G.margin).clamp(min=0) * (1 - d.hot())
    kept = (errors >= errors.mean(1, keepdim=True)) & (errors > 0)
    rows = (errors * kept).sum(1) / (1e-6 + kept.sum(1).double())
    return rows.sum() / (rows > 0).sum()


def z_bce(x: Tensor, answers: Tensor) -> Tensor:
    kept = torch.zeros(len(x), dtype=torch.bool)
    for label in (0, 1):
        mine = answers == label
        kept |= mine & ((x - x[mine].mean()).abs() / x[mine].std() <= G.sigma)
    return F.binary_cross_entropy_with_logits(x, answers.to(x), reduction="none")[kept].sum() / (
        kept.sum().double() + 1e-8
    )


def z_mse(x: Tensor, numbers: Tensor) -> Tensor:
    kept = ((numbers - numbers.mean()) / (numbers.std() + 1e-8)).abs() <= G.sigma
    return (x - numbers)[kept].square().sum() / (kept.sum().double() + 1e-8)


def quality(d: Data) -> Tensor:
    ratio = -(d.p() * d.logs()).sum(1) / math.log(C) / d.py()
    return torch.log(ratio + 1) / ratio
