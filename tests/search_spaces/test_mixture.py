"""Mixtures: what they hold, and what is said of those that fit no supernet."""

from __future__ import annotations

import pytest
import torch

from search_spaces import ArchError, Mixture, NASBench201, ResNet
from search_spaces.base import one_hot

SPACE = NASBench201()
SITES = {"a": ("x", "y", "z"), "b": ("x", "y")}


def weights(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {site: torch.zeros(len(options)) for site, options in SITES.items()} | changed


def test_one_hot_chooses_and_says_so_on_the_host() -> None:
    mixture = one_hot(SITES, {"a": 2, "b": None})
    assert mixture["a"].tolist() == [0, 0, 1]
    assert mixture["b"].tolist() == [0, 0]
    assert mixture.active == {"a": (2,), "b": ()}
    assert mixture.check(SITES, values=True) is mixture


def test_decode_takes_the_heaviest_option_of_every_site() -> None:
    rows = {site: torch.arange(5.0).roll(i) for i, site in enumerate(SPACE.sites)}
    arch = SPACE.decode(Mixture(rows))
    assert SPACE.encode(arch) == tuple(int(row.argmax()) for row in rows.values())


def test_spaces_whose_sites_are_their_decisions_round_trip() -> None:
    for space in (NASBench201(), ResNet()):
        for index in range(0, space.size, 97):
            assert space.decode(space.one_hot(space.at(index))) == space.at(index)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": torch.zeros(3)}, "needs a weight vector for every site; 'b' has none, this one has those of a"),
        ({}, "'a' has none, this one has those of no site"),
        (weights(c=torch.zeros(2)), "was given weights for 'c', which is no site; .*Known: a, b"),
        (weights(b=torch.zeros(3)), r"weights of site 'b' have shape \(3,\), but it has 2 options: x, y"),
        (weights(b=torch.zeros(1, 2)), r"weights of site 'b' have shape \(1, 2\)"),
        (
            weights(b=torch.tensor([0.5, float("nan")])),
            "weights of site 'b' are .*NaN or infinite weights choose nothing",
        ),
        (weights(a=torch.tensor([0.5, float("inf"), 0.0])), "weights of site 'a' are .*infinite"),
    ],
)
def test_bad_mixtures(rows: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ArchError, match=message):
        Mixture(rows).check(SITES, values=True)


def test_optional_sites_may_be_there() -> None:
    mixture = Mixture(weights(c=torch.zeros(2)))
    assert mixture.check(SITES, optional={"c": ("x", "y")}) is mixture
    with pytest.raises(ArchError, match="weights of site 'c' have shape"):
        Mixture(weights(c=torch.zeros(3))).check(SITES, optional={"c": ("x", "y")})


def test_decode_refuses_nan_and_supernets_refuse_wrong_lengths() -> None:
    rows = {site: torch.full((5,), float("nan")) for site in SPACE.sites}
    with pytest.raises(ArchError, match="NaN or infinite weights choose nothing"):
        SPACE.decode(Mixture(rows))
    supernet = NASBench201(channels=4, cells=1, classes=2, in_channels=1).supernet()
    with pytest.raises(ArchError, match="have shape"):
        supernet(torch.zeros(2, 1, 8, 8), Mixture({site: torch.zeros(4) for site in SPACE.sites}))


def test_a_missing_site_is_named() -> None:
    with pytest.raises(KeyError, match="'c' is no site of this mixture; Known: a, b"):
        Mixture(weights())["c"]
