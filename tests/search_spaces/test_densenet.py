"""The DenseNet space: its start, its canonical form, its sizes. How its networks grow: test_growth.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from search_spaces import ArchError, DenseNet

SPACE = DenseNet(growths=(4, 6), blocks=2, slots=4, layers_of_start=2, classes=10, in_channels=1)


def test_the_start_is_a_densenet_bc_of_40_layers() -> None:
    space = DenseNet(classes=10, in_channels=3)
    with torch.device("meta"):
        model = space.build(space.start)
    # Two convolutions a layer, the first, two transitions and the classifier.
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 40
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs["stem"].out_channels == 80
    assert (convs["transition1.conv"].in_channels, convs["transition1.conv"].out_channels) == (320, 160)
    layer = model.get_submodule("block1.layer5")
    assert (layer.conv1.in_channels, layer.conv1.out_channels, layer.conv2.out_channels) == (360, 160, 40)


def test_the_parameters_are_those_of_the_published_network() -> None:
    # Huang et al., table 2: DenseNet-BC (L=100, k=12) has 0.8M parameters.
    space = DenseNet(growths=(12,), slots=16, layers_of_start=16, classes=10, in_channels=3)
    with torch.device("meta"):
        assert sum(p.numel() for p in space.build(space.start).parameters()) == 769_162


def test_canonical_packs_the_layers() -> None:
    arch = SPACE.start | {"block0_growth1": 0, "block0_growth3": 6}
    assert SPACE.layers(SPACE.canonical(arch))[0] == SPACE.layers(arch)[0] == ["g4", "g6"]
    assert SPACE.canonical(arch)["block0_growth1"] == 6


def test_widening_follows_into_stem_and_transition() -> None:
    child = SPACE.widened(SPACE.start, 0, 0)
    assert child is not None
    model = SPACE.build(child)
    assert model.get_parameter("stem.weight").shape[0] == 12
    assert model.get_parameter("transition1.conv.weight").shape[:2] == (11, 22)


def test_the_graph_shows_what_is_there() -> None:
    labels = [start for start, _, _ in SPACE.graph(SPACE.start)]
    assert labels == ["input", "g4 (0.0)", "g4 (0.1)", "transition 1", "g4 (1.0)", "g4 (1.1)"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"growths": (8, 4)}, "ascending"),
        ({"layers_of_start": 5, "slots": 4}, "layers_of_start=5 do not fit into slots=4"),
        ({"blocks": 0}, "blocks=0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ArchError, match=message):
        DenseNet(**settings)  # type: ignore[arg-type]
