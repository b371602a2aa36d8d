"""Multiply-adds by layer: the numbers of `nasbench.profile`, less what is pruned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import CompressionError
from compress.layer_macs import assumed_input, compare_macs, macs
from nasbench.profile import measure
from search_spaces import DARTS, NASBench201, ResNet, ViT
from search_spaces.base import SearchSpace
from search_spaces.masks import attach

X = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    "space",
    [
        ResNet(depths=(1,), widths=(8, 16), classes=10, in_channels=3),
        NASBench201(channels=4, cells=1, classes=10, in_channels=3),
        DARTS(cells=3, channels=4, classes=10, in_channels=3),
        ViT(image_size=16, classes=10, in_channels=3),
    ],
    ids=lambda space: type(space).__name__,
)
def test_a_dense_model_has_the_macs_of_its_profile(space: SearchSpace) -> None:
    model = space.build(space.at(space.size // 2))
    found = macs(model, X)
    assert found.dense == measure(model, (3, 16, 16)).macs
    assert found.sparse == pytest.approx(found.dense, rel=1e-6)  # a random number may be zero


def test_layers_of_all_kinds_have_their_macs() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),  # 8 x 8 pixels
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2),  # 64 pixels read
        nn.Flatten(),
        nn.Linear(4 * 16 * 16, 10),
    )
    found = macs(net, torch.zeros(1, 4, 16, 16))
    assert {name: own.dense for name, own in found.items()} == {
        "0": 64 * 9 * 4 * 8,
        "1": 64 * 9 * 8,
        "2": 64 * 4 * 8 * 2,
        "4": 10 * 1024,
    }


class Attention(nn.Module):
    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        out: Tensor = self.attention(q, k, k)[0]
        return out


def test_attention_has_the_macs_of_its_weights_and_of_its_products() -> None:
    net = Attention()
    q, k = torch.randn(1, 5, 8), torch.randn(1, 7, 8)
    mask = torch.ones(24, 8, dtype=torch.bool)
    mask[:8] = False  # no weight of the queries
    mask[8:16, :4] = False  # half of the keys'
    attach(net.attention, "in_proj_weight", mask)
    found = macs(net, (q, k))
    assert found["attention.in_proj_weight"].dense == (5 + 7 + 7) * 64
    assert found["attention.in_proj_weight"].sparse == 7 * 32 + 7 * 64
    assert found["attention.out_proj"].dense == 5 * 64
    assert found.other == 2 * 5 * 7 * 8
    apart = macs(Attention(kdim=6, vdim=6), (q, torch.randn(1, 7, 6)))
    assert [own.dense for own in apart.values()] == [5 * 64, 7 * 48, 7 * 48, 5 * 64]


def test_masked_and_zero_weights_do_no_macs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    mask = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    mask[:, 0, 0] = True
    attach(net[0], "weight", mask)
    with torch.no_grad():
        net[0].parametrizations.weight.original[0, 0, 0] = 0.0  # inside the mask, as where a weight has just grown
        net[2].weight[:, 1:] = 0.0
        net[3].weight.zero_()  # it starts at zero
    found = macs(net, X)
    assert [(own.kept, own.sparse) for own in found.values()] == [(12, 12 * 256), (36, 36 * 256), (8, 8 * 256)]


class Twice(nn.Module):
    """Calls one layer twice, another by its weight, and one never; stores what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(4, 4)
        self.weight = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.twice(self.twice(self.dropout(x)))
        return self.norm(self.last) + F.linear(x, self.weight.weight)


def test_layers_are_counted_as_often_as_they_are_called_and_in_that_order() -> None:
    found = macs(Twice(), torch.zeros(2, 4))
    assert [(name, own.dense) for name, own in found.items()] == [("twice", 32), ("weight", 16), ("never", 0)]
    assert (found.norms, found.adds) == (4, 4)


def test_one_input_is_counted_whatever_the_batch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    batch = X.expand(5, -1, -1, -1)
    assert macs(net, batch).dense == 256 * 9 * 3 * 4
    assert str(macs(net, batch)) == str(macs(net, X))
    assert str(compare_macs(net, net, batch)) == str(compare_macs(net, net, X))
    assert "input: 1 x 3 x 16 x 16" in str(compare_macs(net, net, batch))
    pair = torch.zeros(4, 5, 8), torch.zeros(4, 7, 8)
    assert macs(Attention(), pair).dense == macs(Attention(), (pair[0][:1], pair[1][:1])).dense


def test_a_model_stays_as_it_is() -> None:
    model = Twice().train()
    attach(model.twice, "weight", torch.eye(4, dtype=torch.bool))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    macs(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assumed_input(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and model.norm.training and not hasattr(model, "last")


def test_a_table_has_every_layer_and_the_sum() -> None:
    text = str(macs(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))))
    assert [line.split() for line in text.splitlines()] == [
        ["layer", "weights", "density", "MACs", "kept", "MACs"],
        ["0", "12", "1.0000", "12", "12"],
        ["1", "6", "1.0000", "6", "6"],
        ["all", "18", "1.0000", "18", "18"],
        ["of", "one", "input:", "1", "x", "4"],
    ]


def test_a_comparison_joins_what_stands_for_a_layer_and_names_the_overhead() -> None:
    before = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    after = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 1)), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    found = compare_macs(before, after, X)
    assert found.ratio == (6 + 8 + 8) / (12 + 8)
    text = str(found)
    assert "norms: 1,024 elements before, 1,536 after" in text
    assert [line.split()[:3] for line in text.splitlines()[1:4]] == [
        ["0", "3,072", "3,584"],
        ["2", "2,048", "2,048"],
        ["all", "5,120", "5,632"],
    ]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), (1, 3, 32, 32)),
        (nn.Sequential(nn.Conv2d(1, 1, 7, stride=7), nn.Flatten(), nn.Linear(1024, 2)), (1, 1, 224, 224)),
        (nn.Sequential(nn.Conv1d(2, 4, 3)), (1, 2, 32)),
        (nn.Sequential(nn.Linear(7, 2)), (1, 7)),
    ],
)
def test_an_input_is_assumed(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert assumed_input(model).shape == shape
    assert macs(model).input == " x ".join(map(str, shape))


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(CompressionError, match="ReLU has no convolution, linear layer or attention to count"):
        macs(nn.ReLU(), X)
    with pytest.raises(CompressionError, match=r"shape 1 x 3 x 16 x 16: RuntimeError: .* instead\. Give example=x"):
        macs(nn.Conv2d(4, 2, 1), X)
    with pytest.raises(CompressionError, match="it does not take 1 x 1 x 32 x 32 or 1 x 1 x 224 x 224. Give example=x"):
        macs(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(64, 2)))
    with pytest.raises(CompressionError, match="does not take an image or a vector first. Give example=x"):
        macs(nn.TransformerEncoderLayer(8, 2))
    with pytest.raises(CompressionError, match="Linear is on the meta device, where weights have no values"):
        macs(nn.Linear(4, 2, device="meta"), torch.zeros(1, 4, device="meta"))
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(CompressionError, match="has no weights yet"):
        macs(lazy, torch.zeros(1, 4))
    assert nn.parameter.is_lazy(lazy[0].weight)
