"""The chunked divergence equals the plain formula, in value and gradient, and keeps nothing beside the logits."""

import pytest
import torch
from torch.nn import functional

from fasp_lightning.errors import FaspError
from fasp_lightning.ops import distillation
from fasp_lightning.ops.distillation import TopK, distillation_loss, top_k
from fasp_lightning.ops.loss import next_token_loss

VOCABULARY = 11


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", 3 * VOCABULARY)


def drawn(seed=0, dtype=torch.float64, batch=2, seq=5):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(batch, seq, VOCABULARY, generator=generator, dtype=dtype) for _ in range(2))
    labels = torch.randint(VOCABULARY, (batch, seq), generator=generator)
    labels[0, 3] = -100
    return student.requires_grad_(), teacher, labels


def plain(student, teacher, labels, temperature=1.0, label_weight=0.0):
    """The equation, position by position; a TopK's outcomes are its tokens and the rest."""
    terms = []
    for b, t in (labels[:, 1:] != -100).nonzero().tolist():
        q = (student[b, t] / temperature).softmax(-1)
        if isinstance(teacher, TopK):
            tokens = teacher.tokens[b, t]
            p = teacher.log_probabilities[b, t].exp()
            p = torch.cat([p, (1 - p.sum()).view(1)])
            q = torch.cat([q[tokens], (1 - q[tokens].sum()).view(1)])
        else:
            p = (teacher[b, t] / temperature).softmax(-1)
        kl = (p * (p / q).log()).sum()
        nll = -student[b, t].log_softmax(-1)[labels[b, t + 1]]
        terms.append((1 - label_weight) * temperature**2 * kl + label_weight * nll)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("label_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [None, 4])
def test_loss_and_gradient_are_those_of_the_formula(temperature, label_weight, k):
    student, teacher, labels = drawn()
    known = teacher if k is None else top_k(teacher, k, temperature)
    expected = plain(student, known, labels, temperature, label_weight)
    (slopes,) = torch.autograd.grad(expected, student)
    loss = distillation_loss(student, known, labels, temperature, label_weight)
    (found,) = torch.autograd.grad(3 * loss, student)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, 3 * slopes)


def test_labels_alone_are_the_next_token_loss():
    student, teacher, labels = drawn(dtype=torch.float32)
    loss = distillation_loss(student, teacher, labels, label_weight=1.0)
    torch.testing.assert_close(loss, next_token_loss(student, labels))


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient():
    student, _, labels = drawn()
    for known in (student.detach(), top_k(student.detach(), 3)):
        loss = distillation_loss(student, known, labels)
        (slopes,) = torch.autograd.grad(loss, student)
        assert abs(loss.item()) < 1e-12
        assert slopes.abs().max() < 1e-12


def test_the_divergence_of_the_likeliest_tokens_grows_to_the_whole_one():
    student, teacher, labels = drawn(seed=1)
    parts = [distillation_loss(student, top_k(teacher, k), labels).item() for k in range(1, VOCABULARY)]
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(distillation_loss(student, teacher, labels).item())
    assert parts[0] < parts[-1]


def test_teachers_that_are_sure_leave_no_nan():
    student, _, labels = drawn(dtype=torch.float32)
    sure = functional.one_hot(torch.zeros_like(labels), VOCABULARY).float() * 1e4
    loss = distillation_loss(student, top_k(sure, 2), labels)
    (slopes,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert slopes.isfinite().all()
    torch.testing.assert_close(loss, distillation_loss(student, sure, labels))


def test_16_bit_logits_are_computed_with_in_fp32():
    student, teacher, labels = drawn(dtype=torch.float32)
    half = student.detach().bfloat16().requires_grad_()
    loss = distillation_loss(half, teacher.bfloat16(), labels)
    exact = distillation_loss(half.detach().double(), teacher.bfloat16().double(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    (slopes,) = torch.autograd.grad(loss, half)
    assert slopes.dtype == torch.bfloat16


def test_logits_in_any_memory_order_get_their_gradient():
    student, teacher, labels = drawn()
    (expected,) = torch.autograd.grad(distillation_loss(student, teacher, labels), student)
    turned = student.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    (found,) = torch.autograd.grad(distillation_loss(turned, teacher, labels), turned)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("batch", "seq"), [(0, 4), (2, 0), (1, 1)])
def test_nothing_to_predict_is_no_loss(batch, seq):
    student, teacher, labels = drawn(batch=max(batch, 1), seq=5)
    student = student.detach()[:batch, :seq].requires_grad_()
    for known in (teacher[:batch, :seq], top_k(teacher[:batch, :seq], 3)):
        loss = distillation_loss(student, known, labels[:batch, :seq])
        (slopes,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0
        assert not slopes.any()


def test_one_buffer_of_the_size_of_the_logits_is_kept_and_becomes_their_gradient():
    student, teacher, labels = drawn()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = distillation_loss(student, teacher, labels)
    (slopes,) = torch.autograd.grad(loss, student)
    assert [tensor.data_ptr() for tensor in kept] == [slopes.data_ptr()]


def test_a_second_backward_pass_is_an_error():
    student, teacher, labels = drawn()
    loss = distillation_loss(student, teacher, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize(
    ("teacher", "labels", "names"),
    [
        (torch.zeros(2, 5, VOCABULARY + 1), torch.zeros(2, 5, dtype=torch.long), "vocabulary"),
        (torch.zeros(2, 4, VOCABULARY), torch.zeros(2, 5, dtype=torch.long), r"\(2, 4\)"),
        (torch.zeros(2, 5, VOCABULARY), torch.zeros(2, 6, dtype=torch.long), r"\(2, 6\)"),
    ],
)
def test_shapes_that_disagree_are_refused(teacher, labels, names):
    with pytest.raises(FaspError, match=names):
        distillation_loss(torch.zeros(2, 5, VOCABULARY), teacher, labels)


@pytest.mark.parametrize("k", [0, VOCABULARY])
def test_top_k_leaves_a_rest(k):
    with pytest.raises(FaspError, match="top_k"):
        top_k(torch.zeros(1, 2, VOCABULARY), k)
