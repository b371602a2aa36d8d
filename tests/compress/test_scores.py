"""Scores of weights against their formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compress.errors import CompressionError
from compress.pruning import masks, prune
from compress.scores import Scores, grasp, magnitude, snip, synflow
from search_spaces.masks import top_k_mask

NAMES = ["0", "2"]


def mlp(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, classes)).double()


def batch(classes: int = 3, examples: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.rand(examples, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return x, torch.arange(examples) * classes // examples  # sorted by class


def convnet(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4, bias=False))


def test_magnitude_is_the_absolute_weight() -> None:
    net = mlp()
    scores = magnitude(net, NAMES)
    assert list(scores) == NAMES and torch.equal(scores["2"], net[2].weight.abs())


def test_snip_is_the_gradient_of_masks() -> None:
    net, (x, y) = mlp(), batch()
    units = {name: torch.ones_like(net.get_parameter(f"{name}.weight"), requires_grad=True) for name in NAMES}
    masked = {f"{name}.weight": net.get_parameter(f"{name}.weight") * unit for name, unit in units.items()}
    expected = torch.autograd.grad(F.cross_entropy(functional_call(net, masked, (x,)), y), list(units.values()))
    for own, other in zip(snip(net, NAMES, (x, y)).values(), expected, strict=True):
        torch.testing.assert_close(own, other.abs())


def test_grasp_is_the_product_of_weight_hessian_and_gradient() -> None:
    net, (x, y) = mlp(), batch()
    flat = torch.cat([net.get_parameter(f"{name}.weight").detach().flatten() for name in NAMES])

    def loss(vector: Tensor) -> Tensor:
        parts = dict(zip(("0.weight", "2.weight"), vector.split([30, 18]), strict=True))
        values = {name: part.view_as(net.get_parameter(name)) for name, part in parts.items()}
        logits = functional_call(net, values, (x,)) / 200
        return F.cross_entropy(logits[::2], y[::2]) + F.cross_entropy(logits[1::2], y[1::2])

    gradient = torch.func.grad(loss)(flat)
    expected = flat * (torch.func.hessian(loss)(flat) @ gradient)
    scores = grasp(net, NAMES, (x, y))
    torch.testing.assert_close(torch.cat([own.flatten() for own in scores.values()]), expected)


@pytest.mark.parametrize("classes", [2, 7])
def test_both_halves_of_grasp_have_all_classes(classes: int) -> None:
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(sorted(targets.tolist()))
        return F.cross_entropy(outputs, targets)

    grasp(mlp(classes), NAMES, batch(classes, 4 * classes), loss)
    assert seen == [sorted(2 * list(range(classes)))] * 4


def test_targets_need_be_no_classes() -> None:
    x, _ = batch()
    for scorer in (snip, grasp):
        scores = scorer(mlp(), NAMES, (x, x[:, :3]), F.mse_loss)
        assert all(bool(own.any()) for own in scores.values())


@pytest.mark.parametrize("scorer", [snip, grasp])
def test_scores_are_those_of_training_mode_and_dropout_has_a_seed(scorer: Any) -> None:
    net = nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 3)).double().eval()
    state = torch.get_rng_state()
    found = [scorer(net, NAMES, batch(), seed=seed)["2"] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state) and not net.training


def test_layers_that_take_no_part_have_score_zero() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Any:
            return self.used(x)

    for scores in (snip(Net(), ["used", "unused"], batch()), grasp(Net(), ["used", "unused"], batch())):
        assert scores["used"].any() and not scores["unused"].any()


def once(values: Scores, part: float) -> Scores:
    return {name: top_k_mask(own, 2) for name, own in values.items()}


def test_synflow_scores_paths() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 0.5]]))
        net[2].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 0.5]]))
    seen: list[Scores] = []

    def spy(values: Scores, part: float) -> Scores:
        seen.append(values)
        return once(values, part)

    found = synflow(net, ["0", "2"], (torch.rand(1, 3), None), spy, rounds=1)
    # |w| times what flows in from the inputs times what flows out to the outputs.
    expected = {"0": [[3.0, 6.0, 9.0], [6.0, 7.5, 0.75]], "2": [[6.0, 9.5], [12.0, 4.75]]}
    for name, own in expected.items():
        torch.testing.assert_close(seen[0][name] / seen[0]["0"][0, 0] * 3, torch.tensor(own, dtype=torch.double))
    assert found["2"].tolist() == [[False, True], [True, False]]


def test_a_tiny_input_ranks_as_ones_do() -> None:
    net = convnet().eval()
    twin = copy.deepcopy(net).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
    twin(torch.ones(1, 3, 8, 8, dtype=torch.double)).sum().backward()
    names = ["0", "3", "6", "11"]
    seen: list[Scores] = []

    def spy(values: Scores, part: float) -> Scores:
        seen.append(values)
        return {name: torch.ones_like(own, dtype=torch.bool) for name, own in values.items()}

    synflow(net, names, (torch.rand(2, 3, 8, 8), None), spy, rounds=1)
    for name in names:
        weight = twin.get_parameter(f"{name}.weight")
        assert weight.grad is not None
        torch.testing.assert_close(seen[0][name] / 1e-100, (weight * weight.grad).detach())


def test_saturating_activations_do_not_stop_the_flow() -> None:
    net = convnet(nn.ReLU6)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(100)  # so that ones would reach 6 in each layer
    assert sum(int(mask.sum()) for mask in masks(prune(net, 0.1, method="synflow", batch=images())).values()) == 201


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 4


def test_synflow_leaves_a_path_at_one_percent() -> None:
    net = convnet()
    sparse = prune(net, 0.01, method="synflow", batch=images())
    assert sum(int(mask.sum()) for mask in masks(sparse).values()) == 20
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.abs_()
    assert sparse.eval()(torch.ones(1, 3, 8, 8)).abs().sum() > 0


def test_synflow_prunes_in_a_hundred_exponential_steps() -> None:
    parts: list[float] = []
    kept: list[int] = []

    def choose(values: Scores, part: float) -> Scores:
        parts.append(part)
        kept.append(int((values["3"] >= 0).sum()))
        return {name: top_k_mask(own, max(1, round(own.numel() * 0.01**part))) for name, own in values.items()}

    synflow(convnet(), ["3"], images(), choose)
    assert len(parts) == 100 and parts[0] == 0.01 and parts[-1] == 1
    assert kept == sorted(kept, reverse=True), "what has gone does not come back"
    assert kept[50] == round(576 * 0.01**0.5)


def test_synflow_leaves_the_model_alone() -> None:
    net = convnet()
    net(images()[0])  # so that there are statistics
    before = copy.deepcopy(net.state_dict())
    prune(net, 0.1, method="synflow", batch=images())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and net[0].weight.dtype == torch.float32


def test_what_cannot_be_scored_is_refused() -> None:
    net = mlp()
    for name, scorer in {"snip": snip, "grasp": grasp}.items():
        with pytest.raises(CompressionError, match=f"'{name}' needs data to score the weights: give batch=\\(x, y\\)"):
            scorer(net, NAMES, None)
        for wrong in (batch()[0], (batch()[0],), "xy"):
            with pytest.raises(
                CompressionError, match=r"batch is \(x, y\), tensors of inputs and of their targets, got"
            ):
                scorer(net, NAMES, wrong)  # type: ignore[arg-type]
        for x, y in ((batch()[0], [0, 1]), (torch.tensor(1.0), torch.tensor(1)), ({"x": 1}, batch()[1])):
            with pytest.raises(CompressionError, match=rf"targets, got \({type(x).__name__}, {type(y).__name__}\)"):
                scorer(net, NAMES, (x, y))
        with pytest.raises(CompressionError, match=f"'{name}' gives weights of '0' scores that are not finite"):
            scorer(net, NAMES, (batch()[0] * torch.nan, batch()[1]))
    with pytest.raises(CompressionError, match="'synflow' needs batch=.x, None. for the shape of x alone"):
        synflow(net, NAMES, None, once)
    with pytest.raises(CompressionError, match="GraSP halves the batch, which has 1 example"):
        grasp(net, NAMES, batch(1, 1))
    with pytest.raises(CompressionError, match="in place of x, which holds torch.int64; take another method"):
        synflow(net, NAMES, (torch.zeros(2, 5, dtype=torch.int64), None), once)
    with torch.no_grad():
        net[2].weight.zero_()
    with pytest.raises(CompressionError, match="'synflow' gives all weights the score 0, as where one layer"):
        synflow(net, NAMES, batch(), once)
    with pytest.raises(CompressionError, match="'snip' gives all weights the score 0"):
        snip(net, NAMES, batch())  # which all have a factor of zero
    assert grasp(net, NAMES, batch())["0"].any()
    with torch.no_grad():
        net[2].weight.fill_(torch.nan)
    with pytest.raises(CompressionError, match="'magnitude' gives weights of '2' scores that are not finite"):
        magnitude(net, NAMES)


def test_a_batch_that_does_not_fit_is_refused_with_its_shapes() -> None:
    net, (x, y) = convnet(), images()
    names = ["0", "3", "6", "11"]
    for scorer in (snip, grasp):
        with pytest.raises(
            CompressionError, match=r"a batch of x of shape \(\d, 1, 8, 8\), torch.float32 and y .*channels"
        ):
            scorer(net, names, (x[:, :1], y))
        with pytest.raises(CompressionError, match=r"y of shape \(\d,\), torch.int64: Target \d is out of bounds"):
            scorer(net, names, (x, y + 2))
    with pytest.raises(
        CompressionError, match=r"x of shape \(8, .* and y of shape \(6,\), torch.int64: Expected input"
    ):
        snip(net, names, (x, y[:6]))
    with pytest.raises(
        CompressionError, match=r"x and y must be of one length, got x of shape \(8, .* y of shape \(6,\)"
    ):
        grasp(net, names, (x, y[:6]))
    with pytest.raises(CompressionError, match=r"an input as x of shape \(8, 1, 8, 8\), torch.float32 .*channels"):
        synflow(net, names, (x[:, :1], None), once)


def test_grasp_names_other_methods_where_there_is_no_second_derivative() -> None:
    with pytest.raises(CompressionError, match="hardsigmoid_backward is not implemented.* Take 'snip', 'synflow' or"):
        grasp(convnet(nn.Hardsigmoid), ["0", "3"], images())


def test_synflow_shows_progress_only_if_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def bar(rounds: range, **settings: Any) -> range:
        seen.append(settings)
        return rounds

    monkeypatch.setattr("compress.scores.tqdm", bar)
    synflow(mlp(), NAMES, batch(), once, rounds=2)
    assert [(own["delay"], own["leave"]) for own in seen] == [(1, False)]
