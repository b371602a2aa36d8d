"""Policies as metrics: what a deployed network scores on validation images, its size and its speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.calibration import training_inputs
from compress.errors import CompressionError
from compress.exporting import require_onnx
from compress.models import outputs_of
from nasbench import profile, training
from nasbench.data import Data
from nasbench.devices import pick_device
from nasbench.errors import SettingError
from nasbench.objective import WEIGHTS, Objective, TrialRun, save_weights
from search_spaces.base import Arch

if TYPE_CHECKING:
    from compress.deployment import Deployed, Deployer
    from compress.policy import PolicySpace

FILE = "model.onnx"
"""The deployed network in the folder of a trial that is among the best."""
MEASURED = ("val_accuracy", "val_loss", "bytes", "latency_ms", "latency_iqr_ms")
"""What `measure` measures."""
_LATENCY = {"latency_ms", "latency_iqr_ms"}


class PolicyObjective(Objective):
    """Deploy the model of a space under a policy, and measure what would be shipped.

    The accuracy and loss are of the deployed network on the validation images, "bytes" those of its file, and
    "latency_ms" the median time of one image, measured only where it is asked for, with its spread as "latency_iqr_ms".
    Activations are calibrated on images of the training split. All but the latency is a function of policy and seed.

    Args:
        space: of policies.
        data: images, of which the training and validation splits are read.
        seed: decides which training images calibrate.
        device: where it runs: "auto" or "cpu", as deployed networks run on the CPU.

    Raises:
        ImportError: the packages of the extra `deploy` are not installed.
        CompressionError: the model does not take the images, or gives other classes.
        SettingError: the data are no images, or the device is not the CPU.
    """

    default = "val_accuracy"
    trains = True
    keeps = (WEIGHTS, FILE)
    names = MEASURED

    def __init__(self, space: PolicySpace, data: Data, *, seed: int = 0, device: str = "auto") -> None:
        require_onnx("deployment")
        if device != "auto" and pick_device(device).type != "cpu":
            raise SettingError(f"device={device!r}: deployed networks run on the CPU. Leave device out.")
        self.space, self.seed = space, seed
        self.data = images_of(data)
        _check_model(space.model, self.data)
        self._deployer: Deployer | None = None

    def settings(self) -> dict[str, Any]:
        """Return data, seed and metrics; the policies' settings are the space's."""
        return {
            "kind": "policy",
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint, "load": self.data.spec},
            "seed": self.seed,
            "extra": list(self.extra),
        }

    def key(self, arch: Arch) -> Arch:
        """Return the canonical policy."""
        return self.space.canonical(arch)

    def prepare(self, folder: Path | None, check: Callable[[], None] = lambda: None, progress: bool = True) -> None:
        """Export the model and calibrate its activations, once for all policies."""
        if self._deployer is None:
            from compress.deployment import Deployer

            batches = training_inputs(self.data, self.space.calibration, self.seed)
            self._deployer = Deployer(self.space.model, batches)

    def __call__(self, arch: Arch, run: TrialRun) -> dict[str, float]:
        """Deploy and measure one policy."""
        self.prepare(None)
        run.check()
        assert self._deployer is not None
        deployed = self._deployer.deploy(self.space.policy_of(arch))
        metrics = measure(deployed, self.data, self.wanted)
        if run.folder is not None:
            save_weights(self.space.build(self.key(arch)), run.folder / WEIGHTS)
            deployed.save(run.folder / FILE)
        return metrics


def measure(deployed: Deployed, data: Data, wanted: Sequence[str]) -> dict[str, float]:
    """Return what a deployed network scores on validation images, its bytes, and its latency if that is wanted."""
    metrics = training.validate(deployed, data)
    metrics["bytes"] = deployed.bytes
    if _LATENCY & {*wanted}:
        latency = deployed.latency(profile.zeros(1, data.shape))
        metrics |= {"latency_ms": latency.median_ms, "latency_iqr_ms": latency.iqr_ms}
    return metrics


def images_of(data: Data) -> Data:
    """Return images on the CPU, where deployed networks run.

    Raises:
        SettingError: it is something else.
    """
    if not isinstance(data, Data) or len(data.shape) != 3:
        raise SettingError(f"a policy is measured on images, nasbench.data.load(...), got {data!r:.80}.")
    return data.to("cpu")


def _check_model(model: nn.Module, data: Data) -> None:
    found = outputs_of(model, (profile.zeros(1, data.shape),))
    if len(found) != 1 or found[0].shape != (1, data.classes):
        shapes = ", ".join(str(tuple(x.shape)) for x in found)
        raise CompressionError(
            f"the model gives {shapes} for one image of {data.name}, which has {data.classes} classes: logits are "
            f"(1, {data.classes}). Give the data that it was trained for."
        )
