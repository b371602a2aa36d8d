"""Masks over weights: exact numbers, gradients as published, and weights that stay the same objects."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from search_spaces.masks import Mask, attach, detach, keep_count, mask_of, straight_through, top_k_mask


def half(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) % 2 == 0


def test_keep_count_is_a_rounded_share_and_at_least_one() -> None:
    assert [keep_count(d, 10) for d in (0.9, 0.1, 0.14, 0.16, 1.0, 0.001)] == [9, 1, 1, 2, 10, 1]
    assert keep_count(0.7, 30) == 21  # 0.7 * 30 is a little less


@pytest.mark.parametrize("keep", range(13))
def test_top_k_keeps_exactly_so_many_of_the_largest(keep: int) -> None:
    scores = torch.tensor([[3.0, -1.0, 3.0, 0.0], [3.0, 2.0, -1.0, 3.0], [0.0, 0.0, 5.0, -2.0]])
    mask = top_k_mask(scores, keep)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    assert int(mask.sum()) == keep
    if 0 < keep < 12:
        assert scores[mask].min() >= scores[~mask].max()


def test_of_equal_scores_the_first_are_kept_in_any_memory_format() -> None:
    scores = torch.ones(2, 3, 2, 2)
    expected = (torch.arange(24) < 7).view(2, 3, 2, 2)
    assert torch.equal(top_k_mask(scores, 7), expected)
    assert torch.equal(top_k_mask(scores.contiguous(memory_format=torch.channels_last), 7), expected)


def test_numbers_that_cannot_be_kept_or_ranked_are_refused() -> None:
    for keep in (-1, 4):
        with pytest.raises(ValueError, match=f"asked to keep {keep} of 3 scores"):
            top_k_mask(torch.ones(3), keep)
    with pytest.raises(ValueError, match="not a number"):
        top_k_mask(torch.tensor([1.0, torch.nan, 2.0]), 1)
    assert top_k_mask(torch.tensor([1.0, -torch.inf, torch.inf]), 1).tolist() == [False, False, True]


def test_straight_through_gradients_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 5, generator=generator, requires_grad=True)
    scores = torch.randn(4, 5, generator=generator, requires_grad=True)
    upstream = torch.randn(4, 5, generator=generator)
    masked = straight_through(weight, scores, 8)
    mask = top_k_mask(scores.abs(), 8)
    assert torch.equal(masked, weight * mask)
    masked.backward(upstream)
    assert weight.grad is not None and scores.grad is not None
    assert torch.equal(weight.grad, upstream * mask)
    assert torch.equal(scores.grad, upstream * weight.detach() * scores.detach().sign())


def test_straight_through_gives_gradients_only_where_they_are_needed() -> None:
    weight, scores = torch.ones(4), torch.arange(4.0, requires_grad=True)
    straight_through(weight, scores, 2).sum().backward()
    assert weight.grad is None and scores.grad is not None
    frozen = torch.ones(4, requires_grad=True)
    straight_through(frozen, torch.arange(4.0), 2).sum().backward()
    assert frozen.grad is not None and frozen.grad.tolist() == [0, 0, 1, 1]


def test_a_masked_weight_is_zero_has_no_gradient_and_stays_the_same_parameter() -> None:
    layer, mask = nn.Conv2d(2, 4, 3), half(4, 2, 3, 3)
    before, original = layer.weight, layer.weight.detach().clone()
    attach(layer, "weight", mask)
    stored = dict(layer.named_parameters())["parametrizations.weight.original"]
    assert stored is before
    assert torch.equal(layer.weight, original * mask) and torch.equal(stored, original * mask)
    layer(torch.rand(1, 2, 5, 5)).sum().backward()
    assert stored.grad is not None
    assert not stored.grad[~mask].any() and stored.grad[mask].all()
    assert mask_of(layer, "weight") is not None and mask_of(layer, "bias") is None
    assert isinstance(layer, nn.Conv2d)


def test_a_mask_is_a_copy_and_takes_a_byte_for_each_weight() -> None:
    layer, mask = nn.Linear(30, 20), half(20, 30)
    attach(layer, "weight", mask)
    mask.fill_(True)
    own = mask_of(layer, "weight")
    assert own is not None and torch.equal(own, half(20, 30))
    assert own.untyped_storage().nbytes() == layer.weight.numel()
    assert "300 of 600 kept" in repr(layer)


def test_a_mask_has_the_memory_format_of_its_weight() -> None:
    layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    attach(layer, "weight", half(8, 4, 3, 3))
    own = mask_of(layer, "weight")
    assert own is not None and torch.equal(own, half(8, 4, 3, 3))
    for tensor in (own, layer.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_what_is_assigned_is_masked() -> None:
    layer = nn.Linear(4, 2)
    attach(layer, "weight", half(2, 4))
    layer.weight = torch.full((2, 4), 3.0)  # type: ignore[assignment]
    assert layer.parametrizations.weight.original.tolist() == (3.0 * half(2, 4)).tolist()  # type: ignore[union-attr]


def test_detach_gives_an_ordinary_parameter_back() -> None:
    layer, mask = nn.Linear(4, 2), half(2, 4)
    before, original = layer.weight, layer.weight.detach().clone()
    attach(layer, "weight", mask)
    with torch.no_grad():
        before.fill_(7.0)  # as an optimizer that mixes entries moves the stored weight
    detach(layer, "weight")
    assert type(layer) is nn.Linear and layer.weight is before
    assert torch.equal(layer.weight, 7.0 * mask) and not torch.equal(layer.weight, original)
    assert set(layer.state_dict()) == {"weight", "bias"} and mask_of(layer, "weight") is None
    assert not layer._load_state_dict_pre_hooks, "nor would a saved module ask for ours"


def test_masks_that_do_not_fit_are_refused() -> None:
    layer = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"mask of 'weight' is torch.float32 of shape \(2, 4\); give torch.bool"):
        attach(layer, "weight", torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"of shape \(4, 2\); give torch.bool of shape \(2, 4\)"):
        attach(layer, "weight", half(4, 2))
    assert type(layer) is nn.Linear
    attach(layer, "weight", half(2, 4))
    with pytest.raises(ValueError, match="'weight' is parametrized already"):
        attach(layer, "weight", half(2, 4))


def test_the_state_of_a_module_without_masks_can_be_loaded() -> None:
    plain = nn.Sequential(nn.Linear(4, 3), nn.MultiheadAttention(4, 2))
    masked = copy.deepcopy(plain)
    attach(masked[0], "weight", half(3, 4))
    attach(masked[1], "in_proj_weight", half(12, 4))
    for target in (masked, copy.deepcopy(masked)):  # a copy has the hook too
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(1)
        state = plain.state_dict()
        assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
        assert torch.equal(target[0].weight, plain[0].weight * half(3, 4))
        assert torch.equal(target[1].in_proj_weight, plain[1].in_proj_weight * half(12, 4))
        assert torch.equal(target[0].parametrizations.weight.original, target[0].weight)  # type: ignore[union-attr]
        assert set(state) == set(plain.state_dict()), "what was given is left alone"


def test_a_copy_loads_after_the_original_is_gone() -> None:
    layer = nn.Linear(4, 3)
    state = layer.state_dict()
    attach(layer, "weight", half(3, 4))
    twin = copy.deepcopy(layer)
    del layer
    gc.collect()
    twin.load_state_dict(state)
    assert torch.equal(twin.weight, state["weight"] * half(3, 4))


def test_what_is_done_to_a_copy_leaves_the_original_alone() -> None:
    attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=6)
    attach(attention, "q_proj_weight", half(4, 4))
    more, less = copy.deepcopy(attention), copy.deepcopy(attention)
    attach(more, "k_proj_weight", half(4, 6))
    detach(less, "q_proj_weight")
    assert [mask_of(one, "q_proj_weight") is not None for one in (attention, more, less)] == [True, True, False]
    assert [mask_of(one, "k_proj_weight") is not None for one in (attention, more, less)] == [False, True, False]
    for one in (attention, more, less):
        assert one.k_proj_weight.shape == (4, 6)
        assert torch.equal(one.q_proj_weight, attention.q_proj_weight)
        assert isinstance(one, nn.MultiheadAttention)
    assert type(less) is nn.MultiheadAttention


def test_a_weight_of_another_shape_is_refused_as_by_torch() -> None:
    layer = nn.Linear(4, 3)
    attach(layer, "weight", half(3, 4))
    with pytest.raises(RuntimeError, match="size mismatch for parametrizations.weight.original"):
        layer.load_state_dict(nn.Linear(5, 3).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": torch.zeros(3)})


def test_two_weights_of_one_module_can_be_masked() -> None:
    attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=6)
    state = copy.deepcopy(attention.state_dict())
    for name in ("q_proj_weight", "k_proj_weight"):
        attach(attention, name, half(*getattr(attention, name).shape))
    attention.load_state_dict(state)
    assert torch.equal(attention.k_proj_weight, state["k_proj_weight"] * half(4, 6))
    detach(attention, "q_proj_weight")
    attention.load_state_dict(state)  # the other mask still drops what it hides
    assert mask_of(attention, "q_proj_weight") is None and mask_of(attention, "k_proj_weight") is not None
    assert torch.equal(attention.q_proj_weight, state["q_proj_weight"])
    twin = copy.deepcopy(attention)
    detach(twin, "k_proj_weight")
    assert not twin._load_state_dict_pre_hooks and attention._load_state_dict_pre_hooks


def test_masks_live_beside_other_parametrizations() -> None:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    attach(layer, "weight", half(4, 4))
    state = layer.state_dict() | {"weight": torch.ones(4, 4)}
    del state["parametrizations.weight.original"], state["parametrizations.weight.0.mask"]
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, 1.0 * half(4, 4)) and mask_of(layer, "bias") is None


def test_a_mask_alone_is_a_parametrization() -> None:
    mask = Mask(half(4))
    assert mask(torch.ones(4)).tolist() == mask.right_inverse(torch.ones(4)).tolist() == [1, 0, 1, 0]
    assert list(mask.state_dict()) == ["mask"]


def test_a_model_on_the_meta_device_can_be_masked_and_loaded() -> None:
    layer = nn.Linear(4, 3)
    attach(layer, "weight", half(3, 4))
    with torch.device("meta"):
        empty = nn.Linear(4, 3)
        attach(empty, "weight", half(3, 4))
    assert "? of 12 kept" in repr(empty)
    with pytest.raises(RuntimeError, match="Missing key.*parametrizations.weight.0.mask"):  # nobody knows the mask
        empty.load_state_dict(nn.Linear(4, 3).state_dict(), assign=True)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.weight, layer.weight)
