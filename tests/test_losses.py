"""Losses: the paper's formulas written out with loops, and what its lemma says of the two."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tetdist.config.sections.loss import LossSection
from tetdist.errors import UserError
from tetdist.losses import (
    distillation_loss,
    sdt_loss,
    self_target,
    tet_loss,
    tet_of_means_loss,
)
from tetdist.training.objective import compute_loss


def _cross_entropy(logits, target, smoothing=0.0):
    """Cross-entropy of one sample against its class, a share ``smoothing`` spread over all."""
    log_total = math.log(sum(math.exp(z) for z in logits))
    num_classes = len(logits)
    return -sum(
        ((1 - smoothing) * (k == target) + smoothing / num_classes) * (z - log_total)
        for k, z in enumerate(logits)
    )


def _paper_sdt(logits, target, smoothing=0.0):
    """Equation 7."""
    timesteps, batch, num_classes = logits.shape
    total = 0.0
    for b in range(batch):
        mean = [
            sum(logits[t, b, k].item() for t in range(timesteps)) / timesteps
            for k in range(num_classes)
        ]
        total += _cross_entropy(mean, int(target[b]), smoothing)
    return total / batch


def _paper_tet(logits, target, regularization, phi, smoothing=0.0):
    """Equations 9 to 13: the mean over time of each timestep's loss, and the pull to phi."""
    timesteps, batch, num_classes = logits.shape
    cross_entropy = pull = 0.0
    for t in range(timesteps):
        for b in range(batch):
            row = logits[t, b].tolist()
            cross_entropy += _cross_entropy(row, int(target[b]), smoothing) / (timesteps * batch)
            pull += sum((z - phi) ** 2 for z in row) / (timesteps * batch * num_classes)
    return (1 - regularization) * cross_entropy + regularization * pull


def _random(timesteps, batch, num_classes, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (timesteps, batch, num_classes)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_classes, (batch,), generator=generator)


SHAPES = [(1, 1, 2), (1, 4, 3), (4, 3, 10), (6, 5, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-K{}".format(*s))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@each_shape
def test_sdt_equals_the_papers_formula(shape, smoothing):
    logits, target = _random(*shape)
    loss = sdt_loss(logits, target, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(_paper_sdt(logits, target, smoothing), rel=1e-12)


@pytest.mark.parametrize("loss", [sdt_loss, partial(tet_loss, lambda_=0.001)])
def test_logits_without_timesteps_are_refused(loss):
    with pytest.raises(UserError, match=r"\(4, 3\), not .*per_timestep=True"):
        loss(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("phi", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("regularization", [0.0, 0.001, 0.05, 1.0])
@each_shape
def test_tet_equals_the_papers_formula(shape, regularization, phi, smoothing):
    logits, target = _random(*shape)
    loss = tet_loss(logits, target, lambda_=regularization, phi=phi, label_smoothing=smoothing)
    expected = _paper_tet(logits, target, regularization, phi, smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_pull_is_to_1_by_default():
    logits, target = _random(3, 4, 5)
    assert tet_loss(logits, target, lambda_=0.3) == tet_loss(logits, target, lambda_=0.3, phi=1.0)
    assert tet_loss(torch.ones_like(logits), target, lambda_=1.0) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("regularization", [0.0, 0.05])
@each_shape
def test_tet_of_means_equals_its_formula(shape, regularization, smoothing):
    """The cross-entropy is that of the means so far, and the pull that of the outputs."""
    logits, target = _random(*shape)
    means = torch.stack([sum(logits[: t + 1]) / (t + 1) for t in range(len(logits))])
    cross_entropy = _paper_tet(means, target, 0.0, 0.0, smoothing)
    expected = (1 - regularization) * cross_entropy
    expected += regularization * ((logits - 0.5) ** 2).mean().item()
    options = {"lambda_": regularization, "phi": 0.5, "label_smoothing": smoothing}
    loss = tet_of_means_loss(logits, target, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    probabilities = torch.nn.functional.one_hot(target, shape[2]).double()
    assert tet_of_means_loss(logits, probabilities, **options).item() == pytest.approx(expected)
    if shape[0] == 1:
        assert loss == tet_loss(logits, target, **options)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("sdt", [1 / 4] * 4),
        ("tet", [1 / 4] * 4),
        ("tet_of_means", [25 / 48, 13 / 48, 7 / 48, 1 / 16]),
    ],
)
def test_weights_of_timesteps_that_are_equally_wrong(kind, weights):
    """The gradient by each output, if all outputs are equal, is the mean's times these weights."""
    (output, target) = _random(1, 3, 5)
    logits = output.repeat(4, 1, 1).requires_grad_()
    compute_loss(
        LossSection.model_validate({"kind": kind, "lambda": 0.0}), logits, target
    ).backward()
    assert logits.grad is not None
    total = logits.grad.sum(0)
    for gradient, weight in zip(logits.grad, weights, strict=True):
        assert torch.allclose(gradient, weight * total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_computed_in_float32(dtype, autocast):
    logits, target = _random(4, 8, 10)
    half = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sdt = sdt_loss(half, target)
        tet = tet_loss(half, target, lambda_=0.05)
    assert sdt.dtype == tet.dtype == torch.float32
    # The widened logits are exact; a sum in the half type would be off by 1e-3.
    assert sdt.item() == pytest.approx(_paper_sdt(half.double(), target), rel=1e-6)
    assert tet.item() == pytest.approx(_paper_tet(half.double(), target, 0.05, 1.0), rel=1e-6)


def test_float16_logits_whose_squares_overflow():
    logits = torch.tensor([[[3e4, 0.0]]], dtype=torch.float16, requires_grad=True)
    loss = tet_loss(logits, torch.tensor([0]), lambda_=1.0, phi=0.0)
    assert loss.item() == pytest.approx(9e8 / 2, rel=1e-3)


# --- distillation -------------------------------------------------------------------------------


def _softened(logits, temperature):
    total = sum(math.exp(z / temperature) for z in logits)
    return [math.exp(z / temperature) / total for z in logits]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@each_shape
def test_distillation_equals_its_formula(shape, temperature):
    (logits, _), (teacher, _) = _random(*shape), _random(1, *shape[1:], seed=1)
    expected = 0.0
    for t in range(shape[0]):
        for b in range(shape[1]):
            theirs = _softened(teacher[0, b].tolist(), temperature)
            ours = _softened(logits[t, b].tolist(), temperature)
            expected += sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True))
    expected *= temperature**2 / (shape[0] * shape[1])
    loss = distillation_loss(logits, teacher[0], temperature=temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_teacher_learns_nothing():
    (logits, _), (teacher, _) = _random(3, 4, 5), _random(1, 4, 5, seed=1)
    logits.requires_grad_()
    teacher.requires_grad_()
    distillation_loss(logits, teacher[0], temperature=2.0).backward()
    assert logits.grad is not None
    assert teacher.grad is None


def test_self_distillation_learns_from_the_time_mean_alone():
    logits, _ = _random(3, 4, 5)
    logits.requires_grad_()
    labels = torch.zeros(4, dtype=torch.int64)

    def of_time_mean(logits):
        target = self_target("time_mean", logits, labels)
        return distillation_loss(logits, target, temperature=1.5)

    of_time_mean(logits).backward()
    ours, own = logits.grad.clone(), logits.detach().clone().requires_grad_()
    distillation_loss(own, own.detach().mean(0), temperature=1.5).backward()
    assert own.grad is not None
    # To the bit: of a mean over all timesteps such a gradient would be rounding alone.
    assert torch.equal(ours, own.grad)
    constant = logits.detach()[:1].expand(3, 4, 5)
    assert of_time_mean(constant).item() == pytest.approx(0, abs=1e-14)


# --- published objectives: value and gradient, one timestep of one sample after another -----------

LABELS = [1, 0, 3, 2, 4]


def _cases(timesteps=4, num_classes=5):
    """Logits, a teacher's and labels of samples that are right always, never, in the first half of
    the timesteps, and as it happens."""
    (logits, _), (teacher, _) = _random(timesteps, 5, num_classes), _random(1, 5, num_classes, 1)
    logits[:, 0, LABELS[0]] += 20
    logits[:, 1, LABELS[1]] -= 20
    logits[: timesteps // 2, 2, LABELS[2]] += 20
    logits[timesteps // 2 :, 2, LABELS[2]] -= 20
    return logits, teacher[0], torch.tensor(LABELS)


def _divergence(teacher, student, temperature):
    """``temperature^2 * KL`` of one answer."""
    p, s = ((logits / temperature).softmax(0) for logits in (teacher, student))
    return temperature**2 * (p * (p / s).log()).sum()


def _similarity_mean(rows, i):
    shares = rows.softmax(1)
    confidence = 1 + (shares * (shares + 1e-8).log()).sum(1) / math.log(rows.shape[1])
    others = (confidence * F.cosine_similarity(rows, rows[i : i + 1])).exp()
    others[i] = 0
    return others @ rows / others.sum()


def _published(name, logits, teacher, labels, temperature):
    """Loss of full-range distillation, with weights of 0.2 (teacher) and 0.5, or of SeAl, with 0.6
    and 0.15. Nothing learns through the targets."""
    timesteps, batch, _ = logits.shape
    of_teacher, of_itself = {"full-range": (0.2, 0.5), "SeAl": (0.6, 0.15)}[name]
    total = logits.new_zeros(())
    for i, b in itertools.product(range(timesteps), range(batch)):
        rows, z, q, y = logits.detach()[:, b], logits[i, b], teacher[b].clone(), labels[b]
        aligned, correct = z.clone(), rows[rows.argmax(1) == y]
        target = correct.mean(0) if len(correct) else torch.zeros_like(z)
        if name == "SeAl":
            target = _similarity_mean(rows, i) if timesteps > 1 else rows[i]
            w = int(z.argmax())
            aligned[w] = z[y]
            q[w] = q[y] = min(q[w], q[y])
        total = total + F.cross_entropy(z, y)
        total = total + of_teacher * _divergence(q, aligned, temperature)
        total = total + of_itself * _divergence(target, z, temperature)
    return total / (timesteps * batch)


def _objective(name, temperature):
    keys = {
        "full-range": {"weight": 0.2, "self_weight": 0.5, "self_target": "correct_mean"},
        "SeAl": {
            "weight": 0.6,
            "teacher_alignment": "error_aware",
            "self_weight": 0.15,
            "self_target": "similarity",
        },
    }[name]
    distillation = {"teacher": "timm:resnet34", "temperature": temperature} | keys
    return LossSection.model_validate({"lambda": 0.0, "distillation": distillation})


each_objective = pytest.mark.parametrize("name", ["full-range", "SeAl"])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("timesteps", [1, 4])
@each_objective
def test_published_objectives(name, timesteps, temperature):
    logits, teacher, labels = _cases(timesteps)
    logits.requires_grad_()
    loss = compute_loss(_objective(name, temperature), logits, labels, teacher)
    loss.backward()
    own = logits.detach().clone().requires_grad_()
    expected = _published(name, own, teacher, labels, temperature)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(logits.grad, own.grad, rtol=1e-9, atol=1e-14)


@each_objective
def test_published_objectives_of_half_precision_logits(name):
    logits, teacher, labels = _cases()
    half, taught, section = logits.bfloat16(), teacher.bfloat16(), _objective(name, 3.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute_loss(section, half, labels, taught)
    assert loss.dtype is torch.float32
    wide = compute_loss(section, half.double(), labels, taught.double())
    assert loss.item() == pytest.approx(wide.item(), rel=1e-6)
