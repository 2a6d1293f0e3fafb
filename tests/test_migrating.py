"""docs/migrating.md: published losses, with their clamps, against the code that stands beside their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import published_losses as pub
import pytest
import torch
from published_losses import C, Data, G, N
from torch import Tensor, nn
from torch.nn import functional as F

import fused_losses as fl

pytestmark = pytest.mark.any_cpu

PAGE = (Path(__file__).parents[1] / "docs/migrating.md").read_text()
ROWS = {
    cells[0]: cells[1].strip("`")
    for cells in (line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| "))
    if len(cells) == 3 and cells[0] != "theirs"
}


class Case(NamedTuple):
    """A published loss, and how far ours may be from it in value and gradient: with logits of deviation 2, where clamps
    have nothing to do, and with logits of deviation 20."""

    theirs: Callable[[Data], Tensor]
    near: float = 1e-12
    far: float | None = None  # None: as near, for values up to 1
    gradient: float = 0.0  # more than that of the value
    constant: float = 0.0  # what theirs has more
    arguments: Mapping[str, object] = {}


def in_sum(active: Callable[[Data], Tensor], passive: Callable[[Data], Tensor]) -> Callable[[Data], Tensor]:
    return lambda d: G.alpha * active(d) + G.beta * passive(d)


RCE_CLAMP = 9.3e-7 * (C - 1)
CASES = {
    # Active-Passive-Losses and its copies
    "`GeneralizedCrossEntropy(num_classes, q)`": Case(pub.gce, far=1.8e-5),
    "`SCELoss(alpha": Case(in_sum(Data.ce, pub.rce), far=RCE_CLAMP),
    "`ReverseCrossEntropy(": Case(pub.rce, far=RCE_CLAMP),
    "`NormalizedReverseCrossEntropy(": Case(lambda d: 1 / 4 * (C - 1) * pub.rce(d), far=RCE_CLAMP * C / 4),
    "`NormalizedCrossEntropy(": Case(pub.nce),
    "`NormalizedGeneralizedCrossEntropy(": Case(pub.ngce, far=1.3e-5 / (C - 1)),
    "`MeanAbsoluteError(": Case(lambda d: G.scale * pub.mae(d)),
    "`NormalizedMeanAbsoluteError(": Case(lambda d: pub.mae(d) / (2 * (C - 1))),
    "`FocalLoss(gamma)`": Case(lambda d: d.of_label(pub.focal_terms(d.logs()))),
    "`NormalizedFocalLoss(": Case(pub.nfl),
    "`NCEandMAE(": Case(in_sum(pub.nce, pub.mae)),
    "`NCEandRCE(": Case(in_sum(pub.nce, pub.rce), far=RCE_CLAMP),
    "`NFLandMAE(": Case(in_sum(pub.nfl, pub.mae)),
    "`NFLandRCE(": Case(in_sum(pub.nfl, pub.rce), far=RCE_CLAMP),
    "`NGCEandMAE(": Case(in_sum(pub.ngce, pub.mae), far=1.3e-5 / (C - 1)),
    "`GCEandMAE(": Case(lambda d: pub.gce(d) + G.beta * pub.mae(d), far=1.8e-5),
    "`AGCELoss(": Case(pub.agce),
    "`AUELoss(": Case(pub.aue),
    "`AExpLoss(": Case(lambda d: torch.exp(-d.py() / G.a)),
    "`NCEandAGCE(": Case(in_sum(pub.nce, pub.agce)),
    "`NCEandAUE(": Case(in_sum(pub.nce, pub.aue)),
    "`NCEandAEL(": Case(in_sum(pub.nce, lambda d: torch.exp(-d.py() / G.a))),
    "`criterion(out / tau": Case(lambda d: F.cross_entropy(F.normalize(d.z) / G.tau, d.y, reduction="none"), 1e-7),
    "`pNorm(p)`": Case(lambda d: (d.p(1e-7) ** G.power).sum(1), far=C * 1e-7**G.power),
    # ANL, JAL, eps-softmax
    "`NormalizedNegativeCrossEntropy(": Case(pub.nnce, 1e-7),
    "`NormalizedNegativeFocalLoss(": Case(pub.nnfl, 1e-6),
    "`anl_ce(": Case(in_sum(pub.nce, pub.nnce), 1e-7),
    "`anl_fl(": Case(in_sum(pub.nfl, pub.nnfl), 1e-6),
    "`NCEandNNCE(": Case(in_sum(pub.nce, lambda d: pub.nnce(d, 1e-8)), 1e-7),
    "`AMSELoss(": Case(pub.amse),
    "`NCEandAMSE(": Case(in_sum(pub.nce, pub.amse)),
    "`NFLandAMSE(": Case(in_sum(pub.nfl, pub.amse)),
    "`ECELoss(": Case(lambda d: -pub.log_eps_softmax(d)),
    "`ECEandMAE(": Case(in_sum(lambda d: -pub.log_eps_softmax(d), lambda d: 2 * pub.mae(d))),
    "`EFLandMAE(": Case(
        in_sum(lambda d: pub.focal_terms(pub.log_eps_softmax(d)), lambda d: 2 * pub.mae(d)), gradient=math.inf
    ),
    "`LDRLoss_V1(": Case(pub.ldr, far=1e-9),
    "`CEandLC(": Case(lambda d: pub.clipped_logits(d, 1 / G.delta, G.delta)),
    # GCE, Huber, Taylor, Jensen-Shannon
    "`TruncatedLoss(": Case(lambda d: (d.py() > G.k) * (pub.gce(d, low=0) - (1 - G.k**G.q) / G.q)),
    "the same, with weights of an earlier epoch": Case(
        lambda d: pub.OLD * pub.gce(d, low=0) - pub.OLD * (1 - G.k**G.q) / G.q, arguments={"kept": pub.OLD}
    ),
    "`GeneralizedCrossEntropy(q)`": Case(lambda d: (1 - (d.py() + 1e-9) ** G.q) / G.q, 1e-7, 7.2e-7),
    "`PHuberCrossEntropy(": Case(lambda d: pub.phuber(d, 0)),
    "`PHuberGeneralizedCrossEntropy(": Case(lambda d: pub.phuber(d, G.q)),
    "`Unhinged()`": Case(pub.mae),
    "`TaylorCE(": Case(
        lambda d: sum((1 - d.py().clamp(1e-7, 1 - 1e-7)) ** i / i for i in range(1, G.order + 1)),
        far=1e-7 * G.order,
        arguments={"t": G.order},
    ),
    '`JensenShannonDivergenceWeightedScaled(num_classes, "0.3 0.7")`': Case(
        lambda d: pub.scaled(0.3) * pub.divergence((0.3, 0.7), d), far=1e-6
    ),
    '`JensenShannonDivergenceWeightedScaled(num_classes, "0.4 0.3 0.3")`': Case(
        lambda d: pub.scaled(0.4) * pub.divergence((0.4, 0.3, 0.3), d, pub.OTHER), far=1e-6
    ),
    "`JensenShannonDivergenceWeightedCustom(": Case(lambda d: pub.divergence((0.3, 0.7), d), far=1e-6),
    "`LabelSmoothing(": Case(lambda d: pub.smoothed(d, G.t) - pub.entropy(G.t), constant=-pub.entropy(G.t)),
    # Bi-pub.tempered, focal, poly
    "`bi_tempered_logistic_loss(activations, labels, t1, t2, label": Case(
        lambda d: pub.bi_tempered(d, G.label_smoothing, G.num_iters), 1e-9
    ),
    "`bi_tempered_binary_logistic_loss(": Case(lambda d: pub.bi_tempered(pub.of_two(d)), 1e-9),
    "`bi_tempered_logistic_loss(activations, labels, t1, t2)`": Case(pub.bi_tempered, 1e-9),
    "`bi_tempered_logistic_loss` of mlpanda": Case(pub.bi_tempered, 1e-9),
    "`torchvision.ops.sigmoid_focal_loss(": Case(
        lambda d: pub.sigmoid_focal(d.z[:, 0], d.y % 2), arguments={"alpha": torch.tensor(G.alpha, dtype=torch.float64)}
    ),
    "`kornia.losses.FocalLoss(": Case(
        lambda d: (-((1 - d.p()) ** G.gamma) * d.logs() * d.hot() * pub.SHARES).mean(), arguments={"weight": pub.SHARES}
    ),
    "`FocalLoss(alpha=weight": Case(lambda d: ((1 - d.py()) ** G.gamma * pub.WEIGHT[d.y] * d.ce()).mean()),
    "`Poly1CrossEntropyLoss(": Case(lambda d: d.ce() + G.epsilon * pub.mae(d)),
    "`PolyLoss(": Case(lambda d: d.ce() + G.epsilon * pub.mae(d)),
    # Around a loss, and with a memory
    "`elr_loss(": Case(pub.elr, 1e-9, 1e-4),
    "`LogitNormLoss(": Case(
        lambda d: F.cross_entropy(d.z / (d.z.norm(dim=1, keepdim=True) + 1e-7) / G.t, d.y, reduction="none")
    ),
    "`LogitClipping`": Case(lambda d: pub.clipped_logits(d, G.temp, 1 / G.temp)),
    "`SuperLoss(": Case(pub.super_loss, 1e-6),
    "`loss_coteaching(": Case(lambda d: F.cross_entropy(d.z[pub.CHOSEN], d.y[pub.CHOSEN]) / len(pub.CHOSEN)),
    "`F.cross_entropy(logits, target": Case(lambda d: d.ce().clamp(max=G.c)),
    '`robust("forward"': Case(lambda d: pub.corrected(d, pub.P, forward=True), 1e-12, 2e-6),
    '`robust("backward"': Case(lambda d: pub.corrected(d, pub.P, forward=False), far=math.inf),
    "VolMinNet": Case(pub.volume),
    "`loss_cores` of UCSC-REAL/cores, first": Case(pub.cores, 1e-5, math.inf),
    "`loss_cores`, later": Case(lambda d: pub.cores(d, sieve=True), 1e-5, math.inf),
    "`loss_gls(": Case(lambda d: pub.smoothed(d, G.smooth_rate)),
    # torch, timm, cleanlab, and two papers' code
    "`nn.CrossEntropyLoss(": Case(lambda d: F.cross_entropy(d.z, d.y, pub.WEIGHT, label_smoothing=G.s)),
    "`nn.L1Loss()": Case(lambda d: nn.L1Loss()(d.p(), d.hot())),
    "`nn.MSELoss()": Case(lambda d: nn.MSELoss()(d.p(), d.hot())),
    "`nn.MultiMarginLoss(": Case(lambda d: nn.MultiMarginLoss(2, G.margin)(d.z, d.y), arguments={"power": 2}),
    "`timm.loss.LabelSmoothingCrossEntropy(": Case(lambda d: pub.smoothed(d, G.s)),
    "`timm.loss.SoftTargetCrossEntropy()": Case(lambda d: -(torch.softmax(pub.OTHER, 1) * d.logs()).sum(1)),
    '`cleanlab.rank.get_label_quality_scores(labels, p, method="self_confidence")': Case(Data.py),
    '`cleanlab.rank.get_label_quality_scores(labels, p, method="normalized_margin")': Case(
        lambda d: (d.py() - (d.p() - 2 * d.hot()).amax(1) + 1) / 2
    ),
    '`cleanlab.rank.get_label_quality_scores(labels, p, method="confidence_weighted_entropy")': Case(
        pub.quality, far=math.inf
    ),
    "`HighErrorMarginLoss(": Case(pub.hem, 1e-6),
    "Z-Error BCE": Case(lambda d: pub.z_bce(d.z[:, 0], d.y % 2), 1e-8),
    "Z-Error MSE": Case(lambda d: pub.z_mse(d.z[:, 0], pub.NUMBERS), 1e-8),
}  # fmt: skip


def of_deviation(deviation: float) -> Data:
    z = torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * deviation
    return Data(z.requires_grad_(), torch.arange(N) % C)


CODE = {name: code for name in CASES for cell, code in ROWS.items() if cell.startswith(name)}


def test_every_line_of_the_page_is_tried():
    tried = [[cell for cell in ROWS if cell.startswith(name)] for name in CASES]
    assert [len(cells) for cells in tried] == [1] * len(CASES)
    assert sorted(cell for cells in tried for cell in cells) == sorted(ROWS)


def ours(name: str, d: Data, per_row: bool) -> Tensor:
    """What the code on the page gives."""
    names = vars(G) | {"fl": fl, "torch": torch, "math": math, "C": C, "logits": d.z, "target": d.y, "P": pub.P}
    names |= {"x": d.z[:, 0], "answers": d.y % 2, "numbers": pub.NUMBERS, "weight": pub.WEIGHT, "chosen": pub.CHOSEN}
    names |= {"index": torch.arange(N), "views": [d.z, pub.OTHER], "soft": torch.softmax(pub.OTHER, 1)}
    names |= {"rows": fl.row_statistics(d.z, d.y), "p_y": fl.row_statistics(d.z, d.y).log_prob.exp()}
    names |= {"kept": (fl.CORESLoss(1.0, reduction="none")(d.z, d.y) <= 0).double()}
    names |= {"matrix": fl.TransitionMatrix(C, init=2).double()}
    found = eval(CODE[name], names | CASES[name].arguments)
    if isinstance(found, nn.Module):
        if per_row:
            found.reduction = "none"
        found = found(d.z, d.y)
    return found


def differences(name: str, d: Data) -> tuple[Tensor, Tensor]:
    """Of values, per row where both have them, and of gradients."""
    theirs = CASES[name].theirs(d) - CASES[name].constant
    mine = ours(name, d, per_row=theirs.dim() > 0)
    if theirs.dim() != mine.dim():
        theirs, mine = theirs.mean(), mine.mean()
    value = theirs - mine
    gradient = torch.autograd.grad(value.sum(), d.z)[0] if mine.requires_grad else torch.zeros_like(d.z)
    return value.detach(), gradient


@pytest.mark.parametrize("deviation", [2.0, 20.0], ids=["near", "far"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_published_code(name, deviation):
    case, d = CASES[name], of_deviation(deviation)
    value, gradient = (float(x.abs().max()) for x in differences(name, d))
    size = max(1.0, float(d.z.detach().abs().max()))
    bound = case.near * size if deviation == 2.0 or case.far is None else case.far
    assert value <= bound
    assert gradient <= bound + case.gradient


WHERE = {
    "`GeneralizedCrossEntropy(num_classes, q)`": lambda d: d.py() < 1e-7,
    "`ReverseCrossEntropy(": lambda d: ((d.p() < 1e-7) & (d.hot() == 0)).any(1),
    "`NormalizedGeneralizedCrossEntropy(": lambda d: (d.p() < 1e-7).any(1),
    "`TaylorCE(": lambda d: (d.py() < 1e-7) | (d.py() > 1 - 1e-7),
    '`JensenShannonDivergenceWeightedScaled(num_classes, "0.3 0.7")`': lambda d: (0.7 * d.p() < 1e-7).any(1),
    "`CEandLC(": lambda d: d.z.norm(dim=1) <= 1 / G.delta,
    "`LogitClipping`": lambda d: d.z.norm(dim=1) <= G.temp,
}


@pytest.mark.parametrize("name", WHERE)
def test_rows_differ_where_the_page_says(name):
    d = of_deviation(0.4 if "LogitClip" in name else 0.15 if "LC" in name else 20.0)
    value, gradient = differences(name, d)
    there = WHERE[name](d).detach()
    assert 0 < there.sum() < N
    assert value[~there].abs().max() < 1e-12 and gradient[~there].abs().max() < 1e-12
    assert value[there].abs().max() > 1e-9


def test_gradients_differ_where_the_page_says():
    d = of_deviation(20.0)
    (clamped,) = torch.autograd.grad(pub.gce(d).sum(), d.z)
    assert clamped[d.py() < 1e-7].abs().max() == 0
    through, exact = pub.bi_tempered(d, exact=False), pub.bi_tempered(d)
    (off,) = torch.autograd.grad((through - exact).sum(), d.z)
    assert torch.allclose(through, exact, atol=1e-12) and off.abs().max() > 1e-7
    d = of_deviation(3.0)
    term = pub.log_eps_softmax(d)
    (theirs,), (mine,) = (
        torch.autograd.grad(x.sum(), term, retain_graph=True)
        for x in (pub.focal_terms(term), -((1 - term.exp()) ** G.gamma) * term)
    )
    assert (mine / theirs).min() >= 1 and 1.01 < (mine / theirs).max() <= 1 + G.gamma
