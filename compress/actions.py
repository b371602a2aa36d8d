"""What the commands `nasbench compress prune|shift|quantize|distill|report` do."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import nasbench as nb
from compress.errors import CompressionError
from compress.named_models import data_of, example_of, network
from compress.reporting import report
from compress.storage import read, save
from compress.subjects import is_deployed
from nasbench.cli import read_settings
from nasbench.data import Data
from nasbench.recipe import Recipe

_NEED_IMAGES = ("snip", "grasp", "taylor")
_BATCH = 128  # training images that these score weights by


def run_prune(options: argparse.Namespace) -> None:
    """Prune a network, train it on if asked, save and report."""
    from compress.pruning import prune

    model, data, example = _given(options)
    needy = [word for word in (options.method, options.distribution) if word in _NEED_IMAGES]
    if needy and data is None:
        raise nb.SettingError(f"{needy[0]} needs images to learn from: give --data.")
    batch: tuple[Any, Any] = example, None
    if needy and data is not None:
        batch = next(data.train_batches(_BATCH, seed=options.seed, epoch=0, augment=False))
    pruned = prune(
        model,
        options.density,
        distribution=options.distribution,
        method=options.method,
        exclude=options.exclude,
        batch=batch,
        seed=options.seed,
        structured=options.structured,
        example=example if options.structured else None,
    )
    _finish(options, model, pruned, "pruned", data, example)


def run_shift(options: argparse.Namespace) -> None:
    """Give a network weights that are powers of two, train it on if asked, save and report."""
    from compress.shift import dense_shift

    model, data, example = _given(options)
    if options.init in ("scratch", "low_variance") and not options.epochs:
        raise nb.SettingError(f"--init {options.init} forgets the network's weights: give --epochs to train new ones.")
    shifted = dense_shift(
        model,
        options.bits,
        init=options.init,
        exclude=options.exclude,
        include_ends=options.include_ends,
        example=example,
        seed=options.seed,
    )
    _finish(options, model, shifted, "shifted", data, example)


def run_quantize(options: argparse.Namespace) -> None:
    """Give a network weights of few bits, train it on if asked, save and report; or deploy it in int8."""
    _check_quantize(options)
    model, data, example = _given(options)
    if options.int8:
        _deploy(options, model, data, example)
        return
    if options.policy is not None:
        from compress.policy import apply_policy, load_policy

        small = apply_policy(model, load_policy(options.policy, model))
    else:
        from compress.quantization import quantize

        small = quantize(
            model,
            4 if options.bits is None else options.bits,
            group=_group(options.group),
            symmetric=not options.asymmetric,
            learned_step=options.learned_step,
            exclude=options.exclude,
        )
    options.out = options.out or "quantized.safetensors"
    _finish(options, model, small, "quantized", data, example)


def run_distill(options: argparse.Namespace) -> None:
    """Train a student by its teachers, save and report."""
    from compress.distillation import distill

    student, data, example = _given(options, "distill")
    assert data is not None
    teachers = [network(name, options)[0] for name in options.teachers]
    distilled = distill(
        student,
        teachers,
        data=data,
        mode=options.mode,
        temperature=options.temperature,
        hard=options.hard,
        epochs=options.epochs,
        seed=options.seed,
        device=options.device,
        **read_settings(options.set),
    ).cpu()
    taught = ", ".join(_accuracy(teacher, data) for teacher in teachers)
    print(
        f"validation accuracy: {_accuracy(student, data)} before, {_accuracy(distilled, data)} after "
        f"{_epochs(options.epochs)}; of the teachers {taught}"
    )
    save(distilled, options.out)
    print(report(distilled, example=example, baseline=teachers[0]))
    print(f"written to {options.out}; the baseline is {options.teachers[0]}")


def run_report(options: argparse.Namespace) -> None:
    """Say what files hold, side by side if there are several."""
    for file in options.files:  # says now, and not after the data are loaded, if there is no such file
        if not Path(file).exists():
            raise CompressionError(
                f"cannot read {file}: there is no such file. Give files of `nasbench compress` or compress.save, or a "
                "deployed .onnx; a study is given as --baseline."
            )
        if not is_deployed(file):
            read(file)
    known = options.shape is not None or options.data is not None
    _check_plot(options)
    baseline = network(options.baseline, options)[0] if options.baseline else None
    data = data_of(options)
    example = example_of(options, data) if known else None
    settings: dict[str, Any] = {"example": example, "baseline": baseline, "data": data}
    if len(options.files) == 1 and options.plot is None:
        print(report(options.files[0], **settings))
    else:
        found = report(options.files, **settings)
        print(found)
        if options.plot is not None:
            found.plot(options.plot)
            print(f"drawn in {options.plot}")
    if not known:
        print("--shape C,H,W or --data adds multiply-adds and latency")


def _given(options: argparse.Namespace, needs: str = "") -> tuple[nn.Module, Data | None, Tensor]:
    """Return the network that is to be compressed, its data, if there are any, and an input; refuse what cannot work.

    Args:
        needs: what needs data, if not only --epochs.
    """
    needs = needs or ("--epochs" if options.epochs else "")
    _check_training(options, bool(needs))
    _check_out(options)
    model, data = network(options.model, options)
    data = data_of(options) or data
    if needs and data is None:
        raise nb.SettingError(f"{needs} needs images to learn from: give --data.")
    example = example_of(options, data)
    nb.measure(model, example.shape[1:])  # says now, and not after the training, if the network takes no such input
    return model, data, example


def _finish(
    options: argparse.Namespace, model: nn.Module, small: nn.Module, done: str, data: Data | None, example: Tensor
) -> None:
    """Train a compressed network on if asked, save and report."""
    if data is not None:
        told = f"validation accuracy: {_accuracy(model, data)} before, {_accuracy(small, data)} {done}"
        if options.epochs:
            recipe = read_settings(options.set)
            nb.fit(small, data, epochs=options.epochs, seed=options.seed, device=options.device, **recipe).cpu()
            told += f", {_accuracy(small, data)} after {_epochs(options.epochs, 'more ')}"
        print(told)
    save(small, options.out)
    print(report(options.out, example=example, baseline=model))
    print(f"written to {options.out}")


def _deploy(options: argparse.Namespace, model: nn.Module, data: Data | None, example: Tensor) -> None:
    from compress.deployment import to_int8
    from compress.policy import load_policy

    if data is None:
        raise nb.SettingError("--int8 needs training images to calibrate on: give --data.")
    policy = None if options.policy is None else load_policy(options.policy, model)
    deployed = to_int8(model, data, policy=policy)
    out = options.out or "quantized.onnx"
    print(f"validation accuracy: {_accuracy(model, data)} before, {_accuracy(deployed, data)} deployed")
    deployed.save(out)
    print(report(out, example=example, baseline=model))
    counts = Counter(deployed.policy.values())
    print(f"layers: {', '.join(f'{count} {option}' for option, count in counts.items())}")
    for name, reason in deployed.kept_float.items():
        print(f"{name} stays float: {reason}")
    print(f"written to {out}")


def _check_quantize(options: argparse.Namespace) -> None:
    """Refuse options that mean nothing together."""
    weights_only: dict[str, Callable[[], bool]] = {
        "--bits": lambda: options.bits is not None,
        "--group": lambda: options.group is not None,
        "--asymmetric": lambda: options.asymmetric,
        "--learned-step": lambda: options.learned_step,
        "--exclude": lambda: bool(options.exclude),
    }
    given = [name for name, is_given in weights_only.items() if is_given()]
    if given and (options.policy is not None or options.int8):
        other = "--policy FILE" if options.policy is not None else "--int8"
        raise nb.SettingError(f"{given[0]} has no meaning with {other}: a policy says it for each layer.")
    if options.int8 and options.epochs:
        raise nb.SettingError("--int8 calibrates a trained network and trains nothing; leave out --epochs.")
    if options.learned_step and not options.epochs:
        raise nb.SettingError("--learned-step learns while it trains: give --epochs.")
    _group(options.group)


def _check_training(options: argparse.Namespace, trains: bool) -> None:
    """Refuse a bad recipe now, and not when the training begins."""
    settings = read_settings(options.set)
    for name in ("epochs", "seed", "device"):
        if name in settings:
            raise nb.SettingError(f"--set {name}={settings[name]} is no field to set: give --{name} {settings[name]}.")
    if trains:
        Recipe().replace(epochs=options.epochs, **settings)
    elif settings:
        raise nb.SettingError("--set changes how --epochs trains, and nothing is trained: give --epochs.")


def _check_out(options: argparse.Namespace) -> None:
    """Refuse an ending that says another kind of file than what is written."""
    int8 = getattr(options, "int8", False)
    if options.out is not None and is_deployed(options.out) != int8:
        fits = "an ONNX file, which ends in .onnx" if int8 else "a safetensors file, and .onnx is for --int8"
        raise nb.SettingError(f"--out {options.out}: what is written is {fits}. Give another name.")


def _check_plot(options: argparse.Namespace) -> None:
    """Refuse a plot that cannot be drawn, before anything is measured."""
    if options.plot is None:
        return
    if options.data is None and (options.baseline is None or options.shape is None):
        raise nb.SettingError(
            "--plot draws accuracy, or differences of outputs, over size: give --data, or --baseline and --shape."
        )
    from matplotlib.backend_bases import FigureCanvasBase

    kind = Path(options.plot).suffix.lstrip(".").lower()
    if kind and kind not in FigureCanvasBase.filetypes:
        raise nb.SettingError(f"--plot {options.plot}: there are no .{kind} pictures; give .png, .pdf or .svg.")


def _group(word: str | None) -> Any:
    if word is None or word == "tensor":
        return word
    if not word.isdecimal() or not int(word):
        raise nb.SettingError(f"--group {word}: give a number of weights, such as 64, or tensor.")
    return int(word)


def _epochs(count: int, which: str = "") -> str:
    return f"{count} {which}epoch{'s' if count > 1 else ''}"


def _accuracy(model: nn.Module, data: Data) -> str:
    return f"{nb.validate(model, data)['val_accuracy']:.4f}"
