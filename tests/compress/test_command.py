"""`nasbench compress`: what it prints, the file it leaves, and what it says to a bad line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import compress
import nasbench as nb
from compress.deployed import Deployed
from nasbench.cli import main
from nasbench.profile import measure
from search_spaces import NASBench201

STUDY = "tiny"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one small search on 200 digits."""
    folder = tmp_path_factory.mktemp("runs")
    data = nb.data.load("digits", train_images=200)
    space = NASBench201(channels=4, cells=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nb.SearchResult, "report", lambda self, path=None: None)
        patch.setattr(nb.SearchResult, "plot", lambda self, path=None: None)
        nb.search(space, data, "random", trials=2, epochs=2, study=STUDY, folder=folder, device="cpu", progress=False)
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str | Path, status: int = 0) -> str:
    """Run `nasbench compress`, which is to end with this status; return what it printed, or its error of one line."""
    capsys.readouterr()
    assert main(["compress", *map(str, words)]) == status
    out, err = capsys.readouterr()
    if status:
        assert err.startswith("nasbench: ") and err.count("\n") == 1
    return out if status == 0 else err


def best(runs: Path) -> nb.Trial:
    return nb.SearchResult.load(runs / STUDY / "result.json").best


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_best_network_of_a_study_is_pruned(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("prune", STUDY, "--folder", runs, "--density", "0.3", "--distribution", "erk")
    out = said(capsys, *line, "--method", "random", "--seed", "5", "--out", "own.safetensors")
    data, model = nb.data.load("digits", train_images=200), best(runs).build()
    expected = compress.prune(model, 0.3, distribution="erk", method="random", seed=5).eval()
    found = compress.load("own.safetensors")
    assert same(found.state_dict(), expected.state_dict())
    accuracies = [nb.validate(network, data)["val_accuracy"] for network in (model, expected)]
    assert f"validation accuracy: {accuracies[0]:.4f} before, {accuracies[1]:.4f} pruned\n" in out
    assert f"{Path('own.safetensors').stat().st_size:,}" in out
    assert out.splitlines()[-1] == "written to own.safetensors"


def test_a_folder_and_a_file_name_the_network_too(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "prune", runs / STUDY, "--density", "0.5", "--exclude", "stem")
    half = compress.load("pruned.safetensors")
    assert same(
        half.state_dict(), compress.prune(best(runs).build(), 0.5, method="magnitude", exclude=["stem"]).state_dict()
    )
    compress.save(best(runs).build(), "dense.safetensors")
    line = ("prune", "dense.safetensors", "--shape", "1,8,8", "--density", "0.5", "--exclude", "stem")
    out = said(capsys, *line, "--out", "again.safetensors")
    assert same(compress.load("again.safetensors").state_dict(), half.state_dict())
    assert "validation accuracy" not in out  # the file names no data


def test_masks_hold_while_it_trains_on(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["prune", STUDY, "--folder", runs, "--density", "0.2", "--data", "digits", "--data-set", "train_images=300"]
    line += ["--epochs", "2", "--set", "batch_size=32", "lr=0.02", "--device", "cpu"]
    out = said(capsys, *line)
    found, model = compress.load("pruned.safetensors"), best(runs).build()
    pruned = compress.prune(model, 0.2, method="magnitude")
    assert same(compress.masks(found), compress.masks(pruned))
    data = nb.data.load("digits", train_images=300)
    nb.fit(pruned, data, epochs=2, batch_size=32, lr=0.02, device="cpu", progress=False)
    assert same(found.state_dict(), pruned.state_dict())
    assert f", {nb.validate(pruned, data)['val_accuracy']:.4f} after 2 more epochs\n" in out


@pytest.mark.parametrize(("method", "distribution"), [("snip", "grasp"), ("synflow", None)])
def test_scores_come_from_training_images(
    runs: Path, capsys: pytest.CaptureFixture[str], method: str, distribution: str | None
) -> None:
    rule = [] if distribution is None else ["--distribution", distribution]
    said(capsys, "prune", STUDY, "--folder", runs, "--density", "0.2", "--method", method, *rule, "--seed", "3")
    x, y = next(nb.data.load("digits", train_images=200).train_batches(128, seed=3, epoch=0, augment=False))
    model = best(runs).build()
    expected = compress.prune(model, 0.2, method=method, distribution=distribution, batch=(x, y), seed=3)
    assert same(compress.masks(compress.load("pruned.safetensors")), compress.masks(expected))


def test_channels_of_a_study_and_what_the_file_holds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "prune", STUDY, "--folder", runs, "--density", "0.5", "--structured", "--method", "taylor")
    small, large = compress.load("pruned.safetensors"), best(runs).build()
    macs = [measure(network, (1, 8, 8)).macs for network in (small, large)]
    assert macs[0] < macs[1]
    held = said(capsys, "report", "pruned.safetensors", "--shape", "1,8,8")
    assert f"{macs[0]:,}" in held and f"{Path('pruned.safetensors').stat().st_size:,}" in held
    alone = said(capsys, "report", "pruned.safetensors").splitlines()
    assert [line.split()[0] for line in alone[1:]] == [
        *("params", "weights", "nonzeros", "bytes", "density", "bits_per_weight", "--shape")
    ]
    assert [line.split() for line in alone[1:5]] == [line.split() for line in held.splitlines()[1:5]]
    assert alone[-1] == "--shape C,H,W or --data adds multiply-adds and latency"
    again = said(capsys, "report", "pruned.safetensors", "--data", "digits")
    assert re.findall(r"^(\w+) +([\d,]+)$", again, re.MULTILINE) == re.findall(r"^(\w+) +([\d,]+)$", held, re.MULTILINE)


def test_weights_become_powers_of_two_and_train_on(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line: list[str | Path] = [
        "shift",
        STUDY,
        "--folder",
        runs,
        "--bits",
        "3",
        "--epochs",
        "1",
        "--set",
        "batch_size=64",
    ]
    out = said(capsys, *line, "--exclude", "stem", "--device", "cpu")
    found, model = compress.load("shifted.safetensors"), best(runs).build()
    data = nb.data.load("digits", train_images=200)
    example = next(data.eval_batches("train", 1))[0]
    shifted = compress.dense_shift(model, 3, init="convert", exclude=["stem"], example=example)
    converted = nb.validate(shifted, data)["val_accuracy"]
    nb.fit(shifted, data, epochs=1, batch_size=64, device="cpu", progress=False)
    assert same(found.state_dict(), compress.freeze(shifted).state_dict())
    assert {step.bits for step in compress.low_bits(found).values()} == {3}
    accuracies = f"{converted:.4f} shifted, {nb.validate(found, data)['val_accuracy']:.4f} after 1 more epoch\n"
    assert accuracies in out
    assert "few bits only: smaller when packed, computed in float32, no faster on this device" in out


def test_weights_of_few_bits(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "quantize", STUDY, "--folder", runs, "--bits", "3", "--group", "8", "--asymmetric")
    expected = compress.quantize(best(runs).build(), 3, group=8, symmetric=False)
    found = compress.load("quantized.safetensors")
    assert same(found.state_dict(), compress.freeze(expected).state_dict())
    layer = next(iter(compress.low_bits(found)))
    compress.save_policy({layer: "weights5"}, "policy.json")
    said(capsys, "quantize", STUDY, "--folder", runs, "--policy", "policy.json", "--out", "own.safetensors")
    assert {name: step.bits for name, step in compress.low_bits(compress.load("own.safetensors")).items()} == {layer: 5}


def test_int8_and_many_files_side_by_side(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    out = said(capsys, "quantize", STUDY, "--folder", runs, "--int8")
    deployed = Deployed.load("quantized.onnx")
    assert "int8" in deployed.policy.values()
    data = nb.data.load("digits", train_images=200)
    assert f"{nb.validate(deployed, data)['val_accuracy']:.4f} deployed\n" in out
    assert "onnxruntime" in out and out.endswith("written to quantized.onnx\n")
    assert f"layers: {len(deployed.policy)} int8\n" in out
    compress.save(best(runs).build(), "dense.safetensors")
    many = ("report", "dense.safetensors", "quantized.onnx", "--data", "digits", "--data-set", "train_images=200")
    out = said(capsys, *many, "--baseline", STUDY, "--folder", runs, "--plot", "all.png")
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()[1:4]}
    assert list(rows) == ["baseline", "dense.safetensors", "quantized.onnx"]
    assert [row[-1] for row in rows.values()] == ["torch", "torch", "onnxruntime"]
    assert rows["quantized.onnx"][1] == f"{deployed.bytes:,}"
    assert Path("all.png").read_bytes().startswith(b"\x89PNG")
    sizes = said(capsys, "report", "dense.safetensors", "quantized.onnx")
    assert sizes.splitlines()[-1] == "--shape C,H,W or --data adds multiply-adds and latency"


def test_a_student_learns_from_its_teachers(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "prune", STUDY, "--folder", runs, "--density", "0.3")
    line: list[str | Path] = [
        "distill",
        "pruned.safetensors",
        "--teachers",
        STUDY,
        "--folder",
        runs,
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    line += ["--data", "digits", "--data-set", "train_images=200"]
    out = said(capsys, *line, "--set", "batch_size=64", "--seed", "4")
    data = nb.data.load("digits", train_images=200)
    student = compress.load("pruned.safetensors")
    expected = compress.distill(
        student, [best(runs).build()], data=data, epochs=1, seed=4, device="cpu", batch_size=64, progress=False
    )
    found = compress.load("distilled.safetensors")
    assert same(found.state_dict(), expected.state_dict())
    assert f"{nb.validate(found, data)['val_accuracy']:.4f} after 1 epoch; of the teachers " in out
    assert out.splitlines()[-1] == f"written to distilled.safetensors; the baseline is {STUDY}"


def test_a_network_of_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    from torchvision.models import squeezenet1_1

    line = ("prune", "torchvision:squeezenet1_1", "--density", "0.1", "--distribution", "uniform")
    out = said(capsys, *line, "--seed", "2", "--shape", "3,64,64")
    torch.manual_seed(2)
    expected = compress.prune(squeezenet1_1(), 0.1, distribution="uniform", method="magnitude")
    found = compress.load("pruned.safetensors", squeezenet1_1())
    assert same(found.state_dict(), expected.state_dict())
    assert f"{Path('pruned.safetensors').stat().st_size:,}" in out
    assert "no faster on this device\nwritten to pruned.safetensors\n" in out
    error = said(capsys, "prune", "torchvision:squeezenot", "--density", "0.1", "--shape", "3,9,9", status=2)
    assert "Unknown model squeezenot" in error
    error = said(capsys, *line, "--shape", "3,64,64", "--weights", "imagenet", status=2)
    assert "no weights 'imagenet' of squeezenet1_1; known: DEFAULT, IMAGENET1K_V1" in error


def test_bad_lines_say_what_is_wrong_and_write_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: str | Path) -> str:
        return said(capsys, "prune", *words, status=2)

    study = (STUDY, "--folder", runs, "--density")
    vision = ("torchvision:squeezenet1_1", "--shape", "3,64,64", "--density", "0.1")
    assert f"StudyError: 'tyni' is no file, no study (found in {runs}/: tiny)" in error(
        "tyni", "--density", "0.1", "--folder", runs
    )
    assert "study tiny has no trial 7, only 2 trials" in error(*study, "0.1", "--trial", "7")
    assert "CompressionError" in error(*study, "1.5")
    assert "CompressionError" in error(*study, "0.1", "--exclude", "stem.9")
    assert "there is no pruning method 'snap'" in error(*study, "0.1", "--method", "snap")
    assert "snip needs images to learn from: give --data" in error(*vision, "--method", "snip")
    assert "grasp needs images to learn from" in error(*vision, "--distribution", "grasp")
    assert "--epochs needs images to learn from" in error(*vision, "--epochs", "2")
    assert "Give --data, or --shape such as 3,32,32" in error("torchvision:squeezenet1_1", "--density", "0.1")
    for shape in ("3,32", "3,x,3", "0,2,2"):
        assert f"--shape {shape} is no size of images" in error(*vision, "--shape", shape)
    assert "the network does not take a batch of 1 x 3 x 8 x 8" in error(*study, "0.1", "--shape", "3,8,8")
    assert "'lr' is no setting. Write KEY=VALUE" in error(*study, "0.1", "--epochs", "1", "--set", "lr")
    assert "there is no data/none.npz" in error(*study, "0.1", "--data", "data/none.npz")
    compressed = ("--folder", runs, "--data", "digits")
    assert "bits is a whole number from 2 to 8" in said(capsys, "shift", STUDY, *compressed, "--bits", "9", status=2)
    assert "there is no init 'zero'" in said(capsys, "shift", STUDY, *compressed, "--init", "zero", status=2)
    assert "--init scratch forgets" in said(capsys, "shift", STUDY, *compressed, "--init", "scratch", status=2)
    for wrong, text in (
        (("--bits", "9"), "bits is a whole number from 2 to 8"),
        (("--group", "x"), "--group x: give a number of weights"),
        (("--int8", "--bits", "4"), "--bits has no meaning with --int8"),
        (("--policy", "none.json", "--group", "4"), "--group has no meaning with --policy FILE"),
        (("--policy", "none.json"), "cannot read a policy from none.json"),
        (("--int8", "--epochs", "2"), "--int8 calibrates a trained network"),
    ):
        assert text in said(capsys, "quantize", STUDY, *compressed, *wrong, status=2)
    assert "--int8 needs training images" in said(capsys, "quantize", *vision[:3], "--int8", status=2)
    assert "distill needs images" in said(capsys, "distill", *vision[:3], "--teachers", vision[0], status=2)
    wrong_mode = ("distill", STUDY, *compressed, "--teachers", STUDY, "--mode", "some")
    assert "'some'" in said(capsys, *wrong_mode, status=2)
    assert list(tmp_path.iterdir()) == []
    for words in ((), ("--shape", "1,8,8"), ("--shape", "3,x,3"), ("--data", "data/none.npz")):
        assert "cannot read none.safetensors" in said(capsys, "report", "none.safetensors", *words, status=2)
    assert "a study is given as --baseline" in said(capsys, "report", STUDY, status=2)
    with pytest.raises(SystemExit, match="2"):
        main(["compress", "prune", "tiny"])
    assert "--density" in capsys.readouterr().err


def test_settings_that_change_nothing_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune = ("prune", STUDY, "--folder", runs, "--density", "0.5")
    assert "nothing is trained: give --epochs" in said(capsys, *prune, "--set", "lr=0.1", status=2)
    for setting in ("epochs=3", "seed=3", "device=cpu"):
        error = said(capsys, *prune, "--epochs", "1", "--set", setting, status=2)
        assert f"--set {setting} is no field to set: give --{setting.replace('=', ' ')}" in error
    assert "no field 'rl'; did you mean 'lr'" in said(capsys, *prune, "--epochs", "1", "--set", "rl=1", status=2)
    learned = ("quantize", STUDY, "--folder", runs, "--learned-step")
    assert "--learned-step learns while it trains: give --epochs" in said(capsys, *learned, status=2)
    assert list(tmp_path.iterdir()) == []


def test_the_ending_of_a_file_says_what_it_is(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize = ("quantize", STUDY, "--folder", runs)
    error = said(capsys, *quantize, "--int8", "--out", "small.safetensors", status=2)
    assert "an ONNX file, which ends in .onnx" in error
    assert "is a safetensors file, and .onnx is for --int8" in said(capsys, *quantize, "--out", "x.onnx", status=2)
    assert list(tmp_path.iterdir()) == []
    Path("deployed.onnx").write_bytes(b"")
    error = said(capsys, "prune", "deployed.onnx", "--density", "0.5", "--data", "digits", status=2)
    assert "deployed.onnx is a deployed network, which only runs" in error


def test_networks_that_the_command_line_cannot_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compress.save(torch.nn.Linear(4, 4), "own.safetensors")
    error = said(capsys, "quantize", "own.safetensors", "--shape", "1,2,2", status=2)
    assert "In Python give yours: compress.load('own.safetensors', network)" in error
    joint = nb.SearchResult(
        NASBench201(channels=4, cells=1, classes=10, in_channels=1) * compress.bits(4, 8), {"bytes": "minimize"}, ()
    )
    (tmp_path / "runs" / "joint").mkdir(parents=True)
    (tmp_path / "runs" / "joint" / "result.json").write_text(joint.to_json())
    error = said(capsys, "prune", "joint", "--density", "0.5", status=2)
    assert "StudyError: cannot build the networks of study joint" in error and "need Python" in error


def test_a_plot_is_refused_before_anything_is_measured(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress.save(best(runs).build(), "dense.safetensors")
    line = ("report", "dense.safetensors", "--folder", runs, "--plot")
    for more in ((), ("--shape", "1,8,8"), ("--baseline", STUDY)):
        assert "give --data, or --baseline and --shape" in said(capsys, *line, "all.png", *more, status=2)
    assert "there are no .pngg pictures" in said(capsys, *line, "all.pngg", "--data", "digits", status=2)
    said(capsys, *line, "all.png", "--shape", "1,8,8", "--baseline", STUDY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "dense.safetensors"]


def test_distillation_asks_for_images_and_not_for_a_shape(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compress.save(best(runs).build(), "dense.safetensors")
    error = said(capsys, "distill", "dense.safetensors", "--teachers", STUDY, "--folder", runs, status=2)
    assert "distill needs images to learn from: give --data" in error
