"""Reports: figures of the file, claims about masks, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.errors import CompressionError
from compress.pruning import finalize, prune
from compress.reporting import Report, report
from compress.storage import save
from nasbench.errors import SettingError
from nasbench.origin import mark
from nasbench.profile import Latency
from search_spaces import NASBench201

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
QUICK = 0.002
MASKS_ONLY = "masks only: smaller when packed, no faster on this device"


def net(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def test_a_pruned_model_is_reported_from_its_file() -> None:
    model = net()
    sparse = prune(model, 0.1, distribution="uniform").eval()
    save(sparse, "sparse.safetensors")
    before = copy.deepcopy(model.state_dict())
    result = report("sparse.safetensors", example=X, baseline=model, min_seconds=QUICK)
    # 3 x 32 x 9 weights of the convolution on 64 pixels, 320 of the linear layer; two numbers a channel and 10 biases
    assert (result.params, result.weights) == (864 + 320 + 64 + 10, 864 + 320)
    assert (result.nonzeros, result.density) == (86 + 32, 118 / 1184)
    assert (result.macs, result.kept_macs) == (864 * 64 + 320, 86 * 64 + 32)
    assert result.bytes == Path("sparse.safetensors").stat().st_size
    assert result.note == MASKS_ONLY
    assert result.baseline is not None
    assert result.baseline.bytes == save(model, "dense.safetensors").stat().st_size
    assert (result.baseline.nonzeros, result.baseline.note, result.baseline.baseline) == (1184, "", None)
    with torch.no_grad():
        assert (
            result.max_difference
            == float((sparse(X).double() - copy.deepcopy(model).eval()(X).double()).abs().max())
            > 0
        )
    for latency in (result.latency, result.baseline.latency):
        assert latency is not None
        assert latency.median_ms > 0
        assert (latency.batch, latency.device, latency.threads) == (4, "cpu", torch.get_num_threads())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_prints_as_a_table_and_gives_its_numbers() -> None:
    result = report(prune(net(), 0.1), example=X, baseline=net(), min_seconds=QUICK)
    lines = str(result).splitlines()
    assert lines[0].split() == ["model", "baseline", "ratio"]
    assert [line.split()[0] for line in lines[1:10]] == [
        *("params", "weights", "nonzeros", "bytes", "macs", "kept_macs", "density", "bits_per_weight", "latency")
    ]
    assert lines[2].split() == ["weights", "1,184", "1,184", "1.0000"]
    assert len({len(line) for line in lines[:10]}) == 1
    assert lines[-1] == MASKS_ONLY
    assert "latency: dense kernels, batch 4, cpu" in str(result)
    numbers = result.to_dict()
    assert numbers["density"] == result.density
    assert numbers["baseline_weights"] == 1184
    assert numbers["max_difference"] == result.max_difference
    assert result.latency is not None
    assert numbers["latency_ms"] == result.latency.median_ms
    alone = report(net(), example=X, min_seconds=QUICK)
    assert alone.baseline is alone.max_difference is None
    assert "ratio" not in str(alone)
    assert not any(name.startswith("baseline") or name == "max_difference" for name in alone.to_dict())


def test_without_an_example_only_sizes_are_reported() -> None:
    result = report(prune(net(), 0.1), baseline=net())
    assert result.nonzeros == 118
    assert result.macs is result.latency is result.max_difference is None
    assert [line.split()[0] for line in str(result).splitlines()[1:]] == [
        *("params", "weights", "nonzeros", "bytes", "density", "bits_per_weight", "masks")
    ]
    assert "latency_ms" not in result.to_dict()
    assert "baseline_macs" not in result.to_dict()


def test_a_model_equal_to_its_baseline_has_no_difference() -> None:
    sparse = prune(net(), 0.2)
    result = report(finalize(sparse), example=X, baseline=sparse, min_seconds=QUICK)
    assert result.max_difference == 0.0
    assert result.baseline is not None
    assert result.nonzeros == result.baseline.nonzeros


def test_smaller_layers_are_no_masks() -> None:
    result = report(net(16), example=X, baseline=net(32), min_seconds=QUICK)
    assert result.note == ""
    assert isinstance(result.baseline, Report)
    assert (result.macs, result.baseline.macs) == (432 * 64 + 160, 864 * 64 + 320)
    both = report(prune(net(16), 0.1), example=X, baseline=net(32), min_seconds=QUICK)
    assert both.note.startswith("masks: smaller when packed, no faster on this device; what is faster is so for")


def test_networks_of_our_spaces_need_no_baseline() -> None:
    space = NASBench201(channels=4, cells=1, classes=10, in_channels=3)
    model = prune(mark(space.build(space.at(5)), space, space.at(5)), 0.3)
    save(model, "ours.safetensors")
    result = report("ours.safetensors", example=X, min_seconds=QUICK)
    assert result.density == pytest.approx(0.3, abs=1e-3)
    save(net(), "plain.safetensors")
    with pytest.raises(CompressionError, match=r"names no network of our spaces: .*baseline=network\) needs the orig"):
        report("plain.safetensors", example=X)


def test_zeros_without_masks() -> None:
    assert report(finalize(prune(net(), 0.1))).note == "zeros only: smaller when packed, no faster on this device"
    both = report(finalize(prune(net(16), 0.1)), baseline=net(32))
    assert both.note.startswith("zeros: smaller when packed, no faster on this device; what is faster is so for")
    some = net()
    nn.init.zeros_(some[5].weight)  # 320 of 1,184, as a head may start
    assert report(some).note == ""
    assert report(prune(net(), 1.0)).note == ""  # masks that drop nothing


@pytest.mark.parametrize(
    ("own", "other", "ratio"), [(0.1, 1.0, "0.50"), (0.6, 0.1, "noisy"), (0.1, 1.1, "noisy"), (0.5, 1.0, "0.50")]
)
def test_a_ratio_of_noisy_latencies_is_not_given(own: float, other: float, ratio: str) -> None:
    old = Report(10, 8, 8, 100, latency=Latency(2.0, other, 7, 1, "cpu", 1))
    new = Report(5, 4, 4, 50, latency=Latency(1.0, own, 7, 1, "cpu", 1), baseline=old)
    rows = {line.split()[0]: line.split()[-1] for line in str(new).splitlines()[1:7]}
    assert (rows["params"], rows["latency"]) == ("0.5000", ratio)


def test_a_wrapped_model_is_reported_as_the_one_inside() -> None:
    sparse = prune(net(), 0.1)
    result = report(torch.compile(sparse), baseline=nn.DataParallel(net()))
    assert result == report(sparse, baseline=net())
    assert result.baseline is not None


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": self.one(x) + self.two(y), "one": self.one(x)}

    result = report(Two(), example=(torch.rand(2, 4), torch.rand(2, 5)), baseline=Two(), min_seconds=QUICK)
    assert result.macs == 2 * 12 + 15
    assert result.max_difference is not None
    assert result.max_difference > 0


def test_bad_input_is_refused() -> None:
    model = net()
    for example in (3, (), torch.tensor(1.0), torch.rand(0, 3, 8, 8)):
        with pytest.raises(CompressionError, match="example is a batch of inputs"):
            report(model, example=example)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"tensor \(N, ...\), or a tuple of such, got ndarray\.$"):
        report(model, example=X.numpy())  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="baseline is the original network, a module, got str"):
        report(model, baseline="plain.safetensors")  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="data is what nasbench.data.load returns, got str"):
        report(model, data="digits")  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"does not take a batch of 4 x 1 x 8 x 8: .*channels"):
        report(model, example=X[:, :1], baseline=model)
    with pytest.raises(CompressionError, match=r"outputs of shapes \[\(4, 10\)\], the baseline \[\(4, 1, 10\)\]"):
        report(model, example=X, baseline=nn.Sequential(*model, nn.Unflatten(1, (1, 10))))
    with pytest.raises(CompressionError, match="ReLU has no convolution, linear layer or attention to report on"):
        report(nn.ReLU())
    with pytest.raises(CompressionError, match="more than 0 seconds, got min_seconds=0"):
        report(model, example=X, min_seconds=0)
    with pytest.raises(CompressionError, match="cannot read nothing.safetensors"):
        report("nothing.safetensors", example=X, baseline=model)
    with pytest.raises(SettingError, match="device"):
        report(model, example=X, device="nonsense")
