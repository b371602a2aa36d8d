"""Joint searches: an architecture is trained, or taken from a supernet, then compressed, deployed and measured."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.calibration import training_inputs
from compress.exporting import require_onnx
from compress.joint import BITS
from compress.layer_macs import macs
from compress.policy_objective import FILE, MEASURED, images_of, measure
from compress.pruning import masks
from compress.storage import save
from nasbench import profile
from nasbench.data import Data
from nasbench.objective import WEIGHTS, Objective, TrainObjective, TrialRun, check_kind, save_weights
from nasbench.recipe import Recipe
from nasbench.shared_weights import SupernetObjective
from nasbench.strategies import ONE_SHOT
from search_spaces.base import Arch, Choices, SearchSpace

if TYPE_CHECKING:
    from compress.deployment import Deployer
    from compress.joint import JointSpace

_CALIBRATION = 100  # training images
_REMEMBERED = 16  # trained networks


class JointObjective(Objective):
    """Train the network of an assignment, compress and deploy it, and measure what would be shipped.

    "val_accuracy", "val_loss", "bytes" and "latency_ms" are of the deployed network, as in `PolicyObjective`. "params"
    and "macs" are of the weights that masks keep. A mask saves no bytes of a deployed file, which stores its zeros;
    "file_bytes", measured only where it is asked for, is what `compress.save` needs, which stores none.

    A network that differs from one of the last 16 in bits alone is neither trained nor exported again, unless a pruner
    watches trainings.

    Args:
        space: bound to the data.
        data: images; training and validation splits.
        recipe: how to train, or None for the default; of the supernet, with `one_shot`.
        changes: to fields of the recipe.
        seed: of everything random.
        device: where to train.

    Raises:
        ImportError: the packages of the extra `deploy` are not installed.
        SettingError, ArchError: recipe, data and space do not fit each other.
    """

    default = "val_accuracy"
    trains = True
    keeps = (WEIGHTS, FILE)
    names = (*MEASURED, "params", "macs", "file_bytes")

    def __init__(
        self,
        space: JointSpace,
        data: Data,
        recipe: Recipe | None = None,
        changes: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        require_onnx("deployment")
        self.space, self.seed, self.data = space, seed, images_of(data)
        check_kind(space.space, data)
        self._float: TrainObjective | SupernetObjective
        self.reports = space.one_shot is None
        if space.one_shot is None:
            recipe = dataclasses.replace(recipe or Recipe(), **(changes or {}))
            self._float = TrainObjective(_Networks(space), data, recipe, seeds=(seed,), device=device)
        else:
            strategy = ONE_SHOT[space.one_shot]
            recipe = dataclasses.replace(recipe or strategy.recipe, **(changes or {}))
            self._float = SupernetObjective(space.space, data, strategy, recipe, seed=seed, device=device)
        self._remembered: dict[Arch, tuple[nn.Module, Deployer]] = {}

    def settings(self) -> dict[str, Any]:
        """Return data, recipe, seed and metrics."""
        return {
            "kind": "joint",
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint, "load": self.data.spec},
            "recipe": json.loads(self._float.recipe.to_json()),
            "seed": self.seed,
            "extra": [*self.extra, *(name for name in ("file_bytes",) if name in self.wanted)],
        }

    def key(self, arch: Arch) -> Arch:
        """Return the canonical assignment."""
        return self.space.canonical(arch)

    def preview(self, arch: Arch, names: Sequence[str]) -> dict[str, float]:
        """Return params and macs, which are known before anything is trained."""
        if not {"params", "macs"} & {*names}:
            return {}
        with torch.random.fork_rng(devices=[]):
            found = self._cost(self.space.network(self.key(arch)))
        return {name: value for name, value in found.items() if name in names}

    def prepare(self, folder: Path | None, check: Callable[[], None] = lambda: None, progress: bool = True) -> None:
        """Train the supernet, with `one_shot`, or continue it from its checkpoint."""
        self._float.prepare(folder, check, progress)

    def __call__(self, arch: Arch, run: TrialRun) -> dict[str, float]:
        """Train, compress, deploy and measure one assignment."""
        arch = self.key(arch)
        network, deployer = self._ready(arch, run)
        run.check()
        deployed = deployer.deploy(self.space.policy_of(arch, network))
        metrics = measure(deployed, self.data, self.wanted) | self._cost(network)
        small = self.space.compressed(network, arch)
        if "file_bytes" in self.wanted:
            with tempfile.TemporaryDirectory() as folder:
                metrics["file_bytes"] = save(small, Path(folder) / "model.safetensors").stat().st_size
        if run.folder is not None:
            save_weights(small, run.folder / WEIGHTS)
            deployed.save(run.folder / FILE)
        return metrics

    def _ready(self, arch: Arch, run: TrialRun) -> tuple[nn.Module, Deployer]:
        """Return the trained float network of a canonical assignment, and what deploys it."""
        from compress.deployment import Deployer

        key = _untouched(arch)
        ready = self._remembered.pop(key, None)
        if ready is None or run.watched:  # what a pruner decides must not depend on what is remembered
            network = self._network(arch, run).cpu().eval()
            run.check()
            ready = network, Deployer(network, training_inputs(self.data, _CALIBRATION, self.seed))
        self._remembered[key] = ready
        for old in [*self._remembered][:-_REMEMBERED]:
            del self._remembered[old]
        return ready

    def _network(self, arch: Arch, run: TrialRun) -> nn.Module:
        """Return the trained float network of an assignment."""
        if isinstance(self._float, TrainObjective):
            return self._float.trained(arch, self.seed, run)[0]
        if self._float.training is None:
            self.prepare(None, progress=False)
        assert self._float.training is not None
        return self._float.training.inherit(self.space.inner(arch))[0]

    def _cost(self, network: nn.Module) -> dict[str, float]:
        """Return parameters and multiply-adds, but those that masks drop."""
        own = macs(network, profile.zeros(1, self.data.shape))
        dropped = sum(int((~mask).sum()) for mask in masks(network).values())
        params = sum(parameter.numel() for parameter in network.parameters()) - dropped
        return {"params": params, "macs": own.sparse if dropped else own.dense}


@dataclass(frozen=True)
class _Networks(SearchSpace):
    """The float networks of a joint space: what is trained."""

    space: JointSpace

    @property
    def choices(self) -> Choices:
        return self.space.choices

    def canonical(self, arch: Arch) -> Arch:
        return self.space.canonical(arch)

    def build(self, arch: Arch) -> nn.Module:
        return self.space.network(arch)


def _untouched(arch: Arch) -> Arch:
    """Return what decides on the network before it is compressed."""
    return Arch({name: option for name, option in arch.items() if not name.startswith(BITS)})
