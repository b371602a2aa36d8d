"""Files with weights of few bits: exact bytes, exact values, any mixture, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.encodings import pack_bits, to_gaps
from compress.errors import CompressionError
from compress.filling import slots_of
from compress.low_bit import LowBit, attach_low_bit, low_bit_of
from compress.low_bit_models import freeze, low_bits
from compress.packing import packed_size
from compress.pruning import finalize, masks, prune
from compress.quantization import AffineGrid, quantize
from compress.shift import ShiftGrid, dense_shift
from compress.storage import load, read, save
from compress.weights import weights
from nasbench.origin import mark, origin_of
from search_spaces import NASBench201
from search_spaces.masks import attach

FILE, AGAIN = Path("model.safetensors"), Path("again.safetensors")
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(width: int = 16) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 13, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(13 * 64, 11),
        nn.Linear(11, 10),
    ).eval()


def mixture() -> nn.Module:
    """All kinds in one: a plain layer, a masked one, shifted ones, and masked and plain ones on even grids."""
    model = prune(net(), {"0": 0.3, "9": 0.1})
    model = dense_shift(model, {"3": 3})
    model = quantize(model, {"9": 4})
    return quantize(model, {"6": 5}, group=20, symmetric=False)


def value(model: nn.Module, layer: str) -> Tensor:
    weight = weights(model)[layer]
    found: Tensor = getattr(weight.module, weight.attribute)
    return found.detach()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value(one, name), value(other, name)) for name in weights(one))


def parts_of(name: str) -> dict[str, Tensor]:
    with safe_open(FILE, "pt") as file:
        return {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in file.keys() if key.startswith(name)}  # noqa: SIM118


def check_file(model: nn.Module, module: nn.Module) -> nn.Module:
    """Save, load, and check that all is as it was; return what was loaded."""
    with torch.no_grad():
        expected = model(X)
    save(model, FILE)
    twin = load(FILE, module)
    with torch.no_grad():
        assert torch.equal(twin(X), expected)
    assert same_weights(twin, model)
    assert masks(twin).keys() == masks(model).keys()
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(twin).items())
    for name, step in low_bits(twin).items():
        weight = weights(twin)[name]
        assert (step.kind, step.bits, type(step).__name__) == (
            low_bits(model)[name].kind,
            low_bits(model)[name].bits,
            {"shift": "ShiftGrid", "affine": "AffineGrid"}[step.kind],
        )
        assert not weight.parameter.requires_grad
        assert torch.equal(weight.parameter, value(twin, name)), "what is stored has the values already"
    save(twin, AGAIN)
    assert AGAIN.read_bytes() == FILE.read_bytes()
    return twin


def test_one_file_holds_any_mixture() -> None:
    model = mixture().eval()
    plain = net(16)
    for module in (plain, model, freeze(model), finalize(model), net(18), prune(net(), 0.5), quantize(net(), 8)):
        twin = check_file(model, module)
    assert set(low_bits(twin)) == {"3", "6", "9"}
    assert set(masks(twin)) == {"0", "9"}
    entries = json.loads(metadata()["compress"])["tensors"]
    assert [entries[f"{layer}.weight"]["encoding"] for layer in (0, 3, 6, 9, 10)] == [
        *("bitmask", "codes", "codes", "codes", "dense")
    ]
    assert all(p.requires_grad for name, p in twin.named_parameters() if ".original" not in name)
    assert weights(twin)["0"].parameter.requires_grad
    frozen = check_file(freeze(model), plain)
    assert same_weights(frozen, model)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_exactly_their_bits(bits: int) -> None:
    layer = nn.Linear(419, 11, bias=False)  # 4,609 weights
    for model in (dense_shift(layer, bits, include_ends=True, example=torch.rand(1, 419)), quantize(layer, bits)):
        save(model, FILE)
        parts = parts_of("weight")
        assert parts.pop("codes").nbytes == math.ceil(4609 * bits / 8)
        step = low_bit_of(model, "weight")
        assert step is not None
        assert sum(part.nbytes for part in parts.values()) == (0 if step.kind == "shift" else 4 * 11)
        assert torch.equal(load(FILE, layer).weight, model.weight)
        header = 8 + int.from_bytes(FILE.read_bytes()[:8], "little")
        assert FILE.stat().st_size == header + math.ceil(4609 * bits / 8) + sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("group", [None, 7, 64, "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_grids_of_every_kind_are_read_back(bits: int, symmetric: bool, group: Any) -> None:
    check_file(quantize(net(), bits, group=group, symmetric=symmetric), net())


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_masked_codes_take_their_smallest_form(bits: int, density: float) -> None:
    layer = nn.Linear(400, 10, bias=False)
    model = quantize(prune(layer, density), bits)
    save(model, FILE)
    twin = load(FILE, layer)
    assert torch.equal(twin.weight, model.weight)
    (mask,) = masks(model).values()
    assert torch.equal(next(iter(masks(twin).values())), mask)
    kept = mask.numpy().flatten()
    ways = {
        "bitmask": packed_size(bits, kept.sum()) + pack_bits(kept).size,
        "gaps": packed_size(bits, kept.sum()) + to_gaps(kept).size,
    }
    if torch.equal(model.weight != 0, mask):
        ways["nonzero"] = packed_size(bits, kept.size)
    if mask.all():
        ways = {"all": packed_size(bits, kept.size)}
    entry = json.loads(metadata()["compress"])["tensors"]["weight"]
    assert ways[entry["kept"]] == min(ways.values())
    assert sum(part.nbytes for name, part in parts_of("weight").items() if name != "scale") == min(ways.values())
    save(twin, AGAIN)
    assert AGAIN.read_bytes() == FILE.read_bytes()


def test_zeros_tell_what_a_dense_mask_keeps() -> None:
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.where(torch.rand(64, 64) < 0.5, 1.0, -2.0))
    model = quantize(prune(layer, 0.95), 2 + 1)  # each bit of a mask costs as much as a third of a code
    save(model, FILE)
    assert json.loads(metadata()["compress"])["tensors"]["weight"]["kept"] == "nonzero"
    twin = load(FILE, layer)
    assert torch.equal(masks(twin)["weight"], masks(model)["weight"])
    assert torch.equal(twin.weight, model.weight)


def test_a_masked_grid_without_a_zero() -> None:
    layer = nn.Linear(50, 40, bias=False)
    with torch.no_grad():
        layer.weight.copy_(ShiftGrid(3).nearest(9 * layer.weight))
    mask = torch.rand(40, 50) < 0.3
    attach(layer, "weight", mask)
    attach_low_bit(layer, "weight", ShiftGrid(3))
    save(layer, FILE)
    twin = load(FILE, nn.Linear(50, 40, bias=False))
    assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(twin.weight != 0, mask)
    assert parts_of("weight")["codes"].nbytes == math.ceil(3 * int(mask.sum()) / 8)
    state = {"weight": torch.ones(40, 50)}
    twin.load_state_dict(state)  # the mask still takes the weights of a plain model
    assert torch.equal(twin.weight, mask.float())


def test_latents_are_not_stored() -> None:
    model = dense_shift(net(), {"3": 3, "9": 4})
    plain_size = save(net(), FILE).stat().st_size
    assert save(model, FILE).stat().st_size < plain_size / 2
    assert save(freeze(model), AGAIN).read_bytes() == FILE.read_bytes()
    assert slots_of(model).keys() == slots_of(net()).keys() == read(FILE).stored.keys()


def test_sizes_and_bits_work_together() -> None:
    model = quantize(dense_shift(net(8), {"3": 2}), {"6": 4, "0": 3}, group=10)
    twin = check_file(model, net(32))
    assert (twin[3].in_channels, twin[3].groups, twin[6].in_channels) == (8, 2, 8)
    check_file(quantize(net(8), 4), dense_shift(net(32), {"3": 3}))


def test_what_was_loaded_trains_on_beside_its_codes() -> None:
    save(mixture(), FILE)
    model = load(FILE, net()).train()
    before = {name: value(model, name).clone() for name in weights(model)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    assert {name for name in before if torch.equal(before[name], value(model, name))} == {"3", "6", "9"}
    plain = finalize(model)
    assert not low_bits(plain)
    assert all(p.requires_grad for p in plain.parameters())
    assert same_weights(plain, model)


def test_a_plain_file_loads_into_a_frozen_model_and_trains() -> None:
    save(net(), FILE)
    twin = load(FILE, freeze(mixture()))
    assert not low_bits(twin) and not masks(twin)
    assert all(p.requires_grad for p in twin.parameters())
    assert twin.state_dict().keys() == net().state_dict().keys()


def test_copies_of_what_was_loaded_do_not_share() -> None:
    save(mixture(), FILE)
    module = mixture()
    before = copy.deepcopy(module.state_dict())
    one, two = load(FILE, module), load(FILE, module)
    three = copy.deepcopy(one)
    plain = finalize(one)
    assert low_bits(one).keys() == low_bits(two).keys() == low_bits(three).keys() == {"3", "6", "9"}
    assert not low_bits(plain)
    weights(three)["3"].parameter.data.fill_(1)
    assert same_weights(one, two) and not same_weights(one, three)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert same_weights(load(FILE, module), one), "the file's own memory was not changed"


def test_a_layer_with_two_names_is_stored_once() -> None:
    layer = quantize(nn.Linear(12, 12), 4)
    save(nn.Sequential(layer, layer), FILE)
    assert len(parts_of("1.weight")) == 0
    twin = load(FILE, nn.Sequential(*[nn.Linear(12, 12)] * 2))
    assert twin[0] is twin[1]
    assert torch.equal(twin[0].weight, layer.weight)
    loose = load(FILE, nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)))
    assert torch.equal(loose[1].weight, layer.weight)
    assert loose[0].weight.data_ptr() != loose[1].weight.data_ptr()
    assert low_bit_of(loose[0], "weight") is not low_bit_of(loose[1], "weight") is not None


def test_tied_parameters_keep_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.other = nn.Linear(8, 8)
            self.head.weight = self.embed.weight

    model = quantize(Tied(), {"other": 4})
    save(model, FILE)
    twin = load(FILE, Tied())
    assert twin.head.weight is twin.embed.weight
    assert torch.equal(twin.other.weight, model.other.weight)


def test_attention_of_few_bits() -> None:
    attention = quantize(nn.MultiheadAttention(8, 2), 4)
    assert set(low_bits(attention)) == {"in_proj_weight", "out_proj"}
    save(attention, FILE)
    x = torch.rand(3, 1, 8)
    twin = load(FILE, nn.MultiheadAttention(8, 2))
    assert torch.equal(twin(x, x, x)[0], attention(x, x, x)[0])


def test_the_layout_in_memory_is_kept() -> None:
    model = freeze(mixture()).to(memory_format=torch.channels_last)
    x = X.contiguous(memory_format=torch.channels_last)
    save(model, FILE)
    twin = load(FILE, net())
    for layer in ("0", "3", "6"):
        assert value(twin, layer).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(value(twin, layer), value(model, layer))
    assert torch.equal(twin(x), model(x))
    save(freeze(mixture()), FILE)
    assert load(FILE, model)[3].weight.is_contiguous()


SPACE = NASBench201(channels=4, cells=1, classes=10, in_channels=3)
ARCH = SPACE.parse("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|nor_conv_1x1~1|none~2|")


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_networks_of_our_spaces_need_no_module(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(5)
    model = quantize(prune(mark(SPACE.build(ARCH), SPACE, ARCH), 0.2), 4).eval()
    save(wrap(model), FILE)
    twin = load(FILE)
    assert same_weights(twin, model)
    assert torch.equal(twin(X), model(X))
    assert origin_of(twin) == origin_of(model)
    assert same_weights(load(FILE, wrap(SPACE.build(ARCH))), model)


def test_other_types_than_float32_are_refused_before_anything_is_written() -> None:
    model = freeze(dense_shift(net(), {"3": 3})).half()
    with pytest.raises(CompressionError, match=r"'3.weight' has few bits and is torch.float16; call model.float\(\)"):
        save(model, FILE)
    assert not FILE.exists()


@pytest.mark.parametrize("make", [lambda m: quantize(m, 4), lambda m: dense_shift(m, {"3": 4}), lambda m: mixture()])
def test_weights_that_left_their_grid_are_named_and_not_written(make: Callable[[nn.Module], nn.Module]) -> None:
    save(make(net()), FILE)
    before = FILE.read_bytes()
    model = load(FILE, net()).requires_grad_(True)  # all, as one unfreezes a network
    model(X).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(CompressionError, match=r"'\d\.weight': a .* has left its grid, by training"):
        save(model, FILE)
    assert FILE.read_bytes() == before
    plain = finalize(model)
    assert same_weights(load(save(plain, FILE), net()), plain)


def test_the_wrong_module_is_refused() -> None:
    save(mixture(), FILE)
    with pytest.raises(CompressionError, match=r"does not fit the module: .*'12.weight' only in the module"):
        load(FILE, nn.Sequential(*net(), nn.ReLU(), nn.Linear(2, 2)))
    save(quantize(nn.Sequential(nn.Conv2d(4, 4, 3)), 4), FILE)
    with pytest.raises(CompressionError, match="'0.weight' is 4 x 4 x 3 x 3 in the file .*groups=1.* cannot be given"):
        load(FILE, nn.Sequential(nn.Conv2d(4, 4, 5)))


# Versions, and files that are not what they seem.


def metadata() -> dict[str, str]:
    with safe_open(FILE, "pt") as file:
        return dict(file.metadata())


def sealed(header: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    """Write a file by hand, with the checksum that it must have."""
    text = json.dumps(header)
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype} {tuple(arrays[name].shape)}\n".encode())
        digest.update(arrays[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    save_file(arrays, FILE, metadata={"compress": text, "sha256": digest.hexdigest()})


def test_files_of_version_1_are_read_and_only_codes_need_version_2() -> None:
    tensors = {
        "0.weight": {"masked": True, "encoding": "bitmask", "shape": [2, 4]},
        "0.bias": {"encoding": "dense"},
        "1.weight": {"encoding": "gaps", "shape": [1, 300]},
        "2.weight": {"same": "0.weight"},
        "2.bias": {"masked": True, "encoding": "dense"},
    }
    arrays = {
        "0.weight/values": torch.tensor([1.0, 2.0, 3.0]),
        "0.weight/mask": torch.tensor([0b10001001], dtype=torch.uint8),
        "0.bias": torch.tensor([5.0, 6.0]),
        "1.weight/values": torch.tensor([7.0]),
        "1.weight/gaps": torch.tensor([255, 5], dtype=torch.uint8),
        "2.bias": torch.tensor([8.0, 9.0]),
    }
    sealed({"version": 1, "tensors": tensors}, arrays)
    model = load(FILE, nn.Sequential(nn.Linear(4, 2), nn.Linear(300, 1, bias=False), nn.Linear(4, 2)))
    assert model[0].weight.tolist() == model[2].weight.tolist() == [[1, 0, 0, 2], [0, 0, 0, 3]]
    assert masks(model)["0"].tolist() == [[True, False, False, True], [False, False, False, True]]
    assert model[1].weight.nonzero().tolist() == [[0, 260]] and model[1].weight[0, 260] == 7
    assert model[0].bias.tolist() == [5, 6]
    for one, version in ((prune(net(), 0.5), 1), (mixture(), 2)):
        save(one, FILE)
        assert json.loads(metadata()["compress"])["version"] == read(FILE).version == version


def test_every_flipped_bit_is_noticed() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 4, bias=False))
    save(quantize(prune(module, {"0": 0.2}), {"0": 3, "1": 5}, symmetric=False), FILE)
    data = FILE.read_bytes()
    load(FILE, module)
    rng = random.Random(0)
    for place in rng.sample(range(len(data)), 250):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        FILE.write_bytes(damaged)
        with pytest.raises(CompressionError):
            load(FILE, module)


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda header, arrays: header["tensors"][name].update(fields)


def array(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda header, arrays: arrays.update({name: change(arrays[name]).contiguous()})


def without(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda header, arrays: arrays.update(dict.fromkeys([], arrays.pop(name)))


TAMPERED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "newer": (lambda header, _: header.update(version=3), "has format 3, this version reads up to 2. Update"),
    "kind": (entry("0.weight", kind="os.system"), "'0.weight': there is no kind 'os.system' of low-bit weights"),
    "kind list": (entry("0.weight", kind=[]), "'0.weight': its entry makes no sense"),
    "other kind": (entry("1.weight", kind="shift"), "'1.weight': a shift grid has nothing but its bits"),
    "no scale": (entry("0.weight", kind="affine"), "'0.weight': a grid .* needs 20 scales"),
    "bits": (entry("0.weight", bits=4), "'0.weight': 750 bytes of codes for 2000 of 4 bits"),
    "no bits": (entry("0.weight", bits=0), "'0.weight': 0 is no size"),
    "many bits": (entry("0.weight", bits=2**20), "'0.weight': 750 bytes of codes for 2000 of 1048576 bits"),
    "text": (entry("0.weight", bits="3"), "'0.weight': '3' is no size"),
    "huge": (entry("0.weight", shape=[2**30, 2**30]), "'0.weight': 750 bytes of codes for"),
    "turned": (
        entry("0.weight", shape=[100, 20]),
        "'0.bias' is 20 in the file and 20 in the module, a Linear that cannot",
    ),
    "axes": (entry("1.weight", shape=[600]), "'1.weight': (50|75|38) bytes of codes|'1.weight': "),
    "grid": (entry("1.weight", grid={"group": -1}), "'1.weight': group is None for"),
    "grid list": (entry("1.weight", grid=[1]), "'1.weight': its entry makes no sense"),
    "grid more": (entry("1.weight", grid={"more": 1}), "'1.weight': a grid of evenly spaced values has no 'more'"),
    "kept": (entry("1.weight", kept="some"), "'1.weight': 'some' does not say which"),
    "kept none": (entry("1.weight", kept=None), "'1.weight': None does not say which"),
    "kept list": (entry("1.weight", kept=["gaps"]), "does not say which"),
    "kept other": (entry("1.weight", kept="bitmask"), "'1.weight': it has the arrays codes, gaps, not codes, mask"),
    "kept all": (entry("1.weight", kept="all"), "'1.weight': it has the arrays codes, gaps, not codes"),
    "sparse": (entry("0.weight", kept="gaps"), "'0.weight': it has the arrays codes, not codes, gaps"),
    "few codes": (array("0.weight/codes", lambda x: x[:-1]), "'0.weight': 749 bytes of codes for 2000 of 3 bits"),
    "wide codes": (array("0.weight/codes", lambda x: x.to(torch.int16)), "'0.weight': 750 bytes of codes"),
    "square": (array("0.weight/codes", lambda x: x.view(10, 75)), "'0.weight': 750 bytes of codes"),
    "no codes": (without("0.weight/codes"), "'0.weight': it has the arrays none, not codes"),
    "gaps": (array("1.weight/gaps", lambda x: x[:-2]), "'1.weight': "),
    "gaps over": (array("1.weight/gaps", lambda x: torch.full_like(x, 254)), "'1.weight': the gaps run over"),
    "wide gaps": (array("1.weight/gaps", lambda x: x.to(torch.int16)), "'1.weight': its arrays are of another kind"),
    "scale": (array("1.weight/scale", lambda x: -x), "'1.weight': a scale is not a normal positive number"),
    "scales": (array("1.weight/scale", lambda x: x[:-1]), "'1.weight': a grid .* needs 10 scales"),
    "more": (
        lambda _, arrays: arrays.update({"0.weight/more": torch.zeros(3)}),
        "'0.weight': a shift grid has nothing",
    ),
    "dense": (entry("0.weight", encoding="dense"), "'0.weight': it has the arrays 0.weight/codes, not"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_files_are_refused(case: str) -> None:
    module = nn.Sequential(nn.Linear(100, 20), nn.Linear(20, 10))
    model = quantize(prune(dense_shift(module, {"0": 3}), {"1": 0.1}), {"1": 4})
    save(model, FILE)
    header = json.loads(metadata()["compress"])
    with safe_open(FILE, "pt") as file:
        arrays = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    sealed(header, arrays)
    assert same_weights(load(FILE, module), model), "the checksum is what the test takes it for"
    change, message = TAMPERED[case]
    change(header, arrays)
    sealed(header, arrays)
    with pytest.raises(CompressionError, match=message):
        load(FILE, module)


def test_grids_come_back_with_their_settings() -> None:
    model = quantize(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)), 5, group=7, symmetric=False)
    save(model, FILE)
    step: LowBit | None = low_bit_of(load(FILE, nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)))[0], "weight")
    own = low_bit_of(model[0], "weight")
    assert isinstance(step, AffineGrid) and isinstance(own, AffineGrid)
    assert step.layout == own.layout
    assert torch.equal(step.scale, own.scale) and torch.equal(step.zero, own.zero)
