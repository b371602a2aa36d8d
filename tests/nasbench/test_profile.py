"""Counts derived by hand, models left untouched, and errors that name the layer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nasbench.errors import SettingError
from nasbench.profile import count, latency, measure
from search_spaces import Arch, ArchError, NASBench201, ResNet

# name: network, image shape, parameters, multiply-adds
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int, int]] = {
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 6, 4), 3 * 8 * 9 + 8, 3 * 8 * 9 * 6 * 4),
    "strided conv": (lambda: nn.Conv2d(2, 4, 3, stride=2, bias=False), (2, 7, 7), 2 * 4 * 9, 2 * 4 * 9 * 3 * 3),
    "depthwise conv": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8), (8, 6, 6), 8 * 25 + 8, 8 * 25 * 36),
    "grouped conv": (lambda: nn.Conv2d(8, 4, 1, groups=2, bias=False), (8, 5, 5), 4 * 4, 4 * 4 * 25),
    "dilated conv": (lambda: nn.Conv2d(1, 1, 3, dilation=2, bias=False), (1, 6, 6), 9, 9 * 2 * 2),
    "transposed conv": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 4, 4), 2 * 3 * 4 + 3, 2 * 3 * 4 * 16),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), (3, 4, 4), 48 * 10 + 10, 480),
    "norm": (lambda: nn.BatchNorm2d(4), (4, 3, 3), 8, 0),
    "lazy": (lambda: nn.LazyConv2d(5, 1), (3, 2, 2), 3 * 5 + 5, 3 * 5 * 4),
    "none": (nn.Identity, (3, 4, 4), 0, 0),
}


def nasbench201_by_hand() -> tuple[int, int]:
    """Parameters and multiply-adds of the benchmark's network of 3x3 convolutions only: 16 channels, 5 cells."""
    params, macs = 9 * 3 * 16 + 32, 9 * 3 * 16 * 32 * 32  # stem, with its norm
    for c, side in ((16, 32), (32, 16), (64, 8)):
        params += 5 * 6 * (9 * c * c + 2 * c)
        macs += 5 * 6 * 9 * c * c * side * side
    for c, side in ((32, 16), (64, 8)):  # residual blocks: two 3x3 convolutions with norms, a 1x1 without
        weights = 9 * (c // 2) * c + 9 * c * c + (c // 2) * c
        params += weights + 4 * c
        macs += weights * side * side
    return params + 2 * 64 + 64 * 10 + 10, macs + 64 * 10


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed: Tensor = self.attention(tokens, tokens, tokens)[0]
        return mixed


class Moody(nn.Module):
    """Changes itself with every forward, as no network should."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.noise: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.noise = torch.rand(3)
        self.conv.weight.data.mul_(2)
        y: Tensor = self.conv(x)
        return y


class Residual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(torch.relu(x))


@pytest.mark.parametrize("name", LAYERS)
def test_counts_equal_hand_derived_ones(name: str) -> None:
    build, shape, params, macs = LAYERS[name]
    assert count(build, shape) == {"params": params, "macs": macs}
    profile = measure(build(), shape)
    assert (profile.params, profile.macs) == (params, macs)


def test_nasbench201_equals_the_formula() -> None:
    space = NASBench201(classes=10, in_channels=3)
    arch = space.arch(dict.fromkeys(space.choices, "nor_conv_3x3"))
    params, macs = nasbench201_by_hand()
    assert (params, macs) == (1_531_546, 220_119_680)
    assert count(lambda: space.build(arch), (3, 32, 32)) == {"params": params, "macs": macs}
    assert measure(space.build(arch), (3, 32, 32)).macs == macs


def test_meta_and_real_counts_agree_on_a_residual_space() -> None:
    space = ResNet(classes=10, in_channels=1)
    arch = space.at(space.size // 2)
    real = measure(space.build(arch), (1, 8, 8))
    assert count(lambda: space.build(arch), (1, 8, 8)) == {"params": real.params, "macs": real.macs}


def test_attention_is_counted_on_every_device_though_torch_would_fuse_it() -> None:
    tokens, width = 12, 16
    by_hand = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    assert torch.backends.mha.get_fastpath_enabled()
    assert measure(Attention(), (16, 3, 4)).macs == by_hand
    assert count(Attention, (16, 3, 4))["macs"] == by_hand
    assert torch.backends.mha.get_fastpath_enabled()


class Causal(nn.Module):
    """Tokens to logits by one attention of two heads."""

    def __init__(self, mask: bool = False) -> None:
        super().__init__()
        self.embedding, self.inner, self.outer = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(8, 11)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(self.embedding(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril() if self.mask else None
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not self.mask)
        logits: Tensor = self.outer(mixed.transpose(1, 2).flatten(2)).transpose(1, 2)
        return logits


@pytest.mark.parametrize("mask", [False, True])
def test_fused_attention_of_a_text_is_counted_in_full(mask: bool) -> None:
    length, heads, width = 6, 2, 4
    attention = heads * (length * width * length + length * length * width)  # whatever the mask hides
    by_hand = length * 8 * 24 + attention + length * 8 * 11
    params = 11 * 8 + 8 * 24 + 24 + 8 * 11 + 11
    assert count(lambda: Causal(mask), (length,)) == {"params": params, "macs": by_hand}
    profile = measure(Causal(mask), (length,))
    assert (profile.params, profile.macs) == (params, by_hand)
    assert not any("attention" in name for name in profile.uncounted)
    assert latency(Causal(mask), (length,), batch=3, min_seconds=0.001).batch == 3


def test_fused_attention_keeps_no_scores() -> None:
    assert measure(Causal(), (512,)).peak_bytes < 2 * 512 * 512 * 4  # those of two heads


def test_grouped_queries_are_counted_like_others() -> None:
    class Grouped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, kv = (torch.zeros(1, heads, x.shape[1], 4, device=x.device) for heads in (4, 2))
            return nn.functional.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True)

    assert count(Grouped, (6,))["macs"] == measure(Grouped(), (6,)).macs == 2 * 4 * 6 * 6 * 4


def test_count_needs_no_memory_for_weights() -> None:
    def build() -> nn.Module:  # four petabytes
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10**9), nn.Linear(10**9, 10**6))

    assert count(build, (1, 8, 8))["macs"] == 64 * 10**9 + 10**15


def test_count_asks_again_where_the_same_operator_has_other_shapes_or_numbers() -> None:
    class Powers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            whole = torch.ones(1, 4, device=x.device, dtype=torch.int64)
            assert (whole * 1).dtype == torch.int64
            assert (whole * 1.0).dtype == torch.float32
            return torch.cat([x.flatten(1), x.flatten(1)], 1) @ torch.ones(8, 3, device=x.device)

    assert count(Powers, (1, 2, 2))["macs"] == 8 * 3


def test_a_network_that_needs_numbers_is_built_for_real() -> None:
    rates: list[float] = []

    def build() -> nn.Module:
        rates[:] = [float(p) for p in torch.linspace(0, 0.5, 3)]  # impossible on the meta device
        return nn.Conv2d(1, 4, 3)

    state = torch.get_rng_state()
    assert count(build, (1, 5, 5)) == {"params": 40, "macs": 4 * 9 * 9}
    assert rates == [0, 0.25, 0.5]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_built_for_real_computes_what_it_would() -> None:
    class Exact(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            for _ in range(2):
                x = torch.add(x, 1).add_(1)
            assert x.mean().item() == 4
            return x @ torch.ones(4, 3)

    assert count(Exact, (1, 2, 2))["macs"] == 12


def test_an_error_of_the_space_passes_through() -> None:
    space = NASBench201(classes=10, in_channels=3)
    with pytest.raises(ArchError, match="needs"):
        count(lambda: space.build(Arch({"e01": "none"})), (3, 8, 8))


def test_bytes_are_those_of_stored_tensors_each_once() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4))
    assert measure(model, (1, 2, 2)).bytes == 4 * (4 + 4 + 4 + 4 + 4) + 8  # weight, norm's four, and its int64 counter
    tied = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[2].weight = tied[1].weight
    profile = measure(tied, (1, 2, 2))
    assert (profile.params, profile.bytes, profile.macs) == (16, 64, 32)
    assert measure(tied.double().to(torch.bfloat16).float(), (1, 2, 2)).bytes == 64
    buffers = nn.Identity()
    buffers.register_buffer("temporary", torch.zeros(100), persistent=False)
    assert measure(buffers, (1, 2, 2)).bytes == 0


@pytest.mark.parametrize(
    ("model", "floats"),
    [
        (nn.Identity(), 16),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), 48),  # the image is held by the caller all along
        (nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()), 48),
        (nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU(inplace=True)), 32),
        (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 8)), nn.ReLU()), 32),  # views are free
        (nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 1, 1)), 16 + 128 + 32),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 1, 1)), 16 + 32 + 128),
        (Residual(), 48),
    ],
    ids=["nothing", "two", "four", "in place", "views", "wide first", "wide later", "residual"],
)
def test_peak_memory_equals_hand_derived(model: nn.Module, floats: int) -> None:
    assert measure(model, (1, 4, 4)).peak_bytes == 4 * floats


def test_uncounted_lists_what_has_no_formula_but_no_views() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    assert measure(model, (1, 4, 4)).uncounted == ("avg_pool2d", "relu")
    assert measure(nn.Conv2d(1, 2, 1), (1, 4, 4)).uncounted == ()


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = Moody().train()
    before, state, threads = copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.get_num_threads()
    profile = measure(model, (1, 4, 4), latency=True, min_seconds=0.001)
    assert profile.macs == 2 * 9 * 4
    assert model.training and model.noise is None
    assert model.conv.weight.requires_grad and model.conv.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_latency_tells_its_conditions() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = latency(nn.Conv2d(1, 2, 3), (1, 8, 8), batch=4, min_seconds=0.01)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (result.batch, result.threads, result.device) == (4, 2, "cpu")
    assert result.median_ms > 0 and result.iqr_ms >= 0 and result.repeats >= 5
    assert "batch 4, cpu, 2 threads" in str(result)


def test_a_slow_network_is_timed_often_enough_for_a_spread() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return x

    result = latency(Slow(), (1, 2, 2), min_seconds=0.001)
    assert result.repeats >= 5 and result.median_ms >= 20


def test_latency_runs_in_evaluation_mode_on_the_batch_asked_for() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, torch.is_inference_mode_enabled(), tuple(x.shape)))
            return x

    latency(Spy(), (1, 2, 2), batch=3, min_seconds=0.001)
    assert set(seen) == {(False, True, (3, 1, 2, 2))}


def test_profile_prints_and_gives_metrics() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10, bias=False))
    profile = measure(model, (1, 16, 16))
    metrics = {"params": 2560, "macs": 2560, "bytes": 10240, "peak_bytes": 4 * 266}
    assert profile.to_dict() == metrics
    assert "params      2,560" in str(profile) and "latency     not measured" in str(profile)
    timed = measure(model, (1, 16, 16), latency=True, min_seconds=0.001)
    assert timed.latency is not None
    assert timed.to_dict() == metrics | {"latency_ms": timed.latency.median_ms}
    assert "repeats" in str(timed)


class TestErrors:
    net = staticmethod(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(144, 10))))

    @pytest.mark.parametrize("call", [measure, latency, lambda model, shape: count(lambda: model, shape)])
    def test_wrong_channels_name_the_layer(self, call: Callable[[nn.Module, tuple[int, ...]], object]) -> None:
        with pytest.raises(SettingError, match=r"batch of 1 x 1 x 8 x 8 .*layer '0' \(Conv2d\) says .*3 channels"):
            call(self.net(), (1, 8, 8))

    def test_a_network_for_images_takes_no_text(self) -> None:
        with pytest.raises(SettingError, match=r"batch of 1 x 64 \(batch x length\): layer '0' \(Conv2d\) says "):
            measure(self.net(), (64,))

    def test_wrong_size_names_the_inner_layer(self) -> None:
        with pytest.raises(SettingError, match=r"layer '1\.1' \(Linear\) says .*Give the shape of the data"):
            measure(self.net(), (3, 9, 9))
        with pytest.raises(SettingError, match=r"layer '0' \(Conv2d\) says .*Kernel size can't be greater"):
            count(self.net, (3, 2, 2))

    def test_a_model_that_fails_itself(self) -> None:
        with pytest.raises(SettingError, match="the Module itself says"):
            measure(nn.Module(), (3, 8, 8))

    @pytest.mark.parametrize("shape", [(), (0,), (8, 8), (3, 0, 8), (3, 8.0, 8), (1, 3, 8, 8), 8, "888"])
    def test_shape_is_one_or_three_positive_integers(self, shape: object) -> None:
        calls: list[Callable[[object], object]] = [
            lambda shape: measure(self.net(), shape),  # type: ignore[arg-type]
            lambda shape: latency(self.net(), shape),  # type: ignore[arg-type]
            lambda shape: count(self.net, shape),  # type: ignore[arg-type]
        ]
        for call in calls:
            with pytest.raises(SettingError, match=r"\(length,\) or images of \(channels, height, width\), got shape="):
                call(shape)

    def test_batch_seconds_and_device(self) -> None:
        with pytest.raises(SettingError, match="1 image or more, got batch=0"):
            latency(self.net(), (3, 8, 8), batch=0)
        with pytest.raises(SettingError, match=r"more than 0 seconds, got min_seconds=0\.0"):
            measure(self.net(), (3, 8, 8), latency=True, min_seconds=0.0)
        with pytest.raises(SettingError, match="cdua"):
            latency(self.net(), (3, 8, 8), device="cdua")


@pytest.mark.gpu
def test_latency_on_a_gpu_leaves_the_model_on_the_cpu() -> None:
    model = nn.Conv2d(3, 8, 3)
    state = torch.cuda.get_rng_state()
    result = latency(model, (3, 32, 32), batch=8, device="cuda", min_seconds=0.01)
    assert result.device == torch.cuda.get_device_name() and result.median_ms > 0
    assert model.weight.device.type == "cpu" and torch.equal(torch.cuda.get_rng_state(), state)
