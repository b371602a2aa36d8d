"""The command line of compression: `nasbench compress prune|report`.

Arguments are parsed before torch is imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nasbench.data import Data

_TORCHVISION = "torchvision:"
_NEED_IMAGES = ("snip", "grasp", "taylor")
_BATCH = 128  # training images that these score weights by


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `compress` and its own commands to those of `nasbench`."""
    parser = commands.add_parser("compress", help="prune a trained network, or report what a compressed file holds")
    actions = parser.add_subparsers(required=True, metavar="prune|report")

    prune = actions.add_parser("prune", help="remove weights or channels, train on if asked, save and report")
    prune.add_argument(
        "model",
        metavar="MODEL",
        help="a study (its name or folder: its best network), a file of `nasbench compress` or compress.save with a "
        "network of our spaces, or torchvision:NAME",
    )
    prune.add_argument("--density", type=float, required=True, help="share of the weights (channels) to keep")
    prune.add_argument(
        "--distribution",
        help="of the density over layers: uniform, uniform+, er, erk, erk+, balanced, snip, grasp; with --structured "
        "uniform, global; default: what compress.prune does",
    )
    prune.add_argument(
        "--method",
        default="magnitude",
        help="which weights stay: magnitude, random, snip, grasp, synflow; with --structured magnitude, random, "
        "taylor; default: magnitude",
    )
    prune.add_argument("--structured", action="store_true", help="remove whole channels: smaller tensors, and faster")
    prune.add_argument("--exclude", nargs="+", default=[], metavar="LAYER", help="names of layers to leave as they are")
    prune.add_argument("--out", default="pruned.safetensors", help="the file to write; default: pruned.safetensors")
    prune.add_argument("--epochs", type=int, default=0, help="train so long after pruning, masks held; default: 0")
    prune.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="fields of the recipe of --epochs")
    prune.add_argument("--seed", type=int, default=0)
    prune.add_argument("--device", default="auto", help="where --epochs trains")
    prune.add_argument("--weights", help="of torchvision:NAME, such as DEFAULT (downloaded); default: random")
    prune.add_argument("--trial", type=int, help="number of the study's trial; default: the best")
    prune.add_argument("--space", help="of the study, if it is your own, as module:Class")
    prune.add_argument("--folder", default="runs", help="where studies lie; default: runs")
    _input_options(prune, "; default: as in the study")
    prune.set_defaults(run=_prune)

    report = actions.add_parser(
        "report", help="what a file holds: parameters, non-zeros, multiply-adds, bytes, latency"
    )
    report.add_argument(
        "file",
        help="a file of `nasbench compress` or compress.save with a network of our spaces; without --shape or --data "
        "only its sizes are reported",
    )
    _input_options(report, "")
    report.set_defaults(run=_report)


def _input_options(parser: argparse.ArgumentParser, note: str) -> None:
    from nasbench.cli import data_options

    data_options(parser)
    parser.set_defaults(data=None)
    parser.add_argument("--shape", metavar="C,H,W", help=f"size of the network's images, without --data{note}")


def _prune(options: argparse.Namespace) -> None:
    import nasbench as nb
    from compress import prune, report, save
    from nasbench.cli import read_settings

    recipe = read_settings(options.set)
    model, data = _network(options)
    data = _data(options) or data
    example = _example(options, data)
    nb.measure(model, example.shape[1:])  # says now, and not after the training, if the network takes no such input
    needy = [word for word in (options.method, options.distribution) if word in _NEED_IMAGES]
    if options.epochs:
        needy.append("--epochs")
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
    if data is not None:
        told = f"validation accuracy: {_accuracy(model, data)} before, {_accuracy(pruned, data)} pruned"
        if options.epochs:
            nb.fit(pruned, data, epochs=options.epochs, seed=options.seed, device=options.device, **recipe).cpu()
            told += f", {_accuracy(pruned, data)} after {options.epochs} more epochs"
        print(told)
    save(pruned, options.out)
    print(report(options.out, example=example, baseline=model))
    print(f"written to {options.out}")


def _report(options: argparse.Namespace) -> None:
    from compress import report
    from compress.storage import read

    read(options.file)  # says now, and not after the data are loaded, if there is no such file
    known = options.shape is not None or options.data is not None
    print(report(options.file, example=_example(options, _data(options)) if known else None))
    if not known:
        print("--shape C,H,W or --data adds multiply-adds and latency")


def _network(options: argparse.Namespace) -> tuple[nn.Module, Data | None]:
    """Return the network that MODEL names, in evaluation mode, and the data of its study, if they can be loaded."""
    name = options.model
    if name.startswith(_TORCHVISION):
        import torch
        from torchvision.models import get_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return get_model(name.removeprefix(_TORCHVISION), weights=options.weights).eval(), None
    if Path(name).is_file():
        from compress import load

        return load(name).eval(), None
    return _of_study(options)


def _of_study(options: argparse.Namespace) -> tuple[nn.Module, Data | None]:
    import search_spaces
    from nasbench.data import load
    from nasbench.errors import StudyError
    from nasbench.result import RESULT, SearchResult

    homes = [Path(options.model), Path(options.folder) / options.model]
    home = next((home for home in homes if (home / RESULT).exists()), None)
    if home is None:
        names = sorted(path.parent.name for path in Path(options.folder).glob(f"*/{RESULT}"))
        raise StudyError(
            f"{options.model!r} is no file, no study (found in {options.folder}/: {', '.join(names) or 'none'}), and "
            f"does not begin with {_TORCHVISION!r}."
        )
    result = SearchResult.load(home / RESULT, search_spaces.space(options.space) if options.space else None)
    chosen = [result.best] if options.trial is None else [t for t in result.trials if t.number == options.trial]
    if not chosen:
        raise StudyError(f"study {home.name} has no trial {options.trial}, only {len(result.trials)} trials from 0 on.")
    spec = result.conditions.get("objective", {}).get("data", {}).get("load")
    return chosen[0].build(), load(**spec) if spec and not options.data else None


def _data(options: argparse.Namespace) -> Data | None:
    from nasbench import cli

    return cli.load_data(options) if options.data else None


def _example(options: argparse.Namespace, data: Data | None) -> Tensor:
    """Return a batch of one input: of the data, or of the shape that was given."""
    import torch

    from nasbench.errors import SettingError

    if options.shape is None:
        if data is None:
            raise SettingError("what does the network take? Give --data, or --shape such as 3,32,32.")
        return next(data.eval_batches("train", 1))[0]
    try:
        channels, height, width = (int(side) for side in options.shape.split(","))
        if min(channels, height, width) < 1:
            raise ValueError
    except ValueError:
        raise SettingError(f"--shape {options.shape} is no size of images; write C,H,W such as 3,32,32.") from None
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def _accuracy(model: nn.Module, data: Data) -> str:
    from nasbench import validate

    return f"{validate(model, data)['val_accuracy']:.4f}"
