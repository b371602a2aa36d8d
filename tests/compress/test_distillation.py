from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import compress
import nasbench as nb
from compress.discriminators import MODES
from compress.distillation import RECIPE, DistillationLoss, distill, distillation_loss
from compress.errors import CompressionError
from compress.stages import Stage
from nasbench.batches import Data


@pytest.fixture(scope="module")
def data() -> Data:
    return nb.data.load("digits", train_images=300)


def network(width: int, seed: int, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(width)
    layers = [nn.Conv2d(1, width, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * width, classes))


TEACHERS = [network(6, 1), network(8, 2)]
PLAIN: dict[str, Any] = {"epochs": 2, "batch_size": 32, "device": "cpu", "progress": False}
STAGES: dict[str, Stage | str] = {"2": "2", "5": Stage(("5", "1"), weight=0.01, length=50, similarity="l2")}


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def mislabelled(data: Data) -> Data:
    twin = copy.copy(data)
    generator = torch.Generator().manual_seed(0)
    twin._labels = torch.randint(10, data._labels.shape, generator=generator)  # type: ignore[attr-defined]
    return twin


class Seen(nb.Callback):
    """What the optimizer's step begins with, and the learning rates of all optimizers."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_step(self, run: nb.Run) -> None:
        self.rates.append(run.optimizer.param_groups[0]["lr"])


class Stop(nb.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: nb.Run) -> None:
        if run.step == self.step:
            raise KeyboardInterrupt


# The loss -------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_the_difference_of_probabilities() -> None:
    teachers = [nn.Linear(8, 5), nn.Linear(8, 5)]
    x, logits = torch.randn(12, 8), torch.randn(12, 5, requires_grad=True)
    DistillationLoss(teachers)(x, logits).backward()
    mean = (teachers[0](x).softmax(1) + teachers[1](x).softmax(1)) / 2
    torch.testing.assert_close(logits.grad, ((logits.softmax(1) - mean) / 12).detach())


def test_temperature_softens_and_its_square_keeps_the_gradients_size() -> None:
    teacher, x = nn.Linear(8, 5), torch.randn(12, 8)
    logits = torch.randn(12, 5, requires_grad=True)
    DistillationLoss(teacher, temperature=4.0)(x, logits).backward()
    expected = 4 * ((logits / 4).softmax(1) - (teacher(x) / 4).softmax(1)) / 12  # T^2 / T
    torch.testing.assert_close(logits.grad, expected.detach())
    # As T grows, it becomes the gradient of the squared distance of centred logits.
    logits.grad = None
    DistillationLoss(teacher, temperature=1e3)(x, logits).backward()
    difference = logits - logits.mean(1, keepdim=True) - (teacher(x) - teacher(x).mean(1, keepdim=True))
    torch.testing.assert_close(logits.grad, (difference / 5 / 12).detach(), atol=1e-4, rtol=1e-2)


def test_labels_count_as_much_as_hard_says() -> None:
    teacher, x, y = nn.Linear(8, 5), torch.randn(12, 8), torch.randint(5, (12,))
    logits = torch.randn(12, 5)
    soft = DistillationLoss(teacher, temperature=2.0)(x, logits)
    assert torch.equal(soft, DistillationLoss(teacher, temperature=2.0)(x, logits, y))
    mixed = DistillationLoss(teacher, temperature=2.0, hard=0.3)(x, logits, y)
    torch.testing.assert_close(mixed, 0.7 * soft + 0.3 * functional.cross_entropy(logits, y))


def test_the_loss_is_least_where_the_student_says_what_the_teachers_say() -> None:
    probabilities = torch.rand(6, 4).softmax(1)
    least = distillation_loss(probabilities.log(), probabilities)
    torch.testing.assert_close(least, -(probabilities * probabilities.log()).sum(1).mean())
    assert all(distillation_loss(torch.randn(6, 4), probabilities) > least for _ in range(5))


def test_in_a_loop_of_ones_own_teachers_stay_out_of_everything() -> None:
    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 3)
            self.loss = DistillationLoss(nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3)))

    learner = Learner()
    teacher = learner.loss.teachers.all[0]
    assert isinstance(teacher, nn.Module)
    before = copy.deepcopy(teacher.state_dict())
    assert list(learner.state_dict()) == ["net.weight", "net.bias"]
    learner.train()
    x = torch.randn(16, 8)
    learner.loss(x, learner.net(x)).backward()
    assert teacher.training, "it was, and nobody asked to change that"
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_gradients_are_exact_in_float64() -> None:
    soft = torch.rand(3, 4, dtype=torch.float64).softmax(1)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, soft, 2.5, 0.2, torch.tensor([0, 3, 1])), logits)


def test_bfloat16_students_have_a_loss_in_float32() -> None:
    logits = torch.randn(4, 3).bfloat16().requires_grad_()
    loss = DistillationLoss(nn.Linear(8, 3))(torch.randn(4, 8), logits)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad is not None and logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature=0; it must be a number above 0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": "2"}, "temperature='2'"),
        ({"hard": 1}, "hard=1; the weight of labels"),
        ({"hard": -0.1}, "hard=-0.1"),
    ],
)
def test_bad_settings_of_the_loss_are_refused(data: Data, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        DistillationLoss(nn.Linear(8, 3), **settings)
    with pytest.raises(CompressionError, match=message):
        distill(network(3, 0), TEACHERS, data=data, **PLAIN, **settings)


def test_what_does_not_fit_the_loss_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"the student gives \(4, 5\), the teachers \(4, 3\)"):
        DistillationLoss(nn.Linear(8, 3))(torch.zeros(4, 8), torch.zeros(4, 5))
    with pytest.raises(CompressionError, match=r"hard=0.5 gives labels a weight.*pass loss\(x, logits, y\)"):
        DistillationLoss(nn.Linear(8, 3), hard=0.5)(torch.zeros(4, 8), torch.zeros(4, 3))


# Distillation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_labels_are_not_used(data: Data, mode: str) -> None:
    student = network(3, 0)
    settings = PLAIN | {"mode": mode, "stages": STAGES, "discriminator_lr": 0.01}
    one = distill(student, TEACHERS, data=data, **settings)
    other = distill(student, TEACHERS, data=mislabelled(data), **settings)
    assert equal(one, other)
    assert not equal(one, student.eval())


def test_with_hard_labels_are_used(data: Data) -> None:
    student = network(3, 0)
    one = distill(student, TEACHERS, data=data, hard=0.5, **PLAIN)
    assert not equal(one, distill(student, TEACHERS, data=mislabelled(data), hard=0.5, **PLAIN))


def test_student_and_teachers_stay_as_they_are(data: Data) -> None:
    student, teachers = network(3, 0), [network(6, 1), network(8, 2).eval()]
    everyone = [student, *teachers]
    before, flags = copy.deepcopy(everyone), [module.training for model in everyone for module in model.modules()]
    state = torch.get_rng_state()
    distilled = distill(student, teachers, data=data, mode="alternate", stages=STAGES, **PLAIN)
    assert torch.equal(state, torch.get_rng_state())
    assert all(equal(a, b) for a, b in zip(before, everyone, strict=True))
    assert flags == [module.training for model in everyone for module in model.modules()]
    assert all(parameter.grad is None for model in everyone for parameter in model.parameters())
    for model in [distilled, *everyone]:
        assert not any(module._forward_hooks for module in model.modules())
    assert list(distilled.state_dict()) == list(student.state_dict()) and not distilled.training
    again = distill(student, teachers, data=data, mode="alternate", stages=STAGES, inplace=True, **PLAIN)
    assert again is student and equal(again, distilled)


def test_the_recipe_is_gentle() -> None:
    assert (RECIPE.optimizer, RECIPE.lr, RECIPE.momentum, RECIPE.nesterov) == ("sgd", 0.01, 0.9, False)
    assert RECIPE.weight_decay == 0 and RECIPE.auxiliary == 0


def test_without_a_difference_to_the_teacher_nothing_is_learned(data: Data) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    distilled = distill(student, copy.deepcopy(student), data=data, **PLAIN)
    torch.testing.assert_close(distilled[1].weight, student[1].weight, atol=1e-6, rtol=0)  # no weight decay either


def test_a_poor_student_comes_near_its_teachers(data: Data) -> None:
    teachers = [nb.fit(copy.deepcopy(teacher), data, **(PLAIN | {"epochs": 10})) for teacher in TEACHERS]
    student = network(3, 0)
    before = nb.validate(student, data)["val_accuracy"]
    good = min(nb.validate(teacher, data)["val_accuracy"] for teacher in teachers)
    settings = PLAIN | {"data": mislabelled(data), "epochs": 10, "lr": 0.1}
    assert good > 0.8
    for mode in MODES:
        distilled = distill(student, teachers, mode=mode, **settings)
        assert nb.validate(distilled, data)["val_accuracy"] > max(before + 0.3, good - 0.15), mode


@pytest.mark.parametrize("mode", ["joint", "reversed", "alternate"])
def test_discriminators_change_the_student_and_keep_their_own_learning_rate(
    data: Data, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import discriminators

    made = []

    class Watched(discriminators.Adversary):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.before, self.rates = copy.deepcopy(self.discriminators), set[float]()
            made.append(self)

        def step(self) -> None:
            self.rates |= {group["lr"] for group in self.optimizer.param_groups}
            super().step()

    monkeypatch.setattr("compress.distillation.Adversary", Watched)
    student, seen = network(3, 0), Seen()
    settings = PLAIN | {"data": data, "seed": 1}  # with seed 0, the last ReLU of "joint" is dead from the start
    plain = distill(student, TEACHERS, callbacks=[seen], **settings)
    assert not made
    other = distill(student, TEACHERS, mode=mode, discriminator_lr=0.02, **settings)
    assert not equal(plain, other)
    assert len(set(seen.rates)) == len(seen.rates) > 10, "the student's falls along a cosine"
    (adversary,) = made
    assert adversary.rates == {0.02} and not equal(adversary.before, adversary.discriminators)


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_is_the_unbroken_one(data: Data, tmp_path: Path, mode: str) -> None:
    student, checkpoint = network(3, 0), tmp_path / "run.pt"
    settings = PLAIN | {"data": data, "mode": mode, "ensemble": "random", "stages": STAGES, "discriminator_lr": 0.02}
    unbroken = distill(student, TEACHERS, **settings)
    for step in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            distill(student, TEACHERS, checkpoint=checkpoint, callbacks=[Stop(step)], **settings)
    stored = torch.load(checkpoint, weights_only=True)
    assert list(stored["model"]) == list(student.state_dict())
    ((_, state),) = stored["callbacks"]
    assert (state["adversary"] is None) == (mode == "off")
    assert not torch.equal(stored["model"]["0.weight"], unbroken.state_dict()["0.weight"])
    assert equal(unbroken, distill(student, TEACHERS, checkpoint=checkpoint, **settings))
    assert equal(unbroken, distill(student, TEACHERS, checkpoint=checkpoint, **settings)), "already finished"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "joint"}, "another mode: 'off', here it is 'joint'"),
        ({"temperature": 2.0}, "another temperature"),
        ({"teachers": TEACHERS[::-1]}, "another teachers or labels"),
        ({"stages": STAGES}, "another stages"),
    ],
)
def test_the_checkpoint_of_another_distillation_is_refused(
    data: Data, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = PLAIN | {"teachers": TEACHERS, "data": data, "checkpoint": tmp_path / "run.pt"}
    student = network(3, 0)
    distill(student, **settings)
    with pytest.raises(CompressionError, match=message):
        distill(student, **(settings | changes))


def test_a_random_ensemble_has_one_teacher_in_each_step(data: Data) -> None:
    asked: list[int] = []

    def teacher(number: int) -> Any:
        def answer(x: Tensor) -> Tensor:
            asked.append(number)
            return x.flatten(1)[:, :10]

        return answer

    runs = []
    for seed in (0, 0, 1):
        distill(network(3, 0), [teacher(0), teacher(1)], data=data, ensemble="random", seed=seed, **PLAIN)
        assert asked[:2] == [0, 1], "both are tried before the training"
        runs.append(asked[2:])
        asked.clear()
    assert len(runs[0]) == 2 * data.steps(32) and set(runs[0]) == {0, 1}
    assert runs[0] == runs[1] != runs[2]


def test_stages_teach_layers_inside(data: Data) -> None:
    student, teacher = network(6, 0), nb.fit(network(6, 1), data, **PLAIN)
    x, _ = next(iter(data.eval_batches("train", 64)))
    stage = Stage("2", weight=10.0, length=384, similarity="l2")

    def apart(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return stage.loss(stage.pooled(model[:3](x)), stage.pooled(teacher[:3](x))).item()

    plain = distill(student, teacher, data=data, **PLAIN)
    staged = distill(student, teacher, data=data, stages={"2": stage}, **PLAIN)
    assert apart(staged) < 0.9 * apart(plain)


class Spare(nn.Module):
    """A network with a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = network(3, 0), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("stages", "who"), [({"spare": "net.2"}, "the student"), ({"net.2": "spare"}, "teacher 1")])
def test_layers_that_are_not_called_are_refused(data: Data, stages: dict[str, str], who: str) -> None:
    with pytest.raises(CompressionError, match=f"layer 'spare' of {who} is not called"):
        distill(Spare(), Spare(), data=data, stages=stages, **PLAIN)


def test_two_stages_may_have_one_layer_of_a_teacher(data: Data) -> None:
    student = network(3, 0)
    one = distill(student, TEACHERS, data=data, stages={"0": "2", "2": "2"}, **PLAIN)
    assert not equal(one, distill(student, TEACHERS, data=data, stages={"0": "2"}, **PLAIN))


def test_a_student_without_values_is_refused(data: Data) -> None:
    with pytest.raises(CompressionError, match="is on the meta device"):
        distill(network(3, 0).to("meta"), TEACHERS, data=data, **PLAIN)


@pytest.mark.parametrize("mode", ["off", "reversed"])
def test_masks_hold(data: Data, mode: str) -> None:
    student = compress.prune(network(8, 0), 0.2)
    masks = {name: mask.clone() for name, mask in compress.masks(student).items()}
    distilled = distill(student, TEACHERS, data=data, mode=mode, stages={"2": "2"}, **PLAIN)
    for name, mask in compress.masks(distilled).items():
        weight = distilled.get_submodule(name).weight
        assert torch.equal(mask, masks[name]) and not weight[~mask].any() and weight[mask].all()
    assert not torch.equal(distilled[5].weight, student[5].weight)
    assert list(distilled.state_dict()) == list(student.state_dict())


def test_masks_that_move_learn_from_teachers_too(data: Data) -> None:
    student = compress.prune(network(8, 0), 0.2)
    moving = compress.DynamicCallback("rigl", interval=3)
    distilled = distill(student, TEACHERS, data=data, callbacks=[moving], **PLAIN)
    kept = [{name: mask.sum() for name, mask in compress.masks(model).items()} for model in (student, distilled)]
    assert kept[0] == kept[1] and moving.sparsity.updates > 0


def test_students_of_few_bits_keep_their_grids(data: Data) -> None:
    from compress.quantization import quantize
    from compress.shift import dense_shift

    x, _ = next(iter(data.eval_batches("train", 2)))
    quantized = quantize(network(4, 0), bits=3)
    shifted = dense_shift(network(4, 0), bits=2, example=x, include_ends=True)
    for student in (quantized, shifted):
        distilled = distill(student, TEACHERS, data=data, **PLAIN)
        assert list(distilled.state_dict()) == list(student.state_dict())
        assert not torch.equal(distilled[5].weight, student[5].weight)
        assert max(len(row.unique()) for row in distilled[5].weight) <= 8, "of 64, at most 2^3 values"


def test_one_teacher_of_any_kind_is_enough(data: Data) -> None:
    teacher = network(6, 1).eval()
    one = distill(network(3, 0), teacher, data=data, **PLAIN)
    other = distill(network(3, 0), [lambda x: teacher(x).detach()], data=data, **PLAIN)
    assert equal(one, other)


@pytest.mark.slow
def test_a_teacher_in_onnxruntime_teaches(data: Data, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    teacher = network(6, 1).eval()
    x, _ = next(iter(data.eval_batches("train", 4)))
    compress.export(teacher, tmp_path / "teacher.onnx", example=x)
    session = runtime.InferenceSession(tmp_path / "teacher.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    distilled = distill(
        network(3, 0),
        lambda x: torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0]),
        data=data,
        **PLAIN,
    )
    expected = distill(network(3, 0), teacher, data=data, **PLAIN)
    torch.testing.assert_close(distilled[5].weight, expected[5].weight, atol=1e-4, rtol=0)


def without_norms(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * width, 10))


def in_processes(mode: str) -> nn.Module:
    settings = PLAIN | {"data": nb.data.load("digits", train_images=300), "mode": mode, "discriminator_lr": 0.05}
    return distill(without_norms(3, 0), TEACHERS, stages={"1": "2"}, ensemble="random", **settings)


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[4])
from test_distillation import in_processes
rank, folder, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.save(in_processes(mode).state_dict(), f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_the_student_of_one(mode: str, tmp_path: Path) -> None:
    command = [str(tmp_path), mode, str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    running = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *command], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    expected = in_processes(mode).state_dict()
    for name, weight in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": None}, "no teachers"),
        ({"teachers": None, "labels": torch.zeros(3)}, "labels are in a file .* got Tensor"),
        ({"device": "cuda:99"}, "cuda"),
        ({"teachers": []}, "no teachers"),
        ({"teachers": ["resnet18"]}, "teacher 1 is of type str"),
        ({"teachers": [TEACHERS[0], network(3, 0, classes=12)]}, "teacher 2 .* have 10 classes"),
        ({"student": network(3, 0, classes=12)}, r"\(2, 12\), but 'digits' has 10 classes"),
        ({"student": TEACHERS[1]}, "teacher 2 is the student itself"),
        ({"student": nn.Sequential(TEACHERS[1]), "inplace": True}, "teacher 2 shares weights with the student"),
        ({"student": "net"}, "model is a torch.nn.Module, got the string 'net'"),
        ({"mode": "grl"}, "there is no mode 'grl'.*Known: alternate, joint, off, reversed"),
        ({"ensemble": "median"}, "there is no ensemble 'median'"),
        ({"discriminator_lr": 0}, "discriminator_lr=0"),
        ({"data": "digits"}, "data is what nasbench.data.load returns, got str"),
        ({"split": "test"}, "only nasbench.evaluate reads the test images"),
        ({"split": "training"}, "no split 'training'"),
        ({"label_smoothing": 0.1}, "label_smoothing has no use"),
        ({"auxiliary": 0.4}, "leave auxiliary=0"),
        ({"stages": {"2": "layer"}}, "teacher 1 .* has no layer 'layer'"),
        ({"weight_dekay": 0.1}, "a recipe has no field 'weight_dekay'"),
    ],
)
def test_bad_arguments_are_refused_before_training(data: Data, changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = PLAIN | {"student": network(3, 0), "teachers": TEACHERS, "data": data} | changes
    before = copy.deepcopy(settings["student"])
    with pytest.raises(ValueError, match=message):
        distill(**settings)
    if isinstance(before, nn.Module):
        assert equal(before, settings["student"])
