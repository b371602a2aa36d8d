"""Which weights of a model are compressed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from compress.errors import CompressionError
from compress.weights import prunable, weights
from search_spaces.masks import attach


class Net(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose1d(4, 4, 2))
        self.attention = nn.MultiheadAttention(4, 2)
        self.other = nn.MultiheadAttention(4, 2, kdim=6, vdim=8)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.head = nn.Linear(4, 2)


NAMES = [
    *("conv.0", "conv.2", "attention.in_proj_weight", "attention.out_proj"),
    *("other.q_proj_weight", "other.k_proj_weight", "other.v_proj_weight", "other.out_proj", "head"),
]


def test_weights_of_convolutions_linear_layers_and_attention_are_found() -> None:
    found = weights(Net())
    assert list(found) == list(prunable(Net())) == NAMES
    assert found["conv.0"].shape == (4, 3, 3, 3) and found["conv.0"].size == 108
    assert found["attention.in_proj_weight"].shape == (12, 4)
    assert found["other.v_proj_weight"].attribute == "v_proj_weight"


def test_a_layer_alone_is_called_weight() -> None:
    layer = nn.Linear(3, 2)
    (found,) = weights(layer).values()
    assert (found.name, found.module, found.parameter, found.mask) == ("weight", layer, layer.weight, None)


def test_a_masked_weight_shows_its_stored_parameter_and_its_mask() -> None:
    layer = nn.Linear(3, 2)
    stored, mask = layer.weight, torch.eye(2, 3, dtype=torch.bool)
    attach(layer, "weight", mask)
    found = weights(layer)["weight"]
    assert found.parameter is stored
    assert found.mask is not None and torch.equal(found.mask, mask)


def test_a_layer_used_twice_counts_once() -> None:
    layer = nn.Linear(4, 4)
    assert list(prunable(nn.Sequential(layer, nn.ReLU(), layer))) == ["0"]


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        (["head"], {"head"}),
        (["head.weight"], {"head"}),
        (["conv"], {"conv.0", "conv.2"}),
        (["attention"], {"attention.in_proj_weight", "attention.out_proj"}),
        (("attention.in_proj_weight", "conv.2"), {"attention.in_proj_weight", "conv.2"}),
    ],
)
def test_layers_modules_and_parameters_can_be_excluded(exclude: list[str], gone: set[str]) -> None:
    assert list(prunable(Net(), exclude)) == [name for name in NAMES if name not in gone]


def test_a_name_that_excludes_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(CompressionError, match="exclude names 'conv.1', which holds no weight to prune; did you mean"):
        prunable(Net(), ["conv.1"])
    with pytest.raises(CompressionError, match="exclude names 'hea'.*did you mean 'head'"):
        prunable(Net(), ["head", "hea"])
    with pytest.raises(CompressionError, match=r"write exclude=\['head'\]"):
        prunable(Net(), "head")


def test_a_model_without_such_weights_is_refused() -> None:
    with pytest.raises(CompressionError, match="Embedding has no convolution, linear layer or attention"):
        prunable(nn.Embedding(4, 2))
    with pytest.raises(CompressionError, match="all 1 weights are excluded"):
        prunable(nn.Sequential(nn.Linear(2, 2)), ["0"])


def test_tied_weights_are_refused_unless_excluded() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    net["head"].weight = net["embedding"].weight
    message = r"the weight of 'head' is tied: embedding.weight and head.weight are one parameter.*exclude=\['head'\]"
    with pytest.raises(CompressionError, match=message):
        prunable(net)
    assert list(prunable(net, ["head"])) == ["body"]
    with pytest.raises(CompressionError, match="'head' is tied"):
        prunable(copy.deepcopy(net))


def test_weights_that_are_masked_or_computed_are_refused() -> None:
    masked = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    attach(masked[1], "weight", torch.eye(2, dtype=torch.bool))
    with pytest.raises(CompressionError, match=r"'1' is masked already; compress.finalize\(model\) makes"):
        prunable(masked)
    assert list(prunable(masked, ["1"])) == ["0"]
    with pytest.raises(CompressionError, match="'weight' is parametrized already; remove that first"):
        prunable(parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(CompressionError, match="the weight of 'weight' is no parameter but computed from others"):
        prunable(prune.l1_unstructured(nn.Linear(2, 2), "weight", 1))
    with pytest.warns(FutureWarning, match="deprecated"):
        normed = weight_norm(nn.Linear(2, 2))
    with pytest.raises(CompressionError, match="as weight_norm and prune of torch.nn.utils do it"):
        prunable(normed)
    assert list(weights(normed)) == ["weight"]


def test_a_layer_without_a_shape_yet_is_refused() -> None:
    with pytest.raises(CompressionError, match="'1' has no shape yet; send one batch through the model first"):
        prunable(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2)))
