"""The command line of compression: `nasbench compress prune|shift|quantize|distill|report`.

Arguments are parsed before torch is imported.
"""

from __future__ import annotations

import argparse
from typing import Any

from compress.named_models import TORCHVISION

_MODEL = (
    "a study (its name or folder: its best network), a file of `nasbench compress` or compress.save with a network of "
    f"our spaces, or {TORCHVISION}NAME"
)


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `compress` and its own commands to those of `nasbench`."""
    parser = commands.add_parser(
        "compress", help="prune, shift, quantize or distill a trained network, or report what compressed files hold"
    )
    actions = parser.add_subparsers(required=True, metavar="prune|shift|quantize|distill|report")
    _add_prune(actions)
    _add_shift(actions)
    _add_quantize(actions)
    _add_distill(actions)
    _add_report(actions)


def _add_prune(actions: argparse._SubParsersAction[Any]) -> None:
    prune = actions.add_parser("prune", help="remove weights or channels, train on if asked, save and report")
    prune.add_argument("model", metavar="MODEL", help=_MODEL)
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
    _exclude_option(prune)
    _training_options(prune, "pruned.safetensors", "train so long after pruning, masks held; default: 0")
    _model_options(prune)
    prune.set_defaults(run=_run("prune"))


def _add_shift(actions: argparse._SubParsersAction[Any]) -> None:
    shift = actions.add_parser(
        "shift", help="make weights signed powers of two (DenseShift), train on if asked, save and report"
    )
    shift.add_argument("model", metavar="MODEL", help=_MODEL)
    shift.add_argument("--bits", type=int, default=3, help="of each weight, 2 to 8; default: 3")
    shift.add_argument(
        "--init",
        default="convert",
        help="convert: the nearest to the network's own weights; scratch, low_variance: random ones, to be trained; "
        "default: convert",
    )
    shift.add_argument("--include-ends", action="store_true", help="the first convolution and the last layer, too")
    _exclude_option(shift)
    _training_options(shift, "shifted.safetensors", "train so long as powers of two; default: 0")
    _model_options(shift)
    shift.set_defaults(run=_run("shift"))


def _add_quantize(actions: argparse._SubParsersAction[Any]) -> None:
    quantize = actions.add_parser(
        "quantize",
        help="give weights few bits, train on if asked, save and report; or, with --int8, write a network that "
        "onnxruntime computes in int8",
    )
    quantize.add_argument("model", metavar="MODEL", help=_MODEL)
    quantize.add_argument("--bits", type=int, help="of each weight, 2 to 8; default: 4")
    quantize.add_argument(
        "--group", help="weights that share a scale: a number, or tensor; default: those of a channel"
    )
    quantize.add_argument("--asymmetric", action="store_true", help="values need not be symmetric around zero")
    quantize.add_argument("--learned-step", action="store_true", help="learn the scales, too, in --epochs")
    quantize.add_argument(
        "--int8", action="store_true", help="write an ONNX file that computes in int8, calibrated on training images"
    )
    quantize.add_argument("--policy", metavar="FILE", help="JSON: an option such as weights4 or int8 for each layer")
    _exclude_option(quantize)
    _training_options(quantize, None, "train so long through the rounding; default: 0")
    _model_options(quantize)
    quantize.set_defaults(run=_run("quantize"))


def _add_distill(actions: argparse._SubParsersAction[Any]) -> None:
    distill = actions.add_parser("distill", help="train a network by what teachers say (MEAL V2), save and report")
    distill.add_argument("model", metavar="STUDENT", help=_MODEL)
    distill.add_argument(
        "--teachers", nargs="+", required=True, metavar="MODEL", help="trained networks, named likewise"
    )
    distill.add_argument(
        "--mode", default="off", help="of the discriminator: off, joint, reversed, alternate; default: off"
    )
    distill.add_argument(
        "--temperature", type=float, default=1.0, help="by which logits are divided: above 1 softer; default: 1"
    )
    distill.add_argument("--hard", type=float, default=0.0, help="share of the labels in the loss; default: 0")
    _training_options(distill, "distilled.safetensors", "train so long; default: 10", epochs=10)
    _model_options(distill)
    distill.set_defaults(run=_run("distill"))


def _add_report(actions: argparse._SubParsersAction[Any]) -> None:
    report = actions.add_parser(
        "report", help="what files hold, side by side: parameters, non-zeros, multiply-adds, bytes, latency, accuracy"
    )
    report.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="of `nasbench compress` or compress.save, or a deployed .onnx; without --shape or --data only sizes are "
        "reported",
    )
    report.add_argument("--baseline", metavar="MODEL", help=f"the original to compare with: {_MODEL}")
    report.add_argument(
        "--plot", metavar="PATH", help="draw accuracy over bytes and latency; without --data the difference"
    )
    report.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    _model_options(report, "")
    report.set_defaults(run=_run("report"))


def _exclude_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="LAYER", help="names of layers to leave as they are"
    )


def _training_options(parser: argparse.ArgumentParser, out: str | None, help_: str, epochs: int = 0) -> None:
    parser.add_argument(
        "--out", default=out, help=f"the file to write; default: {out or 'quantized.safetensors, or quantized.onnx'}"
    )
    parser.add_argument("--epochs", type=int, default=epochs, help=help_)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="fields of the recipe of --epochs, such as lr=0.02"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; default: 0")
    parser.add_argument("--device", default="auto", help="where --epochs trains; default: a GPU if there is one")


def _model_options(parser: argparse.ArgumentParser, note: str = "; default: as in the study") -> None:
    from nasbench.cli import data_options

    parser.add_argument("--weights", help=f"of {TORCHVISION}NAME, such as DEFAULT (downloaded); default: random")
    parser.add_argument("--trial", type=int, help="number of the study's trial; default: the best")
    parser.add_argument("--space", help="of the study, if it is your own, as module:Class")
    parser.add_argument("--folder", default="runs", help="where studies lie; default: runs")
    data_options(parser)
    parser.set_defaults(data=None)
    parser.add_argument("--shape", metavar="C,H,W", help=f"size of the network's images, without --data{note}")


def _run(action: str) -> Any:
    """Return what runs a command, whose code is imported then."""

    def run(options: argparse.Namespace) -> None:
        from compress import actions

        getattr(actions, f"run_{action}")(options)

    return run
