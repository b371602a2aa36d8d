from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from compress.dynamic import DynamicSparsity, _largest
from compress.errors import CompressionError
from compress.weights import weights
from search_spaces.masks import attach, detach, top_k_mask


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)
    )


def masked(density: float = 0.25, model: nn.Module | None = None) -> nn.Module:
    model = model or net()
    generator = torch.Generator().manual_seed(1)
    for weight in weights(model).values():
        scores = torch.rand(weight.shape, generator=generator)
        attach(weight.module, weight.attribute, top_k_mask(scores, max(1, round(density * weight.size))))
    return model


def momentum(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    return x, torch.randint(4, (size,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, size: int = 8) -> None:
    """A loop that knows nothing of masks; step 1 is the first."""
    for step in steps:
        x, y = batch(step, size)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def masks(model: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.mask for name, weight in weights(model).items()}
    return {name: mask.clone() for name, mask in found.items() if mask is not None}


def counts(model: nn.Module) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks(model).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def unhooked(model: nn.Module) -> bool:
    layers = [module for module in model.modules() if module._forward_hooks]
    return not layers and not any(p._post_accumulate_grad_hooks for p in model.parameters())


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "nesterov": momentum,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True),
}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_masks_move_and_what_they_hide_stays_zero(method: str, optimizer_name: str) -> None:
    model = masked()
    optimizer = OPTIMIZERS[optimizer_name](model)
    sparsity = DynamicSparsity(model, optimizer, method, steps=40, interval=5, end=0.75)
    start, before = counts(model), masks(model)
    changes = []
    for step in range(1, 41):
        train(model, optimizer, range(step, step + 1))
        now = masks(model)
        assert counts(model) == start
        if not same(before, now):
            changes.append(step)
        for name, weight in weights(model).items():
            states = [weight.parameter, *(s for s in optimizer.state[weight.parameter].values() if s.ndim)]
            assert len(states) == {"nesterov": 2, "adamw": 4}[optimizer_name]
            assert all(not state[~now[name]].any() for state in states), "masked"
            assert all(not state[now[name] & ~before[name]].any() for state in states), "just grown"
        before = now
    assert changes == [5, 10, 15, 20, 25], "none at the end, 30, or after it"
    assert sparsity.updates == 5 and sparsity.step == 40
    total, kept = sum(weight.size for weight in weights(model).values()), sum(start.values())
    assert sparsity.density == kept / total
    assert str(sparsity) == f"{method} after step 40 of 40: 5 updates, {kept} of {total:,} weights kept (density 0.25)"


def test_stored_entries_that_the_optimizer_moved_grow_from_zero() -> None:
    model = masked()
    optimizer = momentum(model)
    train(model, optimizer, range(1, 2))
    with torch.no_grad():  # as Muon does
        for name, mask in masks(model).items():
            parameter = weights(model)[name].parameter
            parameter[~mask] = 1.0
            optimizer.state[parameter]["momentum_buffer"][~mask] = 1.0
    DynamicSparsity(model, optimizer, "set", steps=10, interval=1)
    before = masks(model)
    train(model, optimizer, range(2, 3))
    for name, mask in masks(model).items():
        parameter = weights(model)[name].parameter
        grown = mask & ~before[name]
        assert grown.any() and not parameter[grown].any() and not parameter[~mask].any()
        assert not optimizer.state[parameter]["momentum_buffer"][grown].any()


def test_channels_last_changes_nothing() -> None:
    one, other = masked(), masked().to(memory_format=torch.channels_last)
    for model in (one, other):
        optimizer = momentum(model)
        DynamicSparsity(model, optimizer, "rigl", steps=20, interval=2)
        train(model, optimizer, range(1, 7))
    assert other[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert same(masks(one), masks(other)) and not same(masks(one), masks(masked()))


def hand_made() -> tuple[nn.Linear, torch.optim.SGD]:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.1, 9.0, 9.0], [2.0, 9.0, 0.9, 9.0]]))
    attach(layer, "weight", torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool())
    return layer, torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)


def test_rigl_grows_where_the_dense_gradient_is_largest() -> None:
    # Dropped: half the four weights, 0.5 and -0.1, the smallest in size. Of the other four entries and these two, the
    # largest gradients are those of [0, 3] and [1, 1]; the masked one at [0, 0], 2.5, comes next.
    layer, optimizer = hand_made()
    DynamicSparsity(layer, optimizer, "rigl", steps=1000, interval=1, fraction=0.51)
    gradient = torch.tensor([[2.5, 1.0, -2.0, -4.0], [7.0, 3.0, 8.0, 0.5]])
    kept = layer.weight.detach().clone()
    (layer.weight * gradient).sum().backward()  # whose gradient at the effective weight is just that
    optimizer.step()
    mask = layer.parametrizations.weight[0].mask
    assert mask.tolist() == [[False, False, False, True], [True, True, True, False]]
    moved = (kept - 1e-3 * gradient) * torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0]])
    torch.testing.assert_close(layer.weight.detach(), moved)


def test_what_is_dropped_and_grown_again_stays_as_it_was() -> None:
    layer, optimizer = hand_made()
    DynamicSparsity(layer, optimizer, "rigl", steps=1000, interval=1, fraction=0.51)
    gradient = torch.tensor([[9.0, 8.0, -2.0, -4.0], [7.0, 3.0, 8.0, 0.5]])
    before = layer.weight.detach().clone()
    (layer.weight * gradient).sum().backward()
    optimizer.step()
    mask = layer.parametrizations.weight[0].mask
    assert mask.tolist() == [[True, True, False, False], [True, False, True, False]]
    torch.testing.assert_close(layer.weight.detach(), before - 1e-3 * gradient * mask)
    assert torch.equal(optimizer.state[layer.parametrizations.weight.original]["momentum_buffer"], gradient * mask)


def dense_gradient(model: nn.Module, steps: range, size: int = 8) -> dict[str, Tensor]:
    """Those of a plain network that has the effective weights."""
    twin = net()
    with torch.no_grad():
        for name, weight in weights(twin).items():
            weight.parameter.copy_(weights(model)[name].module.weight)
            weight.module.bias.copy_(weights(model)[name].module.bias)
    for step in steps:
        x, y = batch(step, size)
        F.cross_entropy(twin(x), y).backward()
    return {name: weight.parameter.grad for name, weight in weights(twin).items()}


def test_dense_gradients_of_all_backward_passes_before_a_change_count_and_no_others() -> None:
    model = masked()
    optimizer = momentum(model)
    sparsity = DynamicSparsity(model, optimizer, "rigl", steps=100, interval=2)
    assert sparsity._gradients is not None
    train(model, optimizer, range(1, 2))
    expected = dense_gradient(model, range(2, 5))
    optimizer.zero_grad()
    for step in range(2, 5):
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
    seen = sparsity._gradients.take()
    for gradient, (name, wanted) in zip(seen, expected.items(), strict=True):
        torch.testing.assert_close(gradient, wanted, msg=name)


def test_nothing_is_hooked_to_the_model_but_in_the_step_before_a_change() -> None:
    model = masked()
    optimizer = momentum(model)
    sparsity = DynamicSparsity(model, optimizer, "rigl", steps=100, interval=3, end=0.1)
    free = []
    for step in range(1, 15):
        free.append(unhooked(model))
        train(model, optimizer, range(step, step + 1))
    assert [step for step, quiet in enumerate(free, 1) if not quiet] == [3, 6, 9]
    assert sparsity.updates == 3


def test_gradients_of_a_kept_graph_and_of_a_copied_model_do_not_count() -> None:
    model = masked()
    optimizer = momentum(model)
    sparsity = DynamicSparsity(model, optimizer, "rigl", steps=100, interval=1)
    assert sparsity._gradients is not None
    copied = copy.deepcopy(model)
    x, y = batch(1)
    F.cross_entropy(copied(x), y).backward()
    assert sparsity._gradients.take() == [None, None, None]
    sparsity._gradients.open()
    loss = F.cross_entropy(model(x), y)
    sparsity.remove()
    loss.backward()
    sparsity._gradients.open()
    assert sparsity._gradients.take() == [None, None, None]


def test_microbatches_grow_the_same_as_their_batch() -> None:
    one, many = masked(), masked()
    optimizers = momentum(one), momentum(many)
    kept = [DynamicSparsity(m, o, "rigl", steps=20, interval=2) for m, o in zip((one, many), optimizers, strict=True)]
    start = masks(one)
    for step in range(1, 7):
        x, y = batch(step, 16)
        for model, optimizer, parts in zip((one, many), optimizers, (1, 4), strict=True):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for part, label in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(part), label) / parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    assert kept[0].updates == 3 and not same(start, masks(one))
    assert same(masks(one), masks(many))


class Twice(nn.Module):
    """One layer used twice, and checkpointed if asked."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if self.reentrant is None:
                x = self.layer(x).tanh()
            else:
                x = checkpoint(lambda h: self.layer(h).tanh(), x, use_reentrant=self.reentrant)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("cleared", [True, False])
def test_a_layer_used_twice_has_the_sum_of_both_gradients(reentrant: bool | None, cleared: bool) -> None:
    model = masked(0.5, Twice(reentrant))
    optimizer = momentum(model)
    sparsity = DynamicSparsity(model, optimizer, "rigl", steps=10, interval=1)
    assert sparsity._gradients is not None
    x = torch.randn(16, 8, requires_grad=True)
    twin = Twice()
    for layer, own in ((twin.layer, model.layer), (twin.head, model.head)):
        layer.weight.data, layer.bias.data = own.weight.detach(), own.bias.detach()
    if not cleared:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    model(x).square().mean().backward()
    twin(x).square().mean().backward()
    for seen, layer in zip(sparsity._gradients.take(), (twin.layer, twin.head), strict=True):
        torch.testing.assert_close(seen, layer.weight.grad)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_the_scaler_skips_is_no_step_and_its_gradients_are_forgotten(set_to_none: bool) -> None:
    model, plain = masked(), masked()
    optimizer, other = momentum(model), momentum(plain)
    sparsity = DynamicSparsity(model, optimizer, "rigl", steps=10, interval=2)
    DynamicSparsity(plain, other, "rigl", steps=10, interval=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step, broken in [(1, False), (2, True), (2, False), (3, True), (3, False), (4, False)]:
        x, y = batch(step)
        optimizer.zero_grad(set_to_none)
        loss = F.cross_entropy(model(x * float("inf") if broken else x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert sparsity.step == (step - 1 if broken else step)
    train(plain, other, range(1, 5))
    assert sparsity.updates == 2
    assert same(masks(model), masks(plain))


def test_a_fused_optimizer_skips_by_itself() -> None:
    model = masked()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    sparsity = DynamicSparsity(model, optimizer, "rigl", steps=10, interval=1)
    start = masks(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for broken in (True, False):
        x, y = batch(1)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x * float("inf") if broken else x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert sparsity.step == (not broken) and same(start, masks(model)) == broken


def test_infinite_gradients_do_not_grow() -> None:
    layer, optimizer = hand_made()
    DynamicSparsity(layer, optimizer, "rigl", steps=1000, interval=1, fraction=0.51)
    inf, nan = float("inf"), float("nan")
    layer.weight.backward(torch.tensor([[0.1, 0.1, nan, 4.0], [7.0, inf, 8.0, 0.5]]))
    layer.parametrizations.weight.original.grad.nan_to_num_(0, 0, 0)
    optimizer.step()
    assert layer.parametrizations.weight[0].mask.tolist() == [[False, False, False, True], [True, False, True, True]]


@pytest.mark.parametrize("method", ["rigl", "set", "gradual"])
@pytest.mark.parametrize(("stop", "loaded_first"), [(4, False), (7, True)])
def test_a_resumed_training_makes_the_same_masks(method: str, stop: int, loaded_first: bool) -> None:
    def parts(seed: int, state: dict[str, Any] | None = None) -> tuple[Any, ...]:
        model = masked(1.0 if method == "gradual" else 0.25)
        if state is not None:
            model.load_state_dict(state)
        optimizer = momentum(model)
        density = 0.1 if method == "gradual" else None
        return (
            model,
            optimizer,
            DynamicSparsity(model, optimizer, method, steps=20, interval=2, density=density, seed=seed),
        )

    model, optimizer, sparsity = parts(3)
    train(model, optimizer, range(1, stop + 1))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, sparsity)], file)
    train(model, optimizer, range(stop + 1, 21))
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again, optimizer_again, resumed = parts(3, states[0] if loaded_first else None)
    resumed.load_state_dict(states[2])
    again.load_state_dict(states[0])
    optimizer_again.load_state_dict(states[1])
    train(again, optimizer_again, range(stop + 1, 21))
    assert str(resumed) == str(sparsity) and resumed.updates == 7
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())
    with pytest.raises(CompressionError, match="the state was saved with another seed: 3, here it is 4"):
        parts(4)[2].load_state_dict(states[2])


def test_set_depends_on_its_seed_alone() -> None:
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = masked()
        optimizer = momentum(model)
        DynamicSparsity(model, optimizer, "set", steps=8, interval=2, seed=seed)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        train(model, optimizer, range(1, 5))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(masks(model))
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_set_draws_for_each_layer_anew() -> None:
    layer = nn.Linear(8, 8)
    attach(layer, "weight", torch.eye(8, dtype=torch.bool))
    model = nn.Sequential(layer, copy.deepcopy(layer))
    optimizer = momentum(model)
    DynamicSparsity(model, optimizer, "set", steps=10, interval=1, fraction=1.0)
    optimizer.step()
    assert not torch.equal(*masks(model).values())


def test_gradual_pruning_follows_its_schedule_over_all_layers() -> None:
    model = masked(1.0)
    optimizer = momentum(model)
    sparsity = DynamicSparsity(model, optimizer, "gradual", steps=40, interval=5, begin=0.125, end=0.8, density=0.1)
    total = sum(weight.size for weight in weights(model).values())
    final = round(0.1 * total)
    before = masks(model)
    for step in range(1, 41):
        train(model, optimizer, range(step, step + 1))
        changes = min(5, max(0, (step - 5) // 5))
        assert sum(counts(model).values()) == final + round((total - final) * (1 - changes / 5) ** 3)
        now = masks(model)
        assert all(not (now[name] & ~before[name]).any() for name in now), "nothing grows"
        if step == 10:
            sizes = {name: weight.parameter.detach().abs() for name, weight in weights(model).items()}
            assert all(not sizes[name][~now[name]].any() for name in now)
        before = now
    assert sparsity.updates == 5
    shares = {name: count / weights(model)[name].size for name, count in counts(model).items()}
    assert max(shares.values()) > 1.2 * min(shares.values()), "the smallest go wherever they are"


@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_are_found(ties: bool) -> None:
    values = torch.randn(20_000)
    values = values.round(decimals=1) if ties else values
    for count in (1, 17, 1000, 19_999, 20_000):
        for order in (values, values.sort().values, values.sort(descending=True).values):
            found = order[_largest(order, count)]
            assert torch.equal(found.sort().values, values.sort().values[-count:])


def test_gradual_pruning_drops_the_smallest_and_leaves_each_layer_a_weight() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[5.0, -6.0, 1.0], [-0.5, 7.0, -8.0]]))
        model[1].weight.copy_(torch.tensor([[0.1, -0.3], [0.2, 0.0]]))
    masked(1.0, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    DynamicSparsity(model, optimizer, "gradual", steps=1, interval=1, end=1.0, density=0.4)
    optimizer.step()
    assert model[0].weight.tolist() == [[0.0, -6.0, 0.0], [0.0, 7.0, -8.0]]
    assert model[1].weight.flatten().tolist() == pytest.approx([0.0, -0.3, 0.0, 0.0])


def test_gradual_pruning_by_layer() -> None:
    model = masked(1.0)
    optimizer = momentum(model)
    DynamicSparsity(model, optimizer, "gradual", steps=10, interval=2, density={"0": 0.5, "2": 0.1, "5": 1.0})
    train(model, optimizer, range(1, 11))
    assert counts(model) == {"0": 108, "2": 58, "5": 288}


def test_dense_layers_among_sparse_ones_are_left_alone() -> None:
    model, plain = masked(), masked()
    for one in (model, plain):
        detach(one[5], "weight")
        attach(one[5], "weight", torch.ones(4, 72, dtype=torch.bool))
    optimizer = momentum(model)
    DynamicSparsity(model, optimizer, "rigl", steps=10, interval=1)
    train(model, optimizer, range(1, 2))
    train(plain, momentum(plain), range(1, 2))
    assert not same(masks(model), masks(plain))
    assert torch.equal(model[5].weight, plain[5].weight)


def test_a_layer_without_gradient_keeps_its_mask() -> None:
    model = masked()
    optimizer = momentum(model)
    sparsity = DynamicSparsity(model, optimizer, "rigl", steps=10, interval=1)
    start = masks(model)
    optimizer.zero_grad()
    model[:4](batch(1)[0]).sum().backward()
    optimizer.step()
    now = masks(model)
    assert torch.equal(now["5"], start["5"]) and not torch.equal(now["2"], start["2"])
    optimizer.zero_grad()
    optimizer.step()
    assert same(masks(model), now) and sparsity.step == 2


def test_an_average_of_the_weights_follows_the_masks() -> None:
    model = masked()
    optimizer = momentum(model)
    average = AveragedModel(model)
    DynamicSparsity(model, optimizer, "rigl", steps=10, interval=2)
    for step in range(1, 6):
        train(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
    assert same(masks(average.module), masks(model))
    assert all(not weight.module.weight[~weight.mask].any() for weight in weights(average.module).values())


def test_closures_and_parameter_groups() -> None:
    model = masked()
    kernels = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD([{"params": biases, "lr": 0.1}, {"params": kernels}], lr=0.05)
    sparsity = DynamicSparsity(model, optimizer, "rigl", steps=10, interval=1)
    other = masked()
    train(other, torch.optim.SGD(other.parameters(), lr=0.05), range(1, 2))
    start = masks(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = batch(1)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert sparsity.updates == 1 and not same(start, masks(model)) and counts(model) == counts(other)


def test_removed_it_does_nothing_more() -> None:
    model = masked()
    optimizer = momentum(model)
    sparsity = DynamicSparsity(model, optimizer, "rigl", steps=10, interval=1)
    train(model, optimizer, range(1, 3))
    sparsity.remove()
    now = masks(model)
    train(model, optimizer, range(3, 5))
    assert same(masks(model), now) and sparsity.step == 2 and unhooked(model)


def test_a_training_that_ends_early_leaves_nothing_behind() -> None:
    model = masked()
    optimizer = momentum(model)
    DynamicSparsity(model, optimizer, "rigl", steps=10, interval=2)
    train(model, optimizer, range(1, 2))
    assert not unhooked(model)
    del optimizer
    gc.collect()
    assert unhooked(model)


def test_bad_models_and_settings_are_refused() -> None:
    model = masked()
    optimizer = momentum(model)
    before = copy.deepcopy(model.state_dict())

    def refuse(text: str, method: str = "rigl", **change: Any) -> None:
        arguments = {"model": model, "optimizer": optimizer, "steps": 10, "interval": 1} | change
        with pytest.raises(CompressionError, match=text):
            DynamicSparsity(method=method, **arguments)

    refuse("no method 'sett'; did you mean 'set'", "sett")
    refuse("Sequential has no masked weights; compress.prune", model=net())
    refuse("optimizer is a torch.optim.Optimizer, got Sequential", optimizer=net())
    refuse("the optimizer lacks 3 of 3 masked weights, such as '0'; make it from", optimizer=momentum(net()))
    refuse("method 'set' keeps the density that the model was pruned to; leave out density=0.5", "set", density=0.5)
    refuse("method 'gradual' needs density=", "gradual")
    full = masked(1.0)
    refuse("all 1,080 masked weights are kept, so none can grow", model=full, optimizer=momentum(full))
    refuse(r"in \(0, 1\], got density=0.", "gradual", density=0)
    refuse(r"in \(0, 1\], got density\['0'\]='1'", "gradual", density={"0": "1", "2": 1, "5": 1})
    refuse("density asks for 540 weights in the end, but only 270 are kept now", "gradual", density=0.5)
    refuse("asks for 108 weights of '0' in the end, but only 54", "gradual", density={"0": 0.5, "2": 0.1, "5": 0.1})
    refuse("keeps 1 of 1,080 weights, which is less than one for each of 3 layers", "gradual", density=0.001)
    refuse("density names 'conv', which is no masked layer", "gradual", density={"conv": 0.1})
    refuse("no entry for 2 masked layers, such as '2'", "gradual", density={"0": 0.1})
    assert unhooked(model) and not optimizer._optimizer_step_post_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_second_one_is_refused_while_the_first_is_active() -> None:
    model, other = masked(), masked()
    both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    first = DynamicSparsity(model, both, "set", steps=4, interval=1)
    with pytest.raises(CompressionError, match=r"of this optimizer already \(set after step 0 of 4.* call .remove\(\)"):
        DynamicSparsity(other, both, "set", steps=10, interval=1)
    with pytest.raises(CompressionError, match="a DynamicSparsity over these masked weights already"):
        DynamicSparsity(model, momentum(model), "set", steps=10, interval=1)
    first.remove()
    second = DynamicSparsity(model, both, "set", steps=4, interval=1)
    train(model, both, range(1, 4))
    DynamicSparsity(model, both, "set", steps=4, interval=1)  # the second has made its last change
    assert second.updates == 2
    del first, second, both
    DynamicSparsity(model, momentum(model), "set", steps=10, interval=1)  # nothing holds the others any more


def test_the_model_is_checked_before_the_schedule() -> None:
    model = net()
    with pytest.raises(CompressionError, match="has no masked weights"):
        DynamicSparsity(model, momentum(model), steps=10)
    model = masked()
    with pytest.raises(CompressionError, match="the optimizer lacks 3 of 3"):
        DynamicSparsity(model, momentum(net()), steps=10)


def test_it_is_shown_as_it_is_printed() -> None:
    model = masked()
    sparsity = DynamicSparsity(model, momentum(model), steps=1000)
    assert (
        repr(sparsity)
        == str(sparsity)
        == "rigl after step 0 of 1,000: 0 updates, 270 of 1,080 weights kept (density 0.25)"
    )


def test_losing_a_mask_while_training_is_refused() -> None:
    model = masked()
    optimizer = momentum(model)
    DynamicSparsity(model, optimizer, "set", steps=10, interval=1)
    detach(model[2], "weight")
    before = masks(model)
    with pytest.raises(CompressionError, match="'2' has lost its mask; call remove"):
        train(model, optimizer, range(1, 2))
    assert same(before, masks(model))


def test_training_another_model_is_refused() -> None:
    model = masked()
    optimizer = momentum(model)
    DynamicSparsity(model, optimizer, "rigl", steps=10, interval=1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # as of a replica of the model
    with pytest.raises(CompressionError, match="no gradient of a masked weight was seen before step 1: RigL watches"):
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "in place", "step", "optimizer"])
def test_compiled_trainings_make_the_same_masks(what: str) -> None:
    eager, model = masked(), masked()
    optimizers = momentum(eager), momentum(model)
    DynamicSparsity(eager, optimizers[0], "rigl", steps=20, interval=3)
    compiled: nn.Module = model
    if what == "model":
        compiled = torch.compile(model)
    elif what == "in place":
        model.compile()
    sparsity = DynamicSparsity(compiled, optimizers[1], "rigl", steps=20, interval=3)
    train(eager, optimizers[0], range(1, 12))

    def update() -> None:
        optimizers[1].step()

    def one_step(x: Tensor, y: Tensor) -> None:
        optimizers[1].zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        update()

    update = torch.compile(update) if what == "optimizer" else update
    one_step = torch.compile(one_step) if what == "step" else one_step
    for step in range(1, 12):
        one_step(*batch(step))
    assert sparsity.updates == 3 and sparsity.step == 11
    assert same(masks(eager), masks(model))


WORKER = """
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_dynamic import *
rank, folder, method = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model = masked().to(memory_format=torch.channels_last)
optimizer = momentum(model)
wrapped = nn.parallel.DistributedDataParallel(model)
sparsity = DynamicSparsity(wrapped, optimizer, method, steps=20, interval=2)
for step in range(1, 9):
    x, y = batch(step, 16)
    optimizer.zero_grad()
    F.cross_entropy(wrapped(x[rank::2]), y[rank::2]).backward()
    optimizer.step()
torch.save([masks(model), sparsity.updates], folder / f"{rank}.pt")
dist.barrier()
del wrapped, sparsity  # which hold the process group, whose threads have to end before the process does
gc.collect()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_two_processes_have_the_masks_of_one(method: str, tmp_path: Path) -> None:
    command = [str(tmp_path), method, str(Path(__file__).parent)]
    root = str(Path(__file__).parents[2])
    running = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *command], env={**os.environ, "PYTHONPATH": root})
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    (first, updates), (second, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert updates == 4 and same(first, second)
    model = masked()
    optimizer = momentum(model)
    DynamicSparsity(model, optimizer, method, steps=20, interval=2)
    train(model, optimizer, range(1, 9), size=16)
    assert same(first, masks(model))
