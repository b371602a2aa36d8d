"""Files: sizes as claimed, values bit for bit, other shapes, networks of our spaces, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from compress.errors import CompressionError
from compress.filling import slots_of
from compress.pruning import finalize, masks, prune
from compress.storage import load, read, save
from compress.weights import weights
from nasbench.origin import mark, origin_of
from search_spaces import DARTS, NASBench201
from search_spaces.masks import attach

FILE = Path("model.safetensors")
SPACE = NASBench201(channels=4, cells=1, classes=10, in_channels=3)
ARCH = SPACE.parse("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|nor_conv_1x1~1|none~2|")
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(width: int = 16, groups: int = 1) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.PReLU(width),
        nn.Conv2d(width, width, 3, padding=1, groups=groups),
        nn.GroupNorm(2, width),
        nn.Flatten(),
        nn.Linear(width * 36, 10),
        nn.LayerNorm(10),
    ).eval()


def equal(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    same = all(torch.equal(a, states[1][name]) and a.dtype == states[1][name].dtype for name, a in states[0].items())
    return same and states[0].keys() == states[1].keys()


def claimed(model: nn.Module) -> int:
    """Bytes of a model's numbers: masked weights as kept values with one bit an entry, or one byte a kept entry."""
    masked = masks(model)
    found = weights(model)
    stored = {id(p): p for p in [*model.parameters(), *model.buffers()] if p.dtype != torch.bool}
    total = sum(p.numel() * p.element_size() for p in stored.values())
    for name, mask in masked.items():
        kept, size = int(mask.sum()), found[name].size
        ends = [-1, *mask.flatten().nonzero().flatten().tolist(), size]
        gaps = kept + sum((b - a - 1) // 255 for a, b in pairwise(ends))
        total += 4 * kept + min((size + 7) // 8, gaps) - 4 * size if kept < size else 0
    return total


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("density", [0.01, 0.05, 0.3, 0.9, 1.0])
def test_files_are_as_small_as_claimed_and_read_back_bit_for_bit(density: float) -> None:
    model = prune(net(), density, distribution="uniform")
    assert save(model, FILE) == FILE
    assert FILE.stat().st_size == header_bytes(FILE) + claimed(model)
    for module in (net(16), net(18), model, prune(net(16), 0.5)):
        twin = load(FILE, module)
        assert equal(twin, model)
        assert torch.equal(twin(X), model(X))
    assert masks(load(FILE, net())).keys() == masks(model).keys()


@pytest.mark.slow
def test_a_resnet_at_five_percent_has_a_sixteenth_of_its_bytes() -> None:
    from torchvision.models import resnet18

    model = resnet18().eval()
    sparse = prune(model, 0.05)
    dense_size = save(model, "dense.safetensors").stat().st_size
    size = save(sparse, FILE).stat().st_size
    assert size == header_bytes(FILE) + claimed(sparse)
    assert 46_700_000 < dense_size < 46_900_000
    assert size < 2_950_000
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(load(FILE, model)(x), sparse(x))


def test_each_weight_takes_its_smallest_encoding() -> None:
    model = prune(net(), {"0": 1.0, "3": 0.4, "6": 0.05})
    save(model, FILE)
    contents = read(FILE)
    stored, origin = contents.stored, contents.origin
    assert origin is None
    assert {name: stored[f"{name}.weight"].encoding for name in ("0", "1", "3", "6")} == {
        "0": "dense",
        "1": "dense",
        "3": "bitmask",
        "6": "gaps",
    }
    assert stored["0.weight"].mask is not None
    assert stored["0.weight"].mask.all()
    assert stored["1.weight"].mask is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_values_of_any_kind_are_bit_exact(dtype: torch.dtype, share: float) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(40, 30) * 10).to(dtype)
    mask = torch.rand(40, 30) < share
    layer = nn.Linear(30, 40, bias=False)
    layer.weight.data = torch.zeros(40, 30, dtype=dtype)
    layer.weight.data[mask] = weight[mask]
    save(layer, FILE)
    twin = load(FILE, nn.Linear(30, 40, bias=False))
    assert twin.weight.dtype == dtype
    assert FILE.stat().st_size - header_bytes(FILE) < layer.weight.numel() * dtype.itemsize
    assert torch.equal(twin.weight.view(torch.uint8), layer.weight.view(torch.uint8))


def test_odd_numbers_survive_and_a_kept_zero_stays_kept() -> None:
    layer = nn.Linear(100, 1, bias=False)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45, -0.0, 0.0])
    layer.weight.data[0, :6] = odd
    attach(layer, "weight", torch.arange(100).view(1, 100) < 6)
    save(layer, FILE)
    twin = load(FILE, nn.Linear(100, 1, bias=False))
    assert torch.equal(twin.weight.view(torch.int32), layer.weight.view(torch.int32).where(torch.arange(100) < 6, 0))
    (mask,) = masks(twin).values()
    assert mask.sum() == 6


def test_what_an_optimizer_moved_under_a_mask_is_not_stored() -> None:
    layer = nn.Linear(8, 8, bias=False)
    attach(layer, "weight", torch.eye(8, dtype=torch.bool))
    layer.parametrizations.weight.original.data += 1  # type: ignore[union-attr, operator]
    save(layer, FILE)
    twin = load(FILE, layer)
    assert torch.equal(twin.weight, layer.weight)
    assert int(twin.parametrizations.weight.original.count_nonzero()) == 8  # type: ignore[union-attr, operator]


def test_finalized_models_are_as_small_and_get_no_masks() -> None:
    model = prune(net(), 0.05)
    size = save(model, FILE).stat().st_size
    plain = finalize(model)
    assert save(plain, "plain.safetensors").stat().st_size < size + 200
    twin = load("plain.safetensors", model)
    assert equal(twin, plain)
    assert not masks(twin)


def test_training_goes_on_with_the_masks() -> None:
    save(prune(net(), 0.1), FILE)
    model = load(FILE, net()).train()
    before = {name: mask.clone() for name, mask in masks(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    own = weights(model)
    for name, mask in before.items():
        weight = getattr(own[name].module, own[name].attribute)
        assert torch.equal(masks(model)[name], mask)
        assert not weight[~mask].any()
    assert load(FILE, model).training  # the mode is the module's


def test_the_module_stays_as_it_is() -> None:
    save(prune(net(18), 0.1), FILE)
    module = net(16)
    before = copy.deepcopy(module.state_dict())
    load(FILE, module)
    with pytest.raises(CompressionError, match="does not fit the module"):
        load(FILE, nn.Sequential(module, nn.Linear(2, 2)))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_shared_tensors_are_stored_once_and_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self, tie: bool = True) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.again = self.head
            if tie:
                self.head.weight = self.embed.weight

    save(Tied(), FILE)
    assert FILE.stat().st_size == header_bytes(FILE) + 50 * 8 * 4
    twin = load(FILE, Tied())
    assert twin.head.weight is twin.embed.weight
    assert twin.again is twin.head
    loose = load(FILE, Tied(tie=False))
    assert torch.equal(loose.head.weight, loose.embed.weight)
    assert loose.head.weight.data_ptr() != loose.embed.weight.data_ptr()
    save(Tied(tie=False), FILE)
    with pytest.raises(
        CompressionError, match=r"'embed.weight' and 'head.weight' are one tensor in the module and two"
    ):
        load(FILE, Tied())


def test_a_layer_with_two_names_keeps_one_mask() -> None:
    layer = nn.Linear(6, 6)
    attach(layer, "weight", torch.eye(6, dtype=torch.bool))
    save(nn.Sequential(layer, layer), FILE)
    twin = load(FILE, nn.Sequential(*[nn.Linear(6, 6)] * 2))
    assert twin[0] is twin[1]
    assert torch.equal(twin[0].weight, layer.weight)


def test_layers_are_given_their_stored_sizes() -> None:
    for width, groups in ((8, 8), (24, 1), (24, 4)):
        model = net(width, groups)
        save(prune(model, 0.3), FILE)
        twin = load(FILE, net(16, groups=16))
        assert torch.equal(twin(X), prune(model, 0.3)(X))
        assert (twin[3].in_channels, twin[3].out_channels, twin[3].groups) == (width, width, groups)
        assert (twin[1].num_features, twin[2].num_parameters, twin[4].num_channels) == (width, width, width)
        assert (twin[0].out_channels, twin[6].in_features) == (width, width * 36)


def test_groups_are_stored_where_shapes_do_not_tell() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4))
    save(model, FILE)
    x = torch.rand(1, 4, 2, 2)
    assert torch.equal(load(FILE, nn.Sequential(nn.Conv2d(1, 4, 1)))(x), model(x))


@pytest.mark.parametrize(
    ("old", "new", "x"),
    [
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose2d(8, 10, 3, groups=2), torch.rand(1, 8, 4, 4)),
        (nn.Conv1d(4, 6, 3), nn.Conv1d(2, 3, 3), torch.rand(1, 2, 9)),
        (nn.Embedding(5, 4), nn.Embedding(7, 3), torch.tensor([6])),
        (nn.LayerNorm((4, 5)), nn.LayerNorm((2, 3)), torch.rand(1, 2, 3)),
        (nn.RMSNorm(4), nn.RMSNorm(3), torch.rand(1, 3)),
        (nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(3, affine=False), torch.rand(2, 3)),
        (nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(3, affine=True), torch.rand(2, 3, 2, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_kinds_of_layers_are_given_sizes_too(old: nn.Module, new: nn.Module, x: Tensor) -> None:
    save(new.eval(), FILE)
    twin = load(FILE, old.eval())
    assert torch.equal(twin(x), new(x))
    assert str(twin) == str(new)


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        (nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, 3)),  # its padding would be a guess
        (nn.GroupNorm(4, 8), nn.GroupNorm(2, 6)),
        (nn.MultiheadAttention(8, 2), nn.MultiheadAttention(4, 2)),
        (nn.Embedding(8, 2, padding_idx=7), nn.Embedding(4, 2)),
        (nn.LSTM(4, 4), nn.LSTM(4, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sizes_that_nothing_tells_are_refused(module: nn.Module, stored: nn.Module) -> None:
    save(stored, FILE)
    with pytest.raises(CompressionError, match="in the file.* and .* in the module, a .* cannot be given") as error:
        load(FILE, module)
    assert ("(groups=1)" in str(error.value)) == isinstance(module, nn.Conv2d)


def test_attention_and_recurrence_are_stored() -> None:
    attention = prune(nn.MultiheadAttention(8, 2), 0.5)
    save(attention, FILE)
    x = torch.rand(3, 1, 8)
    assert torch.equal(load(FILE, nn.MultiheadAttention(8, 2))(x, x, x)[0], attention(x, x, x)[0])
    lstm = nn.LSTM(4, 4)
    save(lstm, FILE)
    assert torch.equal(load(FILE, nn.LSTM(4, 4))(x[..., :4])[0], lstm(x[..., :4])[0])


def test_other_parametrizations_are_stored_as_they_are() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    save(layer, FILE)
    assert equal(load(FILE, parametrizations.weight_norm(nn.Linear(4, 4))), layer)


def test_the_layout_in_memory_is_kept() -> None:
    model = prune(net(), 0.3).to(memory_format=torch.channels_last)
    save(model, FILE)
    twin = load(FILE, net())
    assert twin[3].weight.is_contiguous(memory_format=torch.channels_last)
    x = X.contiguous(memory_format=torch.channels_last)
    assert torch.equal(twin(x), model(x))
    save(prune(net(), 0.3), FILE)
    assert load(FILE, model)[3].weight.is_contiguous()


@pytest.mark.parametrize("supernet", [None, {}])
def test_networks_of_our_spaces_need_no_module(supernet: dict[str, Any] | None) -> None:
    torch.manual_seed(5)
    fresh = SPACE.build(ARCH) if supernet is None else SPACE.supernet().extract(ARCH)
    model = prune(mark(fresh, SPACE, ARCH, supernet), 0.2).eval()
    save(model, FILE)
    state = torch.random.get_rng_state()
    twin = load(FILE)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert equal(twin, model)
    assert not twin.training
    assert torch.equal(twin(X), model(X))
    assert origin_of(twin) == origin_of(model)
    assert not any(t.is_meta for t in [*twin.parameters(), *twin.buffers()])
    assert all(p.requires_grad for p in twin.parameters())


def test_a_network_of_our_spaces_may_have_other_widths() -> None:
    space = DARTS(channels=4, cells=3, classes=4, in_channels=3)
    arch = space.sample(random.Random(0))
    wide = DARTS(channels=8, cells=3, classes=4, in_channels=3)
    model = mark(wide.build(arch), space, arch).eval()  # as a widened or pruned network has them
    save(model, FILE)
    assert torch.equal(load(FILE)(X), model(X))


def test_other_networks_need_a_module() -> None:
    save(net(), FILE)
    with pytest.raises(CompressionError, match=r"names no network of our spaces: load\(path, module\)"):
        load(FILE)


def test_another_network_than_the_named_is_refused() -> None:
    save(mark(net(), SPACE, ARCH), FILE)
    with pytest.raises(CompressionError, match="does not fit the module: '0.weight', .* only in the file"):
        load(FILE)
    assert equal(load(FILE, net(16)), net())


class Extra(nn.Module):
    def get_extra_state(self) -> Any:
        return {"anything": 1}


def test_what_is_no_tensor_cannot_be_saved() -> None:
    cases: list[tuple[nn.Module, str]] = [
        (nn.Sequential(Extra()), r"'0' \(Extra\) has an extra state"),
        (nn.Linear(2, 2, device="meta"), "'weight' has no numbers to store"),
        (nn.LazyLinear(2), "'weight' has no numbers to store"),
    ]
    for model, message in cases:
        with pytest.raises(CompressionError, match=message):
            save(model, FILE)
        assert not FILE.exists()


def test_a_failed_save_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    save(net(), FILE)
    before = FILE.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.storage.save_file", full)
    with pytest.raises(OSError, match="cannot write .*model.safetensors: No space left"):
        save(net(18), FILE)
    assert FILE.read_bytes() == before
    assert [path.name for path in Path().iterdir()] == [FILE.name]


# Files that are not what they seem.


def test_other_files_are_refused() -> None:
    with pytest.raises(CompressionError, match="cannot read nothing.safetensors: .*[Nn]o such file"):
        load("nothing.safetensors", net())
    Path("text").write_text("hello")
    Path("empty").touch()
    torch.save({"a": torch.zeros(3)}, "pickle.pt")
    for path in ("text", "empty"):
        with pytest.raises(CompressionError, match=f"{path} is damaged, or no safetensors file"):
            load(path, net())
    save_file({"a": torch.zeros(3)}, "plain.safetensors")
    with pytest.raises(CompressionError, match=r"pickle.pt was not .* but by torch.save: read it with torch.load, put"):
        load("pickle.pt", net())
    with pytest.raises(CompressionError, match=r"of another kind. Read it with safetensors.torch.load_file, put"):
        load("plain.safetensors", net())
    with pytest.raises(CompressionError, match="cannot read .: it is a folder"):
        load(".", net())


def test_swapped_arguments_are_named() -> None:
    with pytest.raises(CompressionError, match=r"load\(path, module\) takes the file first, .* got Linear and str"):
        load(nn.Linear(2, 2), "model.safetensors")  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"load\(path, module\) .* got str and str"):
        load("model.safetensors", "model.safetensors")  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"save\(model, path\) takes the model first, got a str"):
        save("model.safetensors", nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"save\(model, path\) takes the file second, got a NoneType"):
        save(nn.Linear(2, 2), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_wrapped_models_are_stored_by_their_own_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = prune(mark(SPACE.build(ARCH), SPACE, ARCH), 0.2).eval()
    save(wrap(model), FILE)
    assert read(FILE).stored.keys() == slots_of(model).keys()
    assert equal(load(FILE), model)  # it still names its network
    assert equal(load(FILE, wrap(SPACE.build(ARCH))), model)


def test_truncated_files_are_refused() -> None:
    save(prune(net(), 0.1), FILE)
    data = FILE.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        FILE.write_bytes(data[:length])
        with pytest.raises(CompressionError, match="is damaged, or no safetensors file"):
            load(FILE, net())
    FILE.write_bytes(data + b"\0")
    with pytest.raises(CompressionError, match="is damaged, or no safetensors file"):
        load(FILE, net())


def test_every_flipped_bit_is_noticed() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 4, bias=False))
    save(prune(module, 0.1), FILE)
    data = FILE.read_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(len(data)), 400):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        FILE.write_bytes(damaged)
        with pytest.raises(CompressionError):
            load(FILE, module)


def tamper(change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change a file's header and arrays, and give it the checksum that it then must have."""
    with safe_open(FILE, "pt") as file:
        header = json.loads(file.metadata()["compress"])
        arrays = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(header, arrays)
    text = json.dumps(header)
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype} {tuple(arrays[name].shape)}\n".encode())
        digest.update(arrays[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    save_file(arrays, FILE, metadata={"compress": text, "sha256": digest.hexdigest()})


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda header, arrays: header["tensors"][name].update(fields)


def array(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda header, arrays: arrays.update({name: change(arrays[name]).contiguous()})


def without(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda header, arrays: arrays.update(dict.fromkeys([], arrays.pop(name)))


TAMPERED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "newer": (lambda header, _: header.update(version=3), "has format 3, this version reads up to 2. Update"),
    "older": (lambda header, _: header.update(version=0), "its header makes no sense"),
    "text": (lambda header, _: header.update(version="2"), "its header makes no sense"),
    "no tensors": (lambda header, _: header.pop("tensors"), "its header makes no sense"),
    "list": (lambda header, _: header.update(tensors=[]), "its header makes no sense"),
    "no entry": (lambda header, _: header["tensors"].pop("0.weight"), "nothing says what its arrays of '0.weight' are"),
    "null entry": (lambda header, _: header["tensors"].update({"0.weight": None}), "'0.weight': its entry makes no"),
    "empty entry": (lambda header, _: header["tensors"].update({"0.weight": {}}), "'0.weight': its entry makes no"),
    "code": (entry("0.weight", encoding="os.system"), "its encoding 'os.system' is not known"),
    "no name": (entry("0.weight", encoding=["gaps"]), "'0.weight': its entry makes no sense"),
    "other": (
        entry("0.weight", encoding="bitmask"),
        "'0.weight': it has the arrays 0.weight/gaps, 0.weight/values, not",
    ),
    "as dense": (entry("0.weight", encoding="dense"), "'0.weight': it has the arrays"),
    "same": (entry("0.weight", same="9.weight"), "'0.weight': its entry makes no sense"),
    "negative": (entry("0.weight", shape=[-20, -100]), "'0.weight': -20 is no size"),
    "fraction": (entry("0.weight", shape=[20.0, 100]), "'0.weight': 20.0 is no size"),
    "true": (entry("0.weight", shape=[True, 2000]), "'0.weight': True is no size"),
    "no list": (entry("0.weight", shape=2000), "'0.weight': its entry makes no sense"),
    "nested": (entry("0.weight", shape=[[2000]]), "is no size"),
    "long axis": (entry("0.weight", shape=[2**62, 2**62]), "is no size"),
    "huge": (entry("0.weight", shape=[2**30, 2**30]), "the gaps run over"),
    "huge bits": (entry("1.weight", shape=[2**30, 2**30]), "bytes of mask for"),
    "smaller": (entry("0.weight", shape=[10, 100]), "'0.weight': the gaps run over"),
    "bits": (entry("1.weight", shape=[10, 19]), r"'1.weight': (25 bytes of mask for 190|bits are set after)"),
    "groups": (entry("0.weight", groups=0), "'0.weight': 0 is no size"),
    "few values": (array("0.weight/values", lambda x: x[:-1]), "'0.weight': 99 values for 100 kept entries"),
    "many values": (array("1.weight/values", lambda x: torch.cat([x, x])), "'1.weight': .* values for .* kept entries"),
    "square": (array("0.weight/values", lambda x: x.view(10, 10)), "'0.weight': its arrays are of another kind"),
    "wide gaps": (array("0.weight/gaps", lambda x: x.to(torch.int16)), "'0.weight': its arrays are of another kind"),
    "gaps over": (array("0.weight/gaps", lambda x: torch.full_like(x, 254)), "'0.weight': the gaps run over 25500 ent"),
    "escapes": (array("0.weight/gaps", lambda x: torch.full_like(x, 255)), "'0.weight': the gaps run over 25500 entr"),
    "less gaps": (array("0.weight/gaps", lambda x: x[:50]), "'0.weight': "),
    "gone": (without("0.weight/values"), "'0.weight': it has the arrays 0.weight/gaps, not"),
    "more": (lambda _, arrays: arrays.update(more=torch.zeros(3)), "nothing says what its arrays of '' are"),
    "bias": (array("0.bias", lambda x: x[:3]), "'0.bias' is 3 in the file and 20 in the module"),
    "origin": (
        lambda header, _: header.update(origin={"space": {"space": "os:system"}}),
        "cannot be built: 'os:system'",
    ),
    "no space": (
        lambda header, _: header.update(origin={"space": "os:system", "arch": {}, "supernet": None}),
        "model.safetensors names cannot be built",
    ),
    "strides": (
        lambda header, arrays: (
            entry("0.weight", shape=[0, *[2**31 - 1] * 3])(header, arrays),
            [arrays.update({name: arrays[name][:0]}) for name in ("0.weight/gaps", "0.weight/values")],
        ),
        "'0.weight': its entry makes no sense",
    ),
    "whole numbers": (array("0.bias", lambda x: x.long()), "'0.bias' is torch.int64 in the file and torch.float32 in"),
    "no origin": (lambda header, _: header.update(origin=[1]), "cannot be built: this is no network of our spaces"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_files_are_refused(case: str) -> None:
    module = nn.Sequential(nn.Linear(100, 20), nn.Linear(20, 10))
    model = prune(module, {"0": 0.05, "1": 0.5})
    save(model, FILE)
    tamper(lambda header, arrays: None)
    assert equal(load(FILE, module), model), "the checksum is what the test takes it for"
    change, message = TAMPERED[case]
    tamper(change)
    with pytest.raises(CompressionError, match=message) as caught:
        load(FILE, module)
    assert ".. " not in str(caught.value)


def test_deep_json_is_refused() -> None:
    save_file({"a": torch.zeros(3)}, FILE, metadata={"compress": "[" * 100_000, "sha256": ""})
    with pytest.raises(CompressionError, match="its header makes no sense"):
        load(FILE, net())


def test_groups_that_do_not_fit_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 1))
    save(module, FILE)
    tamper(entry("0.weight", groups=3))
    with pytest.raises(CompressionError, match=r"\(groups=3\) and .* in the module, a Conv2d that cannot be given it"):
        load(FILE, module)


def test_a_named_network_takes_no_more_memory_than_its_file_says() -> None:
    model = mark(SPACE.build(ARCH), SPACE, ARCH).eval()
    save(model, FILE)
    tamper(lambda header, _: header["origin"]["space"].update(channels=1_000_000))  # 10 TB of weights
    assert equal(load(FILE), model)
    tamper(lambda header, _: header["origin"]["space"].update(classes=None))
    with pytest.raises(CompressionError, match="cannot be built: NASBench201 does not know classes"):
        load(FILE)
    tamper(lambda header, _: header["origin"]["space"].update(classes=10, cells=3))
    with pytest.raises(
        CompressionError, match="does not fit the module: nothing only in the file, .* more only in the"
    ):
        load(FILE)


def test_deployed_networks_are_read_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no safetensors")
    with pytest.raises(CompressionError, match=r"a deployed network is Deployed.load"):
        read(path)
