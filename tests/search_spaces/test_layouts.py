from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nasbench as nb
from search_spaces import ResNet
from search_spaces.layouts import laid_out, lay_out, layout_for

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("layer", "layout"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), CONTIGUOUS),
        (nn.Conv2d(16, 16, 1, stride=(1, 2), groups=4), CONTIGUOUS),
        (nn.Conv2d(4, 8, 1), LAST),
        (nn.Conv2d(4, 8, 3, stride=2), LAST),
        (nn.Conv2d(16, 8, 1, stride=2), LAST),
        (nn.Linear(4, 4), LAST),
    ],
)
def test_layouts(layer: nn.Module, layout: torch.memory_format) -> None:
    assert layout_for(nn.Sequential(nn.ReLU(), layer)) == layout
    assert layout_for(layer, "cuda") == LAST


def test_wider_registers_hold_more_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert layout_for(nn.Conv2d(15, 8, 1, stride=2)) == CONTIGUOUS
    assert layout_for(nn.Conv2d(16, 8, 1, stride=2)) == LAST


def test_the_strides_follow_the_layout_with_one_channel_too() -> None:
    x = torch.arange(18.0).view(2, 1, 3, 3)
    last = x.to(memory_format=LAST)
    assert last.stride() != x.stride()
    assert laid_out(last, CONTIGUOUS).stride() == x.stride() and torch.equal(laid_out(last, CONTIGUOUS), x)
    conv = nn.Conv2d(3, 4, 1).to(memory_format=LAST)  # type: ignore[call-overload]
    lay_out(conv, CONTIGUOUS)
    assert conv.weight.stride() == (3, 1, 1, 1)


def test_narrow_networks_train_rightly() -> None:
    """On a processor with AVX2 this aborts in channels_last."""
    data = nb.data.load("digits")
    space = ResNet(depths=(1,), widths=(4,), classes=10, in_channels=1)
    arch = space.check({name: options[0] for name, options in space.choices.items()})
    found: list[dict[str, Any]] = []
    for channels_last in (True, False):
        torch.manual_seed(0)
        model = space.build(arch)
        nb.fit(model, data, epochs=1, seed=0, device="cpu", channels_last=channels_last, progress=False)
        found.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
