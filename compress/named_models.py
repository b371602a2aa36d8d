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
        StudyError: there is no such file, study or trial.
        CompressionError: the file cannot be loaded.
    """
    if name.startswith(TORCHVISION):
        import torch
        from torchvision.models import get_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return get_model(name.removeprefix(TORCHVISION), weights=options.weights).eval(), None
    if Path(name).is_file():
        from compress import load

        return load(name).eval(), None
    return _of_study(name, options)


def _of_study(name: str, options: argparse.Namespace) -> tuple[nn.Module, Data | None]:
    import search_spaces
    from nasbench.data import load
    from nasbench.errors import StudyError
    from nasbench.result import RESULT, SearchResult

    homes = [Path(name), Path(options.folder) / name]
    home = next((home for home in homes if (home / RESULT).exists()), None)
    if home is None:
        names = sorted(path.parent.name for path in Path(options.folder).glob(f"*/{RESULT}"))
        raise StudyError(
            f"{name!r} is no file, no study (found in {options.folder}/: {', '.join(names) or 'none'}), and "
            f"does not begin with {TORCHVISION!r}."
        )
    result = SearchResult.load(home / RESULT, search_spaces.space(options.space) if options.space else None)
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
