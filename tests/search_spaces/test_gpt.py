from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from search_spaces import GPT, SPACES, ArchError, space

SMALL = GPT(widths=(12, 24), heads=(2, 3), ratios=(1, 2), depths=(1, 2), classes=7, context=10)


def test_the_space_of_the_paper() -> None:
    gpt = GPT()
    assert SPACES["gpt"] == "search_spaces.gpt:GPT"
    assert space("gpt") == gpt
    assert gpt.size == 3 * 3 * (3 * 3) ** 6  # width, depth, and heads and ratio of each block
    bound = gpt.bind(SimpleNamespace(classes=65, context=64))
    assert (bound.classes, bound.context) == (65, 64)


def test_parameters_by_hand() -> None:
    arch = SMALL.arch(width=12, depth=1, heads0=3, heads1=2, ratio0=2.0, ratio1=1.0)
    # Embedding 7 x 12, also the head; positions 10 x 12; norms 3 x 24; attention 4 x (144 + 12), whatever its heads;
    # hidden 24: 12 x 24 + 24 + 24 x 12 + 12.
    assert sum(p.numel() for p in SMALL.build(arch).parameters()) == 84 + 120 + 72 + 624 + 612


def test_no_token_sees_a_later_one() -> None:
    tokens = torch.randint(7, (2, 10), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % 7
    arch, supernet = SMALL.at(SMALL.size - 1), SMALL.supernet()
    for parameter in supernet.parameters():
        nn.init.normal_(parameter, std=0.3)
    mixture = SMALL.one_hot(arch).map(lambda row: torch.full_like(row, 1 / len(row)))
    mixture.active = None
    for network in (supernet.extract(arch), partial(supernet, mixture=mixture)):
        changed = (network(tokens) - network(other)).abs().amax((0, 1))
        assert bool((changed[:6] == 0).all())
        assert bool((changed[6:] > 1e-4).all())


def test_shorter_texts_have_the_logits_of_their_beginning() -> None:
    network, tokens = SMALL.build(SMALL.at(50)), torch.randint(7, (2, 10))
    assert torch.allclose(network(tokens[:, :4]), network(tokens)[:, :, :4], atol=1e-6)


def test_it_learns() -> None:
    text = [ord(letter) % 7 for letter in "one two, buckle my shoe, "] * 4
    windows = torch.tensor([text[i : i + 11] for i in range(40)])
    torch.manual_seed(0)
    network = SMALL.build(SMALL.at(SMALL.size - 1))
    optimizer, losses = torch.optim.AdamW(network.parameters(), 1e-2), []
    for _ in range(40):
        loss = F.cross_entropy(network(windows[:, :-1]), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(torch.tensor(7.0).log().item(), rel=0.05)  # knows nothing
    assert losses[-1] < 0.4 * losses[0]


def test_what_is_no_text_is_refused() -> None:
    arch = SMALL.at(0)
    bad = [
        (
            torch.zeros(1, 11, dtype=torch.int64),
            "reads up to 10 tokens, and was given 11. Cut the text, or .*context=11",
        ),
        (
            torch.zeros(1, 10),
            r"int64 tokens of shape \(batch, length\), and was given torch.float32 of shape \(1, 10\)",
        ),
        (torch.zeros(1, 2, 10, dtype=torch.int64), r"was given torch.int64 of shape \(1, 2, 10\)"),
    ]
    for x, message in bad:
        with pytest.raises(ArchError, match=message):
            SMALL.build(arch)(x)
        with pytest.raises(ArchError, match=message):
            SMALL.supernet()(x, SMALL.one_hot(arch))


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(
        ArchError,
        match=r"widths=\(12, 20\) and heads=\(2, 3\), but 20 features cannot be divided among 3 heads. Give widths",
    ):
        GPT(widths=(12, 20), heads=(2, 3))
    with pytest.raises(ArchError, match="GPT was given context=0; it is a positive integer"):
        GPT(context=0)


def test_the_context_comes_from_the_data() -> None:
    makes: list[Callable[[], object]] = [GPT().supernet, lambda: GPT(classes=5).build(GPT().at(0))]
    for make in makes:
        with pytest.raises(ArchError, match="GPT does not know .*context yet"):
            make()
    with pytest.raises(ArchError, match="GPT was made with context=10, the data has 64"):
        SMALL.bind(SimpleNamespace(classes=7, context=64))
