from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import CompressionError
from compress.stages import Stage, as_stages, outputs


def network(width: int = 4) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 10))


def test_outputs_of_any_shape_are_pooled_to_one_length() -> None:
    stage = Stage("0", length=6)
    assert stage.pooled(torch.rand(2, 4, 8, 8)).shape == stage.pooled(torch.rand(2, 3)).shape == (2, 6)
    assert torch.equal(stage.pooled(torch.arange(12.0)[None]), torch.tensor([[0.5, 2.5, 4.5, 6.5, 8.5, 10.5]]))


def test_similarities_are_what_they_say() -> None:
    student, teacher = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])
    losses = {name: float(Stage("0", weight=0.5, similarity=name).loss(student, teacher)) for name in ("l1", "l2")}
    assert losses == {"l1": 0.5 * 2, "l2": 0.5 * 5}
    soft = Stage("0", weight=1).loss(student, teacher)
    torch.testing.assert_close(soft, -student.log_softmax(1).mean())


def test_outputs_are_those_of_the_last_forward_pass_and_hooks_go() -> None:
    model, x = network(), torch.rand(2, 1, 8, 8)
    with outputs(model, ["0", "3", "0"]) as found:
        model(torch.rand(1, 1, 8, 8))
        logits = model(x)
    assert torch.equal(found["3"], logits) and torch.equal(found["0"], model[0](x)) and found["0"].requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_are_those_of_the_layer_though_the_next_one_changes_them() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)), torch.randn(2, 1, 8, 8)
    with outputs(model, ["0"]) as found:
        model(x)
    assert torch.equal(found["0"], model[0](x)) and bool((found["0"] < 0).any())


def test_names_are_those_of_every_teacher_or_one_for_each() -> None:
    teachers = [network(8), network(12)]
    found = as_stages({"0": "0", "1": Stage(("0", "1"), length=5)}, network(), teachers)
    assert found["0"].teacher == ("0", "0") and found["1"].teacher == ("0", "1") and found["1"].length == 5


@pytest.mark.parametrize(
    ("stages", "teacher", "message"),
    [
        (["0"], network(), "stages map layers of the student"),
        ({"0": 3}, network(), "names a layer of the teachers, .* got 3"),
        ({"0": ("0", 1)}, network(), "names a layer of the teachers"),
        ({"7": "0"}, network(), "the student .* has no layer '7'.*Known: 0, 1, 2, 3"),
        ({"0": "9"}, network(), "teacher 1 .* has no layer '9'"),
        ({"0": "0"}, torch.relu, "teacher 1 is no torch.nn.Module"),
        ({"0": Stage(("0", "1"))}, network(), "2 layers of teachers, but there are 1"),
    ],
)
def test_layers_that_are_not_there_are_refused(stages: Any, teacher: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        as_stages(stages, network(), [teacher])


@pytest.mark.parametrize("settings", [{"weight": 0}, {"length": 0}, {"length": 2.5}, {"similarity": "cosine"}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(CompressionError, match=next(iter(settings))):
        Stage("0", **settings)


def test_a_layer_without_a_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    model = nn.Sequential(Pair())
    with outputs(model, ["0"]), pytest.raises(CompressionError, match="'0' gives tuple"):
        model(torch.zeros(1))
    assert not model[0]._forward_hooks
