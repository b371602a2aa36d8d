"""Networks of torchvision: every convolution is widened and deepened exactly, or refused with the reason."""

from __future__ import annotations

import copy
import os
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.benchmarks.net2net_table import MODELS as ALL
from nasbench.benchmarks.net2net_table import convolutions, errors, network, wider
from nasbench.data import load
from search_spaces import ResNet
from search_spaces.channels import analyse
from search_spaces.net2net import GrowthError, deepen, explain, grow_kernel, widen

pytest.importorskip("torchvision")
MODELS = ALL if "ALL_MODELS" in os.environ else ("resnet18", "squeezenet1_1")  # all take half an hour
OURS = ResNet(classes=10, in_channels=3)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def grow_at_random(model: nn.Module, x: Tensor, actions: int, seed: int) -> nn.Module:
    """Widen and deepen in turns, wherever it is not refused."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < actions:
        found = convolutions(model, x)
        name = list(found)[int(torch.randint(len(found), (), generator=generator))]
        try:
            if done % 2:
                model = deepen(model, name, example=x, generator=generator)
            else:
                model = wider(model, name, found[name], x)
        except GrowthError:
            continue
        done += 1
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_is_widened_exactly_or_refused_with_the_reason(name: str) -> None:
    model, x = network(name).double(), X.double()
    refused = {}
    for layer, channels in convolutions(model, x).items():
        try:
            wide = wider(model, layer, channels, x)
        except GrowthError as error:
            refused[layer] = str(error)
            continue
        difference, relative = errors(model, wide, x)
        assert difference <= 1e-10 and relative <= 1e-10, layer
        assert convolutions(wide, x)[layer] > channels
        assert type(wide) is type(model) and wide.state_dict().keys() == model.state_dict().keys()
    if name == "squeezenet1_1":  # its last layer is a convolution
        assert "reach the model's output" in refused.pop("classifier.1")
    if name == "shufflenet_v2_x1_0":  # halves of an odd number of channels are shuffled again and again
        assert all("chunk()" in reason or "of several layers" in reason for reason in refused.values())
        assert len(refused) == 18
        refused.clear()
    assert not refused


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_is_deepened_exactly(name: str) -> None:
    model, x = network(name).double(), X.double()
    for layer in convolutions(model, x):
        difference, relative = errors(model, deepen(model, layer, example=x), x)
        assert difference <= 1e-10 and relative <= 1e-10, layer


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_nine_actions_in_a_chain_stay_exact(name: str) -> None:
    single = network(name)
    for model, x, tolerance in ((copy.deepcopy(single).double(), X.double(), 1e-10), (single, X, 1e-4)):
        difference, relative = errors(model, grow_at_random(model, x, 9, seed=0), x)
        assert relative <= tolerance
        assert difference <= tolerance or model is single


@pytest.mark.slow
def test_kernels_of_depthwise_and_strided_convolutions_grow_exactly() -> None:
    model, x = network("mobilenet_v2").double(), X.double()
    for layer in list(convolutions(model, x))[::4]:
        size = model.get_submodule(layer).kernel_size[0]
        assert errors(model, grow_kernel(model, layer, size + 2, example=x), x)[1] <= 1e-10


def test_a_resnet_grows_exactly_in_both_precisions() -> None:
    single = network("resnet18")
    for model, x, tolerance in ((copy.deepcopy(single).double(), X.double(), 1e-10), (single, X, 1e-4)):
        grown = widen(model, "layer1.0.conv1", 96, example=x)
        grown = widen(grown, "layer2.0.downsample.0", 160, example=x)  # tied to three others by sums
        assert [grown.get_submodule(f"layer2.{i}.conv2").out_channels for i in (0, 1)] == [160, 160]
        grown = deepen(grown, "layer1.0.conv1", example=x)
        assert "layer1.0.bn1.2.weight" in grown.state_dict()
        grown = deepen(grown, "layer2.1.conv2", example=x)
        assert errors(model, grown, x)[1] <= tolerance


def test_the_auxiliary_heads_of_googlenet_widen_with_what_they_read() -> None:
    model = network("googlenet")
    wide = widen(model, "inception4a.branch1.conv", 200, example=X)
    assert errors(model, wide, X)[1] <= 1e-4
    assert wide.aux1.conv.conv.in_channels == model.aux1.conv.conv.in_channels + 8
    with torch.no_grad():
        outputs = wide.train()(X)
    assert type(outputs).__name__ == "GoogLeNetOutputs" and all(out.shape == (2, 10) for out in outputs)


def test_deepening_hardly_moves_a_network_in_training() -> None:
    model = network("resnet18")
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for module in model.modules():  # statistics of the data, as training leaves them
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        before = model.train()(images)
        for name in ("conv1", "layer2.0.conv1", "layer4.1.conv1"):
            deep = deepen(model, name, example=images)
            after = copy.deepcopy(deep).train()(images)
            assert (after - before).abs().max() <= 0.05 * before.abs().max()
            assert torch.equal(after.argmax(1), before.argmax(1))


def on_digits(model: nn.Module, size: int, steps: int) -> list[Tensor]:
    """Train a model for a few steps on scanned digits, in three channels; return two more batches of them."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
    batches = islice(load("digits").train_batches(64, seed=0, epoch=0, augment=False), steps + 2)
    pairs = [(F.interpolate(x, size=size).expand(-1, 3, -1, -1), y) for x, y in batches]
    for images, labels in pairs[:-2]:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return [images for images, _ in pairs[-2:]]


@pytest.mark.parametrize(
    ("make", "size", "steps", "layers"),
    [
        pytest.param(lambda: network("resnet18"), 32, 5, ("conv1", "layer2.0.conv1"), marks=pytest.mark.slow),
        (lambda: OURS.build(OURS.at(0)), 8, 19, ("stem.0.conv", "stage1.0.conv1.conv")),
    ],
    ids=("resnet18", "ours"),
)
def test_deepening_hardly_moves_a_network_that_trains_on_real_images(make, size, steps, layers) -> None:
    model = make()
    example, others = on_digits(model, size, steps)
    deep = model
    for name in layers:
        deep = deepen(deep, name, example=example)
    default = copy.deepcopy(deep)
    for norm in default.modules():
        if isinstance(norm, nn.BatchNorm2d) and torch.equal(norm.bias, norm.running_mean):
            norm.reset_parameters()  # as batch norms start: in evaluation the identity, too
    with torch.no_grad():
        for images, share in ((example, 1.0), (others, 0.9)):
            before, after, wrong = (copy.deepcopy(net).train()(images) for net in (model, deep, default))
            moved, badly = ((net - before).abs().max() / before.abs().max() for net in (after, wrong))
            kept, lost = ((net.argmax(1) == before.argmax(1)).float().mean() for net in (after, wrong))
            assert moved < 0.25 * badly and kept >= share
            if images is example:
                assert moved <= 1e-4 and badly > 0.05 and lost < 0.98
        assert torch.allclose(deep.eval()(images), model.eval()(images), atol=1e-4)
        assert torch.allclose(default.eval()(images), model.eval()(images), atol=1e-2)


def test_explanations_agree_with_what_is_done() -> None:
    model = network("shufflenet_v2_x1_0")
    table = explain(model, X)
    assert len(table.rows) == len(analyse(model, X).layers)
    shuffled = [row for row in table.rows if not row.widen]
    assert {row.name for row in shuffled if row.channels == 10} == {"fc"}
    assert any("chunk()" in row.widen.note for row in shuffled)
    assert all(row.deepen for row in table.rows)
    text = str(table)
    assert "conv5.0" in text and "chunk()" in text and "by a residual branch that starts at zero" in text
