"""Networks of unusual shapes: channels are followed, or refused with the reason, and outputs never change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces import NASBench201, ResNet
from search_spaces.channels import analyse
from search_spaces.net2net import GrowthError, deepen, explain, widen

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)


class Net(nn.Module):
    """Convolutions `a` (8 channels), `b` (8), `c` (12) and a head, joined by a forward that a test gives."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.eval().double()


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


class Add(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x) + self.b(x)) * 2 - 1)


class AddInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        return self.head(y.relu_().sub_(1.0).contiguous())


class Gate(Net):
    """Squeeze and excitation, by functions and methods."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        gate = torch.sigmoid(self.excite(y.mean((2, 3), keepdim=True)))
        return self.head(y * gate)


class LinearGate(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        gate = self.excite(y.mean([2, 3])).sigmoid().unsqueeze(-1).unsqueeze(-1)
        return self.head(gate * y)


class ViewGate(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, _, _ = y.size()
        gate = self.excite(F.adaptive_avg_pool2d(y, 1).view(b, c)).sigmoid().view(b, c, 1, 1)
        return self.head(y * gate)


class Cat(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.a(x), self.b(x)], dim=1))


class CatAndAdd(Net):
    """A convolution that is added to two others side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.d(x) + torch.cat((self.a(x), self.b(x)), 1))


class TwiceCat(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(torch.cat([y, y, self.b(x), y], 1))


class Flat(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.a(x), 2)
        return self.linear(y.view(y.size(0), -1))


class Reshaped(Net):
    """Flattened, with dimensions in another order."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).permute(0, 2, 3, 1)
        return self.linear(y.reshape(y.shape[0], -1))


class Shuffle(Net):
    """Groups, a channel shuffle, groups again, as in ShuffleNet."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.d(self.a(x))
        b, c, h, w = y.shape
        y = y.view(b, 4, c // 4, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.head(self.e(y))


class Split(Net):
    """Halves that go different ways, and meet."""

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x).chunk(2, dim=1)
        return self.head(torch.cat([self.d(y), z], 1))


class Sliced(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        half = y.shape[1] // 2
        return self.head(torch.cat([self.d(y[:, :half]), y[:, half:]], 1))


class Scaled(Net):
    """A parameter per channel, a bias per channel, and one for all."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(**layers)
        self.scale = nn.Parameter(torch.rand(8, 1, 1).double())
        self.shift = nn.Parameter(torch.rand(1, 8, 1, 1).double())
        self.offset = nn.Parameter(torch.rand(8).double())
        self.one = nn.Parameter(torch.rand(1).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.scale * self.a(x) + self.shift) * self.one + self.offset.view(1, -1, 1, 1))


class Functional(Net):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(**layers)
        self.weight, self.bias = nn.Parameter(torch.randn(7, 8, 1, 1).double()), nn.Parameter(torch.randn(7).double())
        self.last = nn.Parameter(torch.randn(5, 7).double())

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(self.a(x), self.weight, self.bias)
        y = F.batch_norm(y, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
        return F.linear(F.gelu(y).mean((-2, -1)), self.last)


class WholeInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.mul_(2.0)
        return self.head(F.relu(torch.flatten(F.relu(y, inplace=True), 2), inplace=True).unsqueeze(2))


class Steps(nn.Sequential):
    """A chain in float64."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.eval().double()


def conv(inputs: int, outputs: int, size: int = 1, **more: object) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **more)


TIED = nn.Conv2d(3, 16, 1)
CASES = {  # the layer to widen, to how many, what widens with it
    "add": (Add(head=head(8)), "b", 11, ["a"]),
    "add_in_place": (AddInPlace(head=head(8)), "a", 11, ["b"]),
    "whole_in_place": (WholeInPlace(head=head(8)), "a", 11, []),
    "gate": (Gate(excite=conv(8, 8), head=head(8)), "excite", 11, ["a"]),
    "gated": (Gate(excite=conv(8, 8), head=head(8)), "a", 13, ["excite"]),
    "linear_gate": (LinearGate(excite=nn.Linear(8, 8), head=head(8)), "a", 13, ["excite"]),
    "view_gate": (ViewGate(excite=nn.Linear(8, 8), head=head(8)), "a", 13, ["excite"]),
    "cat_first": (Cat(head=head(19)), "a", 10, []),
    "cat_last": (Cat(head=head(19)), "b", 20, []),
    "cat_and_add": (CatAndAdd(d=TIED, head=head(16)), "a", 13, ["d"]),
    "cat_and_add_second": (CatAndAdd(d=TIED, head=head(16)), "b", 11, ["d"]),
    "cat_and_add_whole": (CatAndAdd(d=TIED, head=head(16)), "d", 21, []),
    "twice_in_a_cat": (TwiceCat(head=head(32)), "a", 10, []),
    "flat": (Flat(linear=nn.Linear(128, 5)), "a", 9, []),
    "reshaped": (Reshaped(linear=nn.Linear(512, 5)), "a", 9, []),
    "scaled": (Scaled(head=head(8)), "a", 9, []),
    "functional": (Functional(norm=nn.BatchNorm2d(7)), "a", 9, []),
    "functional_layer": (Functional(norm=nn.BatchNorm2d(7)), "weight", 9, []),
    "depthwise": (Steps(conv(3, 8), conv(8, 8, 3, groups=8), nn.ReLU(), conv(8, 6), head(6)), "1", 11, ["0"]),
    "before_depthwise": (Steps(conv(3, 8), conv(8, 16, 3, groups=8), nn.ReLU(), conv(16, 6), head(6)), "0", 11, []),
    "several_filters": (Steps(conv(3, 8), conv(8, 24, 3, groups=8), nn.ReLU(), conv(24, 6), head(6)), "1", 30, ["0"]),
    "groups_read": (Steps(conv(3, 8), nn.ReLU(), conv(8, 12, 3, groups=4), head(12)), "0", 12, []),
    "groups_made": (Steps(conv(3, 8), nn.ReLU(), conv(8, 12, 3, groups=4), head(12)), "2", 20, []),
    "two_groupings": (
        Steps(conv(3, 12), conv(12, 12, groups=4), nn.PReLU(12), conv(12, 12, groups=6), nn.PReLU(), head(12)),
        "1",
        24,
        [],
    ),
    "shuffle": (Shuffle(d=conv(8, 16, groups=4), e=conv(16, 8, groups=4), head=head(8)), "d", 32, []),
    "split": (Split(d=conv(4, 6), head=head(10)), "a", 12, []),
    "sliced": (Sliced(d=conv(4, 6), head=head(10)), "a", 12, []),
    "group_norm": (Steps(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), head(8)), "0", 16, []),
    "instance_norm": (Steps(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), head(8)), "0", 11, []),
    "layer_norm": (Steps(conv(3, 8), nn.Flatten(2), nn.LayerNorm(64), nn.Flatten(), nn.Linear(512, 5)), "0", 11, []),
    "layer_norm_over": (Steps(nn.Flatten(), nn.Linear(192, 6), nn.LayerNorm(6), nn.Linear(6, 5)), "1", 18, []),
    "transposed": (Steps(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(), head(6)), "0", 11, []),
    "transposed_made": (Steps(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(), head(6)), "1", 11, []),
    "transposed_depthwise": (
        Steps(conv(3, 8), nn.ConvTranspose2d(8, 16, 2, groups=8), nn.ReLU(), head(16)),
        "1",
        20,
        ["0"],
    ),
    "transposed_groups": (
        Steps(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, groups=4), nn.ReLU(), head(12)),
        "0",
        12,
        [],
    ),
    "transposed_groups_made": (
        Steps(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, groups=4), nn.ReLU(), head(12)),
        "1",
        20,
        [],
    ),
    "upsample": (Steps(conv(3, 8), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1), nn.MaxPool2d(3), head(8)), "0", 9, []),
    "unflattened": (Steps(nn.Flatten(), nn.Linear(192, 12), nn.Unflatten(1, (-1, 2, 2)), head(3)), "1", 24, []),
    "before_shuffle": (Steps(conv(3, 8), conv(8, 12), nn.PixelShuffle(2), conv(3, 4), head(4)), "1", 24, []),
    "pixel_shuffle": (Steps(conv(3, 8), nn.ReLU(), conv(8, 12), nn.PixelShuffle(2), conv(3, 4), head(4)), "0", 9, []),
    "one_channel": (Steps(conv(3, 1), nn.BatchNorm2d(1), nn.ReLU(), conv(1, 4), head(4)), "0", 3, []),
}


@pytest.mark.parametrize("case", CASES)
def test_channels_are_followed(case: str) -> None:
    model, name, channels, tied = CASES[case]
    before = analyse(model, X)
    wide, certificate = widen(model, name, channels, example=X, certificate=True)
    assert certificate.given <= 1e-12 and certificate.random <= 1e-12, certificate
    after = analyse(wide, X)
    assert after.layer(name).outputs == channels
    grown = [layer for layer in before.layers if after.layers[layer].outputs > before.layers[layer].outputs]
    assert {*grown} >= {name, *tied}
    assert explain(model, X)[name].widen
    again = widen(wide, name, 2 * channels, example=X)  # what was widened can be widened
    with torch.no_grad():
        assert (again(X) - model(X)).abs().max() <= 1e-12


class Constant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).view(x.shape[0], 8, 8, 8))


class Silent(Net):
    """A constant that does not stop on another number of channels, only means something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.a(x).mean((2, 3)).reshape(-1, 8))


class Count(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(y / y.shape[1] ** 0.5)


class Product(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).flatten(2)
        return y @ y.transpose(1, 2)


class WithInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.d(x) + x)


class Spread(Net):
    """One channel for all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) * self.d(x).sigmoid())


class MeanOver(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).mean(1).flatten(1)


class Written(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 0] = 0.0
        return self.head(y)


class PartInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, :4].mul_(2.0)
        return self.head(y)


class Checked(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch._assert(y.shape[1] == 8, "eight channels")
        return self.head(y)


class Regularised(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x)) * self.a.weight.norm()


class Repeated(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).repeat(1, 2, 1, 1))


class Swapped(Net):
    """Channels that are tied to other channels of the same layer."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(y + y.flip(1))


class Computed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(self.a(x), self.d.weight / self.d.weight.norm()))


class Grouped(Net):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(**layers)
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(self.a(x), self.weight, groups=8))


class Features(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.a(x)
        return {"features": y, "logits": self.head(y)}


REFUSED = {
    "constant": (
        Constant(head=head(8)),
        "a",
        12,
        r"view\(\) .*does not take their new number, shape .* is invalid",
    ),
    "silent": (Silent(linear=nn.Linear(8, 5)), "a", 16, "."),
    "count": (Count(head=head(8)), "a", 12, "computes with their number"),
    "product": (Product(), "a", 12, r"matmul\(\) .*through which channels cannot be followed"),
    "with_input": (WithInput(d=conv(3, 3), head=head(3)), "d", 5, "joins them with 'x', whose size cannot change"),
    "spread": (Spread(d=conv(3, 1), head=head(8)), "d", 5, "spreads their only channel over several"),
    "mean": (MeanOver(), "a", 12, r"mean\(\) .*is taken over them"),
    "written": (Written(head=head(8)), "a", 12, "item assignment"),
    "part_in_place": (PartInPlace(head=head(8)), "a", 12, r"mul_\(\) .*changes a part of them in place"),
    "checked": (Checked(head=head(8)), "a", 12, "eight channels"),
    "regularised": (Regularised(head=head(8)), "a", 12, "'a.weight' is read elsewhere in forward"),
    "repeated": (Repeated(head=head(16)), "a", 12, "repeat"),
    "tied_to_itself": (Swapped(head=head(8)), "a", 12, "channels of one layer are tied to one another"),
    "computed": (Computed(d=conv(8, 8), head=head(8)), "a", 12, "whose weight is computed"),
    "function_groups": (Grouped(head=head(8)), "a", 12, "has groups as a constant"),
    "features": (Features(head=head(8)), "a", 12, "they reach the model's output"),
    "groups": (Steps(conv(3, 8), conv(8, 12, groups=4), head(12)), "0", 10, "groups, .* by multiples of 4: to 12, say"),
    "input": (Steps(conv(3, 3, groups=3), head(3)), "0", 6, "its channels are those of the model's input"),
    "norm": (
        Steps(conv(3, 8), nn.GroupNorm(4, 8), head(8)),
        "0",
        12,
        "a norm .* by multiples of 8: to 16",
    ),
    "norm_of_two": (Cat(head=nn.Sequential(nn.GroupNorm(1, 19), head(19))), "a", 16, "copied equally often"),
    "softmax": (Steps(conv(3, 8), nn.Softmax(1), head(8)), "0", 12, "Softmax '1', through which"),
    "response_norm": (Steps(conv(3, 8), nn.LocalResponseNorm(2), head(8)), "0", 12, "LocalResponseNorm '1'"),
    "places": (Steps(conv(3, 8), nn.MaxPool2d(2), nn.GLU(1), head(4)), "0", 12, "GLU '2'"),
    "unflattened": (Steps(nn.Flatten(), nn.Linear(192, 12), nn.Unflatten(1, (-1, 2, 2)), head(3)), "1", 16, "."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_with_the_reason(case: str) -> None:
    model, name, channels, match = REFUSED[case]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(GrowthError, match=rf"^'{name}' cannot be widened to {channels} channels: .*{match}"):
        widen(model, name, channels, example=X)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    if case != "written":
        assert explain(model, X)[name].widen.possible == (case in ("groups", "norm", "unflattened"))


class ModeDependent(nn.Module):
    """A second head in training, as GoogLeNet has, and paths that are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head, self.auxiliary = head(8), nn.Sequential(nn.Flatten(), nn.Linear(512, 5))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.a(x)
        z = self.b(y)
        if self.training:
            z = z * z.new_empty((z.shape[0], 1, 1, 1)).bernoulli_(1.0)
            return self.head(y + z), self.auxiliary(y)
        return self.head(y + z)


def test_what_only_training_calls_is_widened_too() -> None:
    model = ModeDependent().double()
    wide, certificate = widen(model, "a", 11, example=X, certificate=True)
    assert certificate.given <= 1e-12 and certificate.training is not None and certificate.training <= 1e-12
    assert wide.b.weight.shape[:2] == (11, 11) and wide.auxiliary[1].weight.shape == (5, 704)
    assert all(out.shape == (4, 5) for out in wide.train()(X))
    with pytest.raises(GrowthError, match="not called in evaluation"):
        deepen(model, "auxiliary.1", example=X)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, *, double: bool = False) -> Tensor:
        z = self.a(x) + self.b(y)
        if mask is not None:
            z = z * mask
        return self.head(2 * z if double else z)


def test_several_inputs_and_arguments_that_are_left_out() -> None:
    model, pair = Optional(), (torch.randn(5, 4), torch.randn(5, 3))
    wide, certificate = widen(model, "a", 9, example=pair, certificate=True)
    assert certificate.random <= 1e-12 and wide.b.out_features == 9
    deep = deepen(wide, "b", example=pair)
    assert torch.allclose(deep(*pair), model(*pair), atol=1e-5)


def test_sequences_and_other_numbers_of_dimensions() -> None:
    for dimensions, size in ((1, (4, 3, 12)), (3, (2, 3, 5, 5, 5))):
        layer = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
        norm, pool = {1: (nn.BatchNorm1d, nn.AdaptiveAvgPool1d), 3: (nn.BatchNorm3d, nn.AdaptiveAvgPool3d)}[dimensions]
        model = (
            nn.Sequential(layer(3, 6, 3), norm(6), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(6, 2)).eval().double()
        )
        x = torch.randn(size, dtype=torch.double)
        assert widen(model, "0", 10, example=x, certificate=True)[1].given <= 1e-12
        deep, certificate = deepen(model, "0", example=x, certificate=True)
        assert certificate.given <= 1e-12 and type(deep[2][1]) is layer
    tokens = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    words = torch.randint(7, (2, 5))
    wide, certificate = widen(tokens, "1", 12, example=words, certificate=True)
    assert certificate.random <= 1e-12 and wide(words).shape == (2, 5, 3)
    assert deepen(tokens, "1", example=words, certificate=True)[1].random == 0


@pytest.mark.parametrize(
    "space", [ResNet(classes=5, in_channels=3), NASBench201(channels=4, cells=1, classes=5, in_channels=3)], ids=str
)
def test_networks_of_our_spaces_grow(space) -> None:
    model = space.build(space.at(space.size // 2)).double().eval()
    table = explain(model, X)
    assert sum(bool(row.widen) for row in table.rows) >= len(table.rows) - 1
    assert all(row.deepen for row in table.rows)
    for row in table.rows[:: max(1, len(table.rows) // 4)][:4]:
        if row.widen:
            assert widen(model, row.name, row.channels + 3, example=X, certificate=True)[1].given <= 1e-10
        assert deepen(model, row.name, example=X, certificate=True)[1].given <= 1e-10
