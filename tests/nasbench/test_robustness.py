"""Calibration, strangers and attacks: by hand, against scikit-learn, and with the model left as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasbench.data import Data, from_arrays, load
from nasbench.errors import DataError, SettingError
from nasbench.robustness import (
    auroc,
    calibration,
    expected_calibration_error,
    fgsm_accuracy,
    ood_auroc,
    robustness,
)
from nasbench.training import evaluate, fit, validate


def two_greys(dark: int = 100, light: int = 140, images: int = 20, **settings: Any) -> Data:
    """Images of one grey each: class 0 dark, class 1 light, half of the images each."""
    labels = np.arange(images) % 2
    pixels = np.where(labels, light, dark).astype(np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    return from_arrays(pixels, labels, **{"name": f"greys{dark}-{light}"} | settings)


class Brightness(nn.Module):
    """Class 1 is what is lighter than the mean of the training images; keeps what it was shown."""

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        light = self.sharpness * x.mean((1, 2, 3))
        return torch.stack([-light, light], 1)


def greys(x: Tensor, dark: int, light: int) -> list[float]:
    """Return which greys these images have, 0 to 255, when those of the training images are dark and light."""
    scaled = x.mean((1, 2, 3)) * (light - dark) / 2 + (light + dark) / 2
    return sorted({round(grey, 3) for grey in scaled.tolist()})


def digits_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(288, 10)
    )


# The metrics ---------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    # Two bins. (0, 0.5]: 0.4 right, 0.5 wrong: 1/2 right, confidence 0.45. (0.5, 1]: 0.8, 0.6, 0.7 with two right.
    probabilities = torch.tensor(
        [[0.4, 0.3, 0.3], [0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64
    )
    labels = torch.tensor([0, 1, 1, 0, 0])
    expected = 2 / 5 * abs(1 / 2 - 0.45) + 3 / 5 * abs(2 / 3 - 0.7)
    assert expected_calibration_error(probabilities, labels, bins=2) == pytest.approx(expected, abs=1e-12)
    assert expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(abs(3 / 5 - 0.6), abs=1e-12)


def test_a_border_belongs_to_the_bin_below_it() -> None:
    probabilities = torch.tensor([[0.6, 0.4], [0.75, 0.25]])  # both in (0.5, 0.75], the first right, the second wrong
    assert expected_calibration_error(probabilities, torch.tensor([0, 1]), bins=4) == pytest.approx(0.675 - 1 / 2)


def test_honest_and_dishonest_certainty() -> None:
    sure = torch.eye(3)
    assert expected_calibration_error(sure, torch.tensor([0, 1, 2])) == 0
    assert expected_calibration_error(sure, torch.tensor([1, 2, 0])) == 1


def test_auroc_by_hand() -> None:
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 0
    assert auroc(torch.ones(3), torch.ones(5)) == 0.5
    # Of 6 pairs: 3>1, 3>2, 2>1 are wins, 2=2 is a tie, 1=1 is a tie, 1<2 is none.
    assert auroc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0])) == (3 + 2 / 2) / 6


def test_auroc_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    for values in (5, 40, 100_000):  # few values are many ties
        inside = torch.randint(values, (300,), generator=generator).double()
        outside = torch.randint(values, (200,), generator=generator).double() * 0.8
        truth = np.r_[np.ones(300), np.zeros(200)]
        expected = roc_auc_score(truth, torch.cat([inside, outside]).numpy())
        assert auroc(inside, outside) == pytest.approx(expected, abs=1e-12)


def test_bad_scores_and_probabilities() -> None:
    with pytest.raises(SettingError, match=r"scores of shape \(0,\).*neither of them empty"):
        auroc(torch.tensor([1.0]), torch.tensor([]))
    with pytest.raises(SettingError, match="with 1 that are not a number"):
        auroc(torch.tensor([1.0, math.nan]), torch.tensor([1.0]))
    with pytest.raises(SettingError, match=r"probabilities have shape \(2, 3\) and labels \(3,\)"):
        expected_calibration_error(torch.ones(2, 3) / 3, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(SettingError, match="not in 0 to 1; give the softmax"):
        expected_calibration_error(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(SettingError, match="nan to nan"):
        expected_calibration_error(torch.tensor([[math.nan, 0.5]]), torch.tensor([0]))
    for bins in (0, -3, 1.5, True):
        with pytest.raises(SettingError, match="bins=.*1 or more"):
            expected_calibration_error(torch.eye(2), torch.tensor([0, 1]), bins)  # type: ignore[arg-type]


# Of a model and data --------------------------------------------------------------------------------------------------


def test_calibration_of_a_model_by_hand() -> None:
    # Scaled greys are -1 and 1, so every image is right with logits 1 and -1.
    sure = math.exp(1) / (math.exp(1) + math.exp(-1))
    found = calibration(Brightness(), two_greys())
    assert found == {"ece": pytest.approx(1 - sure, abs=1e-6), "nll": pytest.approx(-math.log(sure), abs=1e-6)}


def test_calibration_is_that_of_validate_in_batches_of_any_size() -> None:
    data, model = load("digits"), digits_net()
    whole, parts = calibration(model, data), calibration(model, data, batch_size=50)
    assert whole == {key: pytest.approx(value, rel=1e-5) for key, value in parts.items()}
    assert whole["nll"] == pytest.approx(validate(model, data)["val_loss"], rel=1e-5)
    assert calibration(model, data, bins=1) != whole


def test_fgsm_on_a_linear_model_by_hand() -> None:
    # Both greys are 20 bytes from the border between the classes.
    model, data = Brightness(), two_greys(100, 140)
    assert fgsm_accuracy(model, data, 0) == 1
    assert fgsm_accuracy(model, data, 19 / 255) == 1
    assert fgsm_accuracy(model, data, 21 / 255) == 0
    assert [greys(x, 100, 140) for x in model.seen[-2:]] == [[100, 140], [119, 121]]


@pytest.mark.parametrize(("dark", "light", "attacked"), [(2, 5, [0, 10]), (250, 253, [245, 255])])
def test_attacked_pixels_stay_pixels(dark: int, light: int, attacked: list[float]) -> None:
    model = Brightness()
    assert fgsm_accuracy(model, two_greys(dark, light), 8 / 255) == 0
    assert greys(model.seen[1], dark, light) == attacked
    model = Brightness(-1.0)  # wrong already; made more so, the dark gets darker and the light lighter
    assert fgsm_accuracy(model, two_greys(dark, light), 1 / 255) == 0
    assert greys(model.seen[1], dark, light) == [dark - 1, light + 1]


def test_colours_are_attacked_each_in_its_own_scale() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 4, 4, 3)) * np.array([1.0, 0.5, 0.1])  # channels of different deviation
    data = from_arrays(pixels.astype(np.uint8), np.arange(40) % 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    fgsm_accuracy(model, data, 2 / 255)
    train = torch.cat([x for x, _ in data.eval_batches("train")])
    steps = [train[:, c].unique().diff().min() for c in range(3)]  # one byte, as the network sees it
    moved = (seen[1] - seen[0]).abs().amax((0, 2, 3))
    assert torch.allclose(moved, 2 * torch.stack(steps), rtol=1e-3)


def test_strangers_are_seen_with_the_scaling_of_the_data() -> None:
    model, data, other = Brightness(), two_greys(100, 140), two_greys(119, 200)
    assert ood_auroc(model, data, other) == 0.5  # 100 and 140 are equally sure; 119 is less so, 200 more
    assert greys(torch.cat(model.seen), 100, 140) == [100, 119, 140, 200]
    assert ood_auroc(model, data, two_greys(119, 121)) == 1
    assert ood_auroc(model, data, two_greys(50, 210)) == 0
    assert ood_auroc(model, data, data) == 0.5


def test_very_sure_predictions_are_still_ranked() -> None:
    # In single precision the probabilities on both sets would be 1.
    assert ood_auroc(Brightness(10.0), two_greys(100, 140), two_greys(101, 139)) == 1


def test_noise_has_the_statistics_of_the_data_and_is_a_function_of_the_seed() -> None:
    data, model = load("digits"), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = ood_auroc(model, data, "noise", batch_size=100)
    handle.remove()
    # The digits have 17 shades of grey; noise has as many as pixels that are not clipped.
    (images,) = (torch.cat(part) for part in (seen[:3], seen[3:]) if len(torch.cat(part).unique()) == 17)
    (noise,) = (torch.cat(part) for part in (seen[:3], seen[3:]) if len(torch.cat(part).unique()) > 10_000)
    assert noise.shape == images.shape == (287, 1, 8, 8)
    expected = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).clamp(images.min(), images.max())
    assert noise.mean() == pytest.approx(float(expected.mean()), abs=0.03)
    assert noise.std() == pytest.approx(float(expected.std()), abs=0.03)
    assert [noise.min(), noise.max()] == [images.min(), images.max()]  # black and white
    assert found == ood_auroc(model, data, "noise", batch_size=512)
    assert found != ood_auroc(model, data, "noise", seed=1)


def test_all_at_once_is_each_alone_and_leaves_the_model_as_it_was() -> None:
    data = load("digits")
    model = fit(digits_net(), data, epochs=2, device="cpu", progress=False).train()
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    found = robustness(model, data)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert found == {
        "accuracy": validate(model, data)["val_accuracy"],
        **calibration(model, data),
        "ood_auroc": ood_auroc(model, data, "noise"),
        "fgsm_accuracy": fgsm_accuracy(model, data),
    }
    assert found["fgsm_accuracy"] < found["accuracy"] and found["ood_auroc"] > 0.5
    with torch.no_grad():
        assert robustness(model, data, bins=5, epsilon=0)["fgsm_accuracy"] == found["accuracy"]


def test_test_images_only_when_asked_for() -> None:
    data, model = load("digits"), digits_net()
    assert robustness(model, data, split="test")["accuracy"] == evaluate(model, data)["test_accuracy"]
    assert calibration(model, data, split="test") != calibration(model, data)
    for function in (calibration, ood_auroc, fgsm_accuracy, robustness):
        with pytest.raises(DataError, match="has no test images"):
            function(Brightness(), two_greys(), split="test")  # type: ignore[operator]
        with pytest.raises(DataError, match="has no split 'vla'"):
            function(Brightness(), two_greys(), split="vla")  # type: ignore[operator]


def test_what_is_no_question_of_images() -> None:
    text, model, data = load("pydoc", characters=20_000), Brightness(), two_greys()
    for function in (calibration, ood_auroc, fgsm_accuracy, robustness):
        with pytest.raises(SettingError, match="'pydoc' holds no images"):
            function(model, text)  # type: ignore[operator]
    with pytest.raises(SettingError, match="'pydoc' holds no images; give some, or 'noise'"):
        ood_auroc(model, data, text)
    with pytest.raises(SettingError, match="digits has images 1x8x8, greys100-140 1x4x4.*with size=4"):
        robustness(model, data, load("digits"))
    with pytest.raises(SettingError, match="other='svhn': give data from nasbench.data.load, or 'noise'"):
        ood_auroc(model, data, "svhn")
    for seed in (-1, 0.5):
        with pytest.raises(SettingError, match="seed=.*whole number"):
            ood_auroc(model, data, seed=seed)  # type: ignore[arg-type]
    for epsilon in (-0.1, 8, math.nan, "0.1"):
        with pytest.raises(SettingError, match="epsilon=.*pixels go from 0 to 1"):
            fgsm_accuracy(model, data, epsilon)  # type: ignore[arg-type]
        with pytest.raises(SettingError, match="epsilon="):
            robustness(model, data, epsilon=epsilon)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="bins=0"):
        calibration(model, data, bins=0)
    assert not model.seen


def test_models_that_give_no_logits_or_no_gradient() -> None:
    class Steps(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(SettingError, match="Steps has no gradient by its input"):
        fgsm_accuracy(Steps(), two_greys())
    with pytest.raises(SettingError, match=r"Sequential gives \(4, 5\) for 4 images.*here \(4, 2\)"):
        calibration(nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), two_greys())
