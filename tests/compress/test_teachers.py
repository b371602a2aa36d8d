from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CompressionError
from compress.teachers import Teachers, mean_probabilities


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def test_probabilities_are_averaged_and_not_logits() -> None:
    logits = [torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]])]
    kept = [x.clone() for x in logits]
    # softmax(4, 0, 0) = (e^4, 1, 1) / (e^4 + 2) = (.96466, .01767, .01767)
    mean = mean_probabilities(logits)
    torch.testing.assert_close(mean, torch.tensor([[0.4912, 0.4912, 0.0177]]), atol=5e-5, rtol=0)
    of_mean = torch.stack(logits).mean(0).softmax(1)
    torch.testing.assert_close(of_mean, torch.tensor([[0.4683, 0.4683, 0.0634]]), atol=5e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(logits, kept, strict=True))
    torch.testing.assert_close(mean_probabilities(logits, 4.0)[0, 2], 1 / (torch.tensor(1.0).exp() + 2))


def test_teachers_are_asked_in_eval_mode_and_left_as_they_were() -> None:
    teacher = network()
    teacher[0].eval()  # a part may be frozen
    before = copy.deepcopy(teacher.state_dict())
    flags = [module.training for module in teacher.modules()]
    state = torch.get_rng_state()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    (logits,) = Teachers(teacher).logits(x)
    assert not logits.requires_grad
    assert torch.equal(logits, copy.deepcopy(teacher).eval()(x)), "no dropout, stored statistics"
    assert flags == [module.training for module in teacher.modules()] and any(flags)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_modes_are_restored_after_an_error() -> None:
    teacher = network()
    with pytest.raises(RuntimeError):
        Teachers(teacher).logits(torch.zeros(2, 5))
    assert teacher.training and teacher[1].training


def test_anything_that_can_be_called_teaches() -> None:
    def halved(x: Tensor) -> Tensor:
        return (x[:, :3] / 2).bfloat16()

    first, second = Teachers([halved, nn.Linear(8, 3)]).logits(torch.ones(2, 8, requires_grad=True))
    assert first.dtype == torch.float32 and torch.equal(first, torch.full((2, 3), 0.5))
    assert not first.requires_grad and second.shape == (2, 3)
    assert len(Teachers(nn.Sequential(nn.Linear(8, 3), nn.ReLU()))) == 1, "a single one, though it can be iterated over"
    only = Teachers([halved, nn.Linear(8, 3)]).logits(torch.ones(2, 8), only=0)
    assert len(only) == 1 and torch.equal(only[0], first)


def test_a_teacher_is_in_no_state_dict() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.teachers = nn.Linear(8, 3), Teachers(network())

    assert list(Student().state_dict()) == ["layer.weight", "layer.bias"]


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ([], "no teachers"),
        ("resnet18", "got str"),
        ({"0.weight": torch.zeros(1)}, "got dict"),
        ([nn.Linear], "the class Linear; make a network"),
        ([nn.Linear(2, 2), 3], "teacher 2 is of type int"),
        (7, "teacher 1 is of type int"),
    ],
)
def test_what_is_no_teacher_is_refused(teachers: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        Teachers(teachers)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            nn.Linear(8, 4),
            r"teacher 2 \(Linear\) maps a batch \(2, 8\) to \(2, 4\), but student and data have 3 classes",
        ),
        (nn.Linear(5, 3), "teacher 2 .* does not take a batch of 2 x 8"),
        (lambda x: (x, x), "teacher 2 .* it has to give logits"),
        (lambda x: x.long(), r"gives torch.int64 \(2, 8\)"),
        (lambda x: x[:, :3] / 0, "not finite"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(teacher: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        Teachers([nn.Linear(8, 3), teacher]).check(torch.ones(2, 8), (2, 3))


def test_fingerprints_know_teachers_by_their_numbers() -> None:
    teacher = network()
    one = Teachers([teacher]).fingerprint
    assert one == Teachers([copy.deepcopy(teacher)]).fingerprint
    with torch.no_grad():
        teacher[3].bias[0] += 1e-6
    assert one != Teachers([teacher]).fingerprint
