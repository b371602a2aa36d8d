"""What the command line's words stand for: networks, data and inputs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nasbench.data import Data

TORCHVISION = "torchvision:"


def network(name: str, options: argparse.Namespace) -> tuple[nn.Module, Data | None]:
    """Return the network that MODEL names, in evaluation mode, and the data of its study, if they can be loaded.

    Raises:
        StudyError: there is no such file, study or trial, or the study's networks cannot be built.
        CompressionError: the file cannot be loaded.
        SettingError: torchvision has no such weights.
    """
    if name.startswith(TORCHVISION):
        return _of_torchvision(name.removeprefix(TORCHVISION), options), None
    if Path(name).is_file():
        return _of_file(name), None
    return _of_study(name, options)


def _of_torchvision(name: str, options: argparse.Namespace) -> nn.Module:
    import torch
    from torchvision.models import get_model, get_model_weights

    from nasbench.errors import SettingError

    known = [one.name for one in get_model_weights(name)]
    if options.weights not in (None, "DEFAULT", *known):
        raise SettingError(f"there are no weights {options.weights!r} of {name}; known: DEFAULT, {', '.join(known)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model: nn.Module = get_model(name, weights=options.weights)
    return model.eval()


def _of_file(name: str) -> nn.Module:
    from compress.errors import CompressionError
    from compress.storage import load, read
    from compress.subjects import is_deployed

    if is_deployed(name):
        raise CompressionError(
            f"{name} is a deployed network, which only runs: give the network that it was made of, as a study or a "
            "file of compress.save."
        )
    if read(name).origin is None:
        raise CompressionError(
            f"{name} names no network of our spaces, which alone the command line can build. In Python give yours: "
            f"compress.load({name!r}, network)."
        )
    return load(name).eval()


def _of_study(name: str, options: argparse.Namespace) -> tuple[nn.Module, Data | None]:
    import search_spaces
    from nasbench.data import load
    from nasbench.errors import StudyError
    from nasbench.result import RESULT, SearchResult
    from search_spaces.arch import ArchError

    homes = [Path(name), Path(options.folder) / name]
    home = next((home for home in homes if (home / RESULT).exists()), None)
    if home is None:
        names = sorted(path.parent.name for path in Path(options.folder).glob(f"*/{RESULT}"))
        raise StudyError(
            f"{name!r} is no file, no study (found in {options.folder}/: {', '.join(names) or 'none'}), and "
            f"does not begin with {TORCHVISION!r}."
        )
    space = search_spaces.space(options.space) if options.space else None
    try:
        result = SearchResult.load(home / RESULT, space)
    except ArchError as error:
        raise StudyError(
            f"cannot build the networks of study {home.name}: {error} Those of compress.bits and compress.PolicySpace "
            f"need Python: nasbench.SearchResult.load({str(home / RESULT)!r}, space.bind(data)), and compress.save of "
            "what a trial builds."
        ) from error
    chosen = [result.best] if options.trial is None else [t for t in result.trials if t.number == options.trial]
    if not chosen:
        raise StudyError(f"study {home.name} has no trial {options.trial}, only {len(result.trials)} trials from 0 on.")
    spec = result.conditions.get("objective", {}).get("data", {}).get("load")
    return chosen[0].build(), load(**spec) if spec and not options.data else None


def data_of(options: argparse.Namespace) -> Data | None:
    """Return what --data names."""
    from nasbench import cli

    return cli.load_data(options) if options.data else None


def example_of(options: argparse.Namespace, data: Data | None) -> Tensor:
    """Return a batch of one input: of the data, or of the shape that was given.

    Raises:
        SettingError: neither was given, or the shape is none.
    """
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
