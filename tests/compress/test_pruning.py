"""Masks that hold in any training loop: exact numbers, dead weights that stay dead, and nothing else changed."""

from __future__ import annotations

import copy
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compress.density import densities
from compress.errors import CompressionError
from compress.low_bit import LowBit, attach_low_bit
from compress.low_bit_models import freeze
from compress.pruning import METHODS, finalize, masks, prune
from compress.shift import ShiftGrid
from compress.weights import weights

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """Convolutions, plain and depthwise, attention, norms and a classifier: (B, 3, 6, 6) to (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.depthwise(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(16, 3, 6, 6, generator=generator), torch.arange(16) % 4


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int, after: Callable[[], None] | None = None) -> None:
    """A loop that knows nothing of masks."""
    model.train()
    for step in range(steps):
        x, y = batch(step % 5)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if after:
            after()


def dead(model: nn.Module) -> dict[str, Tensor]:
    return {name: ~mask for name, mask in masks(model).items()}


def check_masks_hold(model: nn.Module, before: dict[str, Tensor], stored: bool = True) -> None:
    assert masks(model).keys() == before.keys()
    for name, weight in weights(model).items():
        assert weight.mask is not None and torch.equal(weight.mask, before[name]), name
        effective = getattr(weight.module, weight.attribute)
        assert not effective[~before[name]].any(), name
        assert effective[before[name]].any(), name
        assert not stored or not weight.parameter[~before[name]].any(), name


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_dead_weights_and_their_state_stay_zero(name: str, inplace: bool) -> None:
    net = Net()
    early = OPTIMIZERS[name](net.parameters())  # made before the masks
    model = prune(net, 0.3, inplace=inplace)
    assert (model is net) == inplace
    optimizer = early if inplace else OPTIMIZERS[name](model.parameters())
    before = {name: mask.clone() for name, mask in masks(model).items()}
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, 100)
    check_masks_hold(model, before)
    states = 0
    for weight, off in zip(weights(model).values(), dead(model).values(), strict=True):
        for value in optimizer.state[weight.parameter].values():
            if isinstance(value, Tensor) and value.shape == off.shape:
                states += 1
                assert not value[off].any() and value[~off].any()
    assert states >= 5
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert len([name for name in moved if name.endswith("original")]) == 5, "the weights that are on do learn"


def test_muon_moves_stored_weights_but_not_the_network() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    model = prune(net, 0.2)
    before = {name: mask.clone() for name, mask in masks(model).items()}
    train(model, torch.optim.Muon(model.parameters(), lr=0.02), 100)
    check_masks_hold(model, before, stored=False)
    assert all(weight.parameter[~before[name]].any() for name, weight in weights(model).items())
    plain = finalize(model)
    assert torch.equal(plain(batch()[0]), model(batch()[0]))
    assert not plain[1].weight[~before["1"]].any()  # type: ignore[index, union-attr]


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_weights_are_masked(use_buffers: bool) -> None:
    model = prune(Net(), 0.3)
    before = {name: mask.clone() for name, mask in masks(model).items()}
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    swa = AveragedModel(model)  # which can average no integer buffers, such as those of batch norms

    def update() -> None:
        ema.update_parameters(model)
        swa.update_parameters(model)

    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 100, update)
    for average in (ema, swa):
        check_masks_hold(average.module, before)
        assert not torch.equal(average.module.head.weight, model.head.weight)


def test_mixed_precision_keeps_masks() -> None:
    model = prune(Net(), 0.3)
    before = {name: mask.clone() for name, mask in masks(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(100):
        x, y = batch(step % 5)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
            assert logits.dtype == torch.bfloat16
            loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        optimizer.step()
    check_masks_hold(model, before)
    model.bfloat16()
    check_masks_hold(model, before)


def test_gradients_and_clipping_are_those_of_the_masked_network() -> None:
    model = prune(Net(), 0.3)
    plain = finalize(model)
    x, y = batch()
    for net in (model, plain):
        F.cross_entropy(net(x), y).backward()
    for name, weight in weights(plain).items():
        assert weight.parameter.grad is not None
        weight.parameter.grad.mul_(masks(model)[name])
    assert clip_grad_norm_(model.parameters(), 0.1) == clip_grad_norm_(plain.parameters(), 0.1)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(model)[name].parameter.grad, weight.parameter.grad, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_the_masked_network_computes_what_a_dense_one_with_zeros_does(training: bool) -> None:
    net = Net()
    model = prune(net, 0.3)
    plain = copy.deepcopy(net)
    for name, weight in weights(plain).items():
        with torch.no_grad():
            weight.parameter.mul_(masks(model)[name])
    x, _ = batch()
    for one in (model, plain):
        one.train(training)
    with torch.set_grad_enabled(training):  # attention has a path of its own in evaluation
        assert torch.equal(model(x), plain(x))


def test_attention_layers_of_torch_work_with_masks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = prune(layer, 0.4)
    assert list(masks(model)) == ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
    plain, x = finalize(model), torch.rand(3, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    model.train()(x).sum().backward()
    weight = weights(model)["self_attn.in_proj_weight"]
    assert weight.parameter.grad is not None and not weight.parameter.grad[dead(model)[weight.name]].any()


def test_a_copy_is_masked_on_its_own() -> None:
    model = prune(Net(), 0.3)
    twin = copy.deepcopy(model)
    before = {name: mask.clone() for name, mask in masks(model).items()}
    x, _ = batch()
    assert torch.equal(twin.eval()(x), model.eval()(x))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), 100)
    check_masks_hold(twin, before)
    assert not torch.equal(twin.head.weight, model.head.weight)
    finalize(twin, inplace=True)
    check_masks_hold(model, before)


@pytest.mark.slow
def test_a_compiled_network_keeps_its_masks() -> None:
    model = prune(Net(), 0.3)
    before = {name: mask.clone() for name, mask in masks(model).items()}
    twin = copy.deepcopy(model)
    compiled = torch.compile(model)
    for net, parameters in ((compiled, model.parameters()), (twin, twin.parameters())):
        train(net, torch.optim.SGD(parameters, lr=0.05, momentum=0.9), 100)
    check_masks_hold(model, before)
    x, _ = batch()
    model.eval(), twin.eval()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x), twin(x), rtol=0.05, atol=0.05)  # a hundred steps later


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
import compress

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(rank)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
model = compress.prune(net, 0.2, seed=rank)  # other weights and masks in each process: those of rank 0 count
first = {name: mask.clone() for name, mask in compress.masks(model).items()}
shared = nn.parallel.DistributedDataParallel(model)
sgd = torch.optim.SGD(shared.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
for step in range(100):
    sgd.zero_grad()
    F.cross_entropy(shared(torch.rand(8, 3, 6, 6)), torch.arange(8) % 4).backward()
    sgd.step()
own = compress.masks(model)
for name, layer in (("0", model[0]), ("4", model[4])):
    stored = layer.parametrizations.weight.original
    assert not stored[~own[name]].any() and not sgd.state[stored]["momentum_buffer"][~own[name]].any()
    other = [torch.empty_like(stored) for _ in range(2)]
    dist.all_gather(other, stored.detach())
    assert torch.equal(*other) and other[0].any()
    assert torch.equal(own[name], first[name]) == (rank == 0)
print("masks hold")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_one_mask() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in ranks]
    assert [out.strip() for out, _ in said] == ["masks hold"] * 2, said


def test_a_plain_state_dict_loads() -> None:
    net = Net()
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 3)
    model = prune(Net(), 0.3)
    assert str(model.load_state_dict(net.state_dict())) == "<All keys matched successfully>"
    for name, weight in weights(net).items():
        assert torch.equal(weights(model)[name].parameter, weight.parameter * masks(model)[name])
    assert torch.equal(model.conv[1].running_mean, net.conv[1].running_mean)  # type: ignore[index, union-attr]


def test_a_run_resumes_with_its_masks(tmp_path: Path) -> None:
    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = prune(Net(), 0.3, seed=seed)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    model, optimizer = fresh(0)
    train(model, optimizer, 10)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, optimizer, 10)
    again, other = fresh(1)
    assert not torch.equal(masks(again)["conv.0"], masks(model)["conv.0"])
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(stored["model"])
    other.load_state_dict(stored["optimizer"])
    train(again, other, 10)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    check_masks_hold(again, masks(model))


def test_initialisation_of_a_masked_weight_does_nothing() -> None:
    model = prune(nn.Linear(10, 10), 0.5)
    before = model.weight.detach().clone()
    nn.init.ones_(model.weight)  # type: ignore[arg-type]
    assert torch.equal(model.weight, before)


def test_torch_refuses_to_pickle_a_masked_model(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        torch.save(prune(nn.Linear(10, 10), 0.5), tmp_path / "model.pt")


def test_masks_take_a_byte_for_each_weight_at_most() -> None:
    model = prune(Net(), 0.3)
    size = sum(weight.size for weight in weights(model).values())
    assert sum(mask.untyped_storage().nbytes() for mask in masks(model).values()) == size
    plain = sum(value.nbytes for value in Net().state_dict().values())
    assert sum(value.nbytes for value in model.state_dict().values()) == plain + size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distribution", [None, "uniform", "erk", "erk+", "snip"])
def test_every_method_keeps_exactly_so_many(method: str, distribution: str | None) -> None:
    net = Net()
    model = prune(net, 0.3, distribution=distribution, method=method, batch=batch())
    kept = {name: int(mask.sum()) for name, mask in masks(model).items()}
    assert sum(kept.values()) == round(0.3 * (216 + 72 + 192 + 64 + 32))
    assert min(kept.values()) >= 1
    rule = distribution or ("erk" if method == "random" else None)
    if rule:
        assert kept == densities(net, 0.3, rule, batch=batch()).counts


@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_other_weights(method: str) -> None:
    net = Net()
    found = {own: prune(net, 0.3, distribution="erk", method=own, batch=batch()) for own in METHODS}
    mine = masks(found[method])["conv.0"]
    assert [torch.equal(mine, masks(own)["conv.0"]) for own in found.values()].count(True) == 1


def test_magnitude_keeps_the_largest_of_all_or_of_each_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(16.0).view(4, 4) - 20)
        net[1].weight.copy_(torch.arange(16.0).view(4, 4) / 4)
    everywhere = masks(prune(net, 0.5, method="magnitude"))
    assert int(everywhere["0"].sum()) == 15 and int(everywhere["1"].sum()) == 1  # all of "0", but none is emptied
    each = masks(prune(net, 0.5, method="magnitude", distribution="uniform"))
    assert torch.equal(each["0"].flatten(), torch.arange(16) < 8) and torch.equal(
        each["1"].flatten(), torch.arange(16) >= 8
    )


def test_the_seed_decides_the_mask() -> None:
    net = Net()
    state = torch.get_rng_state()
    found = [masks(prune(net, 0.3, seed=seed)) for seed in (0, 0, 1)]
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])
        assert not torch.equal(found[0][name], found[2][name])
    assert torch.equal(torch.get_rng_state(), state)


def test_random_masks_are_spread_evenly() -> None:
    mask = masks(prune(nn.Linear(100, 100), 0.1))["weight"]
    assert int(mask.sum()) == 1000
    for lines in (mask.sum(0), mask.sum(1)):
        assert 0 < int(lines.min()) and int(lines.max()) < 25  # 10 and 3 from it, on average


def test_the_model_stays_as_it_is_unless_inplace() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    model = prune(net, 0.3)
    assert not masks(net) and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    plain = finalize(model)
    assert masks(model) and not masks(plain) and set(plain.state_dict()) == set(before)


def test_inplace_keeps_the_parameters() -> None:
    net = Net()
    before = {id(parameter) for parameter in net.parameters()}
    assert {id(parameter) for parameter in prune(net, 0.3, inplace=True).parameters()} == before
    mask = masks(net)["head"].clone()
    assert finalize(net, inplace=True) is net
    assert {id(parameter) for parameter in net.parameters()} == before
    assert type(net.head) is nn.Linear and not net.head.weight[~mask].any()


def test_a_finalized_model_can_be_pruned_again() -> None:
    once = prune(Net(), 0.5, distribution="uniform", method="magnitude")
    twice = prune(finalize(once), 0.2, distribution="uniform", method="magnitude")
    for name, mask in masks(twice).items():
        assert not (mask & ~masks(once)[name]).any()


def test_a_model_that_cannot_be_copied_is_refused_but_can_be_pruned_in_place() -> None:
    net = Net()
    net.stored = net(batch()[0])  # type: ignore[assignment]
    for compress in (finalize, lambda model: prune(model, 0.5)):
        with pytest.raises(CompressionError, match="Net cannot be copied: .* Remove what it stores"):
            compress(net)
    assert not masks(net) and masks(prune(net, 0.5, inplace=True))


def test_a_model_without_masks_is_only_copied_by_finalize() -> None:
    net = Net()
    plain = finalize(net)
    assert plain is not net and plain.head.weight is not net.head.weight
    assert torch.equal(plain.head.weight, net.head.weight)  # type: ignore[arg-type]


class Rounded(LowBit):
    """A trainable step that rounds to whole multiples of a quarter."""

    kind = "affine"

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ((4 * weight).round() / 4 - weight).detach()

    def codes(self, weight: Tensor) -> Tensor:
        return (4 * weight + 8).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        return codes.float() / 4 - 2

    @classmethod
    def restore(cls, bits: int, *_: Any) -> Rounded:
        return cls(bits)

    def frozen(self) -> LowBit:
        return ShiftGrid(self.bits)  # any frozen grid is the identity


@pytest.mark.parametrize("frozen", [False, True])
def test_finalize_makes_masked_weights_of_few_bits_plain(frozen: bool) -> None:
    net = Net()
    model = prune(net, 0.5)
    for name in ("conv.0", "head"):
        attach_low_bit(model.get_submodule(name), "weight", Rounded(4))
    model = freeze(model) if frozen else model
    before = {name: mask.clone() for name, mask in masks(model).items()}
    check_masks_hold(model, before, stored=frozen)
    stored = model.get_submodule("head").parametrizations["weight"].original  # type: ignore[union-attr, index]
    assert stored.requires_grad != frozen
    x, _ = batch()
    wanted = model.eval()(x)
    plain = finalize(model)
    assert torch.equal(plain.eval()(x), wanted) and torch.equal(model(x), wanted)
    for name, module in plain.named_modules():
        assert type(module) is type(net.get_submodule(name)) and not module._load_state_dict_pre_hooks
    for name in ("conv.0", "head"):
        weight = weights(plain)[name].parameter
        assert weight.requires_grad and not weight[~before[name]].any()
        assert torch.equal((4 * weight).round() / 4, weight) and weight.any()
    assert masks(model).keys() == before.keys(), "the model stays as it was"


def test_everything_is_kept_at_density_1() -> None:
    for method in METHODS:
        assert all(mask.all() for mask in masks(prune(Net(), 1, method=method, batch=batch())).values())


def test_densities_can_be_given_by_layer() -> None:
    net = Net()
    model = prune(net, {"head": 0.5, "attention.in_proj_weight": 0.1})
    assert {name: int(mask.sum()) for name, mask in masks(model).items()} == {
        "attention.in_proj_weight": 19,
        "head": 16,
    }
    found = densities(net, 0.123, "erk+", last=0.5, exclude=["depthwise"])
    assert {name: int(mask.sum()) for name, mask in masks(prune(net, found)).items()} == found.counts
    wide = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "conv": nn.Sequential(nn.Conv2d(3, 16, 3))})
    other = densities(wide, 0.25, "uniform")  # of a model with the same names and other sizes
    kept = {"attention.in_proj_weight": 48, "attention.out_proj": 16, "conv.0": 54}
    assert {name: int(mask.sum()) for name, mask in masks(prune(net, other)).items()} == kept
    best = masks(prune(net, {"head": 0.25}, method="magnitude"))["head"]
    assert torch.equal(best, net.head.weight.abs() >= net.head.weight.abs().flatten().sort().values[-8])


def test_only_layers_named_need_be_free_to_prune() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    net["head"].weight = net["embedding"].weight
    assert list(masks(prune(net, {"body": 0.5}))) == ["body"]
    model = prune(net, 0.5, exclude=["head"])
    assert list(masks(model)) == ["body"] and model["head"].weight is model["embedding"].weight  # type: ignore[index]


def test_channels_are_removed_if_structured() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    small = prune(net, 0.5, structured=True, method="magnitude", example=batch()[0])
    assert small[0].weight.shape == (4, 3, 3, 3) and small[3].weight.shape == (4, 64)  # type: ignore[index, union-attr]
    assert not masks(small)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"density": d}, "share of the weights that are kept") for d in (0, 1.1, -1, math.nan, True, "0.5")),
        ({"density": {"head": 2.0}}, r"in \(0, 1\], got density\['head'\]=2.0"),
        ({"density": {"haed": 0.5}}, "density names 'haed', which is no weight of the model; did you mean 'head'"),
        ({"density": {}}, "density is an empty mapping"),
        ({"density": {"head": 0.5}, "distribution": "erk"}, "distribution='erk' has no meaning"),
        ({"density": {"head": 0.5}, "exclude": ["head"]}, "all 5 weights are excluded"),
        ({"density": {"head": 0.5, "conv.0": 0.5}, "exclude": ["head"]}, "density names 'head', which is excluded too"),
        ({"density": 0.005}, r"keeps 3 of 576 weights, but pruning keeps one weight or more in each of 5 layers"),
        ({"density": 0.005, "method": "magnitude"}, "at least 0.00869"),
        ({"distribution": "erk-"}, "no distribution 'erk-'; did you mean 'erk'"),
        ({"method": "magnitud"}, "no pruning method 'magnitud'; did you mean 'magnitude'"),
        ({"exclude": ["hed"]}, "exclude names 'hed', which holds no weight to prune; did you mean 'head'"),
        *(({"method": m, "batch": None}, f"'{m}' needs data to score the weights") for m in ("snip", "grasp")),
        ({"method": "synflow", "batch": None}, "'synflow' needs batch=.x, None. for the shape of x alone"),
        ({"distribution": "snip", "batch": None}, "'snip' needs data"),
        ({"example": torch.zeros(1)}, "example is for structured=True"),
        ({"structured": True}, "structured=True makes smaller tensors, so it returns a new model"),
        ({"structured": True, "inplace": False}, "follows the channels of a batch through the model: give example=x"),
    ],
)
def test_bad_input_is_refused_and_the_model_untouched(settings: dict[str, Any], message: str) -> None:
    net = Net()
    before, kinds = copy.deepcopy(net.state_dict()), [type(module) for module in net.modules()]
    with pytest.raises(CompressionError, match=message):
        prune(net, **{"density": 0.3, "batch": batch(), "inplace": True} | settings)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [type(module) for module in net.modules()] == kinds


def test_models_that_cannot_be_pruned_are_refused() -> None:
    with pytest.raises(CompressionError, match="Sequential has no convolution, linear layer or attention"):
        prune(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), 0.5)
    with pytest.raises(CompressionError, match="'conv.0' is masked already; compress.finalize"):
        prune(prune(Net(), 0.5), 0.5)
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "body": nn.Linear(4, 4)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(CompressionError, match="the weight of 'head' is tied"):
        prune(tied, 0.5, inplace=True)
    assert not masks(tied)


def test_what_is_no_module_is_refused() -> None:
    for thing, text in (
        ("resnet18", "the string 'resnet18'; build or load the model first"),
        (nn.Linear(2, 2).state_dict(), "a mapping of 2 entries; load a state_dict into its model"),
        (nn.Linear, r"the class Linear; make a model of it: Linear\(...\)"),
        (None, "NoneType"),
    ):
        for call in (
            lambda it: prune(it, 0.5),
            lambda it: prune(it, 0.5, structured=True, example=torch.zeros(1, 2)),
            lambda it: densities(it, 0.5),
            finalize,
            lambda it: finalize(it, inplace=True),
            masks,
        ):
            with pytest.raises(CompressionError, match=f"model is a torch.nn.Module, got {text}"):
                call(thing)  # type: ignore[no-untyped-call]
