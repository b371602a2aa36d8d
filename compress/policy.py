"""Compression policies: for every layer an option such as "int8" or "weights4"; as values, as files, and as a space.

A policy maps the names of `compress.weights` to options; layers that it does not name stay float.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.calibration import LEAST
from compress.errors import CompressionError
from compress.exporting import Example
from compress.low_bit_models import low_bits
from compress.models import copy_of, require_values
from compress.quantization import quantizable, quantize
from compress.shift import dense_shift
from compress.weights import weights
from nasbench.files import atomic_write
from nasbench.recipe import Recipe
from search_spaces.arch import nearest
from search_spaces.base import Arch, Choices, SearchSpace

if TYPE_CHECKING:
    from compress.policy_objective import PolicyObjective
    from nasbench.data import Data

Policy = Mapping[str, str]
"""Options by the names of layers."""

FLOAT = "float32"
KINDS = {"int8": (8,), "weights": (2, 3, 4, 5, 6, 7, 8), "dense_shift": (2, 3, 4)}
"""The bits that each kind has: whole layers computed in int8, weights on an even grid, weights of signed powers of two.
"""
_PREFIX = {"int8": "int", "weights": "weights", "dense_shift": "shift"}
OPTIONS = {f"{_PREFIX[kind]}{bits}": (kind, bits) for kind, own in KINDS.items() for bits in own}
"""What an option but "float32" means: its kind and bits."""
MODES = ("symmetric", "asymmetric")
_MODE = ".mode"


def options_of(bits: Sequence[int], kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the options of a layer, in the order of the bits: of 8 bits only "int8" where that is among the kinds.

    Args:
        bits: 2 to 8, or 32: float.
        kinds: of `KINDS`.

    Raises:
        CompressionError: bits out of range or of no kind, an unknown kind, or one twice.

    Example:
        >>> options_of((4, 8, 32), ("int8", "weights"))
        ('weights4', 'int8', 'float32')
        >>> options_of((3, 8), ("weights", "dense_shift"))
        ('weights3', 'shift3', 'weights8')
    """
    for name, values in (("bits", bits), ("kinds", kinds)):
        several = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
        if not several or len({*map(repr, values)}) < len(values):
            raise CompressionError(f"{name} is a tuple of different values, one at least, got {name}={values!r}.")
    for kind in kinds:
        if kind not in KINDS:
            raise CompressionError(f"there is no kind {kind!r} of low-bit layers; {nearest(kind, KINDS)}")
    found: list[str] = []
    for number in bits:
        if type(number) is not int or not (2 <= number <= 8 or number == 32):
            raise CompressionError(f"bits={tuple(bits)}: bits are whole numbers from 2 to 8, or 32 for float.")
        if number == 32:
            found.append(FLOAT)
            continue
        having = [kind for kind in kinds if number in KINDS[kind]]
        if not having:
            raise CompressionError(
                f"none of kinds={tuple(kinds)} has {number} bits: "
                + "; ".join(f"{kind} has {', '.join(map(str, own))}" for kind, own in KINDS.items())
            )
        having = ["int8"] if "int8" in having else having
        found += [f"{_PREFIX[kind]}{number}" for kind in having]
    return tuple(found)


def parse(option: object) -> tuple[str, int, str]:
    """Return the kind, bits and mode of an option other than "float32".

    Raises:
        CompressionError: it is none.

    Example:
        >>> parse("weights4"), parse("int8 asymmetric")
        (('weights', 4, 'symmetric'), ('int8', 8, 'asymmetric'))
    """
    base, _, mode = option.partition(" ") if isinstance(option, str) else ("", "", "")
    if base not in OPTIONS or mode not in ("", MODES[1]) or (mode and not _has_mode(base)):
        known = nearest(option, [FLOAT, *OPTIONS])
        raise CompressionError(f"there is no option {option!r}; {known} All but shifts may be followed by asymmetric.")
    return (*OPTIONS[base], mode or MODES[0])


def check_policy(policy: object, model: nn.Module) -> dict[str, str]:
    """Return a policy if it fits a model, in the order of the model's layers.

    Raises:
        CompressionError: it is no mapping, names a layer that the model lacks, or an option that there is not.

    Example:
        >>> check_policy({"2": "int8", "0": "weights4"}, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
        {'0': 'weights4', '2': 'int8'}
    """
    checked, known = _check_options(policy), weights(model)
    for name in checked:
        if name not in known:
            raise CompressionError(f"the policy names layer {name!r}, which the model lacks; {nearest(name, known)}")
    return {name: checked[name] for name in known if name in checked}


def _check_options(policy: object) -> Policy:
    if not isinstance(policy, Mapping):
        raise CompressionError(
            f'a policy maps layers to options, {{"layer1.0.conv1": "int8"}}, got a {type(policy).__name__}: '
            f"{policy!r:.60}."
        )
    for name, option in policy.items():
        if option != FLOAT:
            try:
                parse(option)
            except CompressionError as error:
                raise CompressionError(f"layer {name!r}: {error}") from None
    return policy


def apply_policy(model: nn.Module, policy: Policy, *, example: Example | None = None) -> nn.Module:
    """Return a copy of a model with low-bit weights as the policy says: it can be looked at, trained further and saved.

    Layers of "int8" have weights of 8 bits, symmetric, with a scale per channel; their activations stay float. It is
    `compress.Deployer` that makes a network which computes in int8, and its accuracy and latency are what counts.

    Args:
        example: a batch that the model takes, by which the batch norms behind layers of powers of two are found; see
            `compress.dense_shift`.

    Raises:
        CompressionError: the policy does not fit the model (`check_policy`), or a layer's weight cannot have few bits.

    Example:
        >>> from compress.low_bit import low_bit_of
        >>> model = apply_policy(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), {"0": "weights4"})
        >>> low_bit_of(model[0], "weight").bits, low_bit_of(model[2], "weight")
        (4, None)
    """
    parsed = {name: parse(option) for name, option in check_policy(policy, model).items() if option != FLOAT}
    shifts = {name: bits for name, (kind, bits, _) in parsed.items() if kind == "dense_shift"}
    found = dense_shift(model, shifts, init="convert", example=example) if shifts else copy_of(model)
    for kind, scale in (("int8", "max"), ("weights", "mse")):
        for mode in MODES:
            bits = {name: own[1] for name, own in parsed.items() if (own[0], own[2]) == (kind, mode)}
            if bits:
                quantize(found, bits, symmetric=mode == "symmetric", scale=scale, inplace=True)
    return found


def save_policy(policy: Policy, path: str | Path) -> Path:
    """Write a policy as a JSON object, layers to options, whole or not at all; return the path.

    Raises:
        CompressionError: it is no mapping, or has an option that there is not.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = save_policy({"0": "int8"}, Path(tempfile.mkdtemp()) / "policy.json")
        >>> load_policy(path, nn.Sequential(nn.Linear(4, 8)))
        {'0': 'int8'}
    """
    _check_options(policy)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(dict(policy), indent=1))
    return Path(path)


def load_policy(path: str | Path, model: nn.Module) -> dict[str, str]:
    """Read a policy for a model, in the order of its layers.

    Raises:
        CompressionError: the file cannot be read, is no JSON, or has no policy for this model (`check_policy`).
    """
    try:
        policy = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CompressionError(f"cannot read a policy from {path}: {error}. Write one with save_policy().") from None
    return check_policy(policy, model)


@dataclass(frozen=True, eq=False)
class PolicySpace(SearchSpace):
    """The compression policies of one trained model: an option for each of its layers.

    `nasbench.search` deploys each policy that it tries, and measures accuracy, latency and size of what would be
    shipped. A decision is named like its layer. With several `modes` a second decision follows, "LAYER.mode", which
    `canonical` sets to the first mode where it has no effect.

    Args:
        model: a trained network. A copy is kept, so that what happens to the model later does not matter.
        bits: 2 to 8, and 32 for layers that stay float, which let any layer of the model do so.
        kinds: what may be done to a layer: "int8" computes it in int8 (8 bits), "weights" stores weights on an even
            grid (2 to 8 bits; 8 only without "int8"), "dense_shift" stores signed powers of two (2 to 4 bits).
        modes: of the grid of weights: "symmetric" around zero, "asymmetric", or both.
        calibration: how many training images the ranges of activations are measured on.
        exclude: names of layers, or of modules that hold layers, that stay float.
        example: a batch that the model takes, for "dense_shift"; see there.

    Raises:
        CompressionError: the model has no layers to compress or has low-bit ones already, bits are out of range, or a
            kind, mode or excluded name is unknown.

    Example:
        >>> space = PolicySpace(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)))
        >>> space.size, space.choices["0"]
        (9, ('weights4', 'int8', 'float32'))
        >>> space.policy_of(space.uniform()["int8"])
        {'0': 'int8', '3': 'int8'}

    Source: the encoding is that of Cummings et al., SimQ-NAS, 2023, and of DyNAS-T: a variable for the bits of each
    layer, weights and activations together, and one for its mode. Here fewer than 8 bits are of weights alone.
    """

    model: nn.Module = field(repr=False)
    bits: tuple[int, ...] = (4, 8, 32)
    kinds: tuple[str, ...] = ("int8", "weights")
    modes: tuple[str, ...] = ("symmetric",)
    calibration: int = 100
    exclude: tuple[str, ...] = ()
    example: Example | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_values(self.model)
        object.__setattr__(self, "model", copy_of(self.model).cpu().eval())
        for name in ("bits", "kinds", "modes", "exclude"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        options_of(self.bits, self.kinds)
        for mode in self.modes:
            if mode not in MODES:
                raise CompressionError(f"there is no mode {mode!r} of quantization; {nearest(mode, MODES)}")
        if not self.modes or len({*self.modes}) < len(self.modes):
            raise CompressionError(f"modes={self.modes!r}: give one mode at least, and none twice.")
        if type(self.calibration) is not int or self.calibration < LEAST:
            raise CompressionError(
                f"calibration={self.calibration!r}: give the number of training images to measure activations on, "
                f"{LEAST} at least."
            )
        if not self.layers:
            raise CompressionError(f"no layer of {type(self.model).__name__} can have options {self.options}.")

    @cached_property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """The options of the layers that are decided on, in the model's order."""
        shifted: set[str] = set()
        if "dense_shift" in self.kinds:
            twin = dense_shift(self.model, 3, init="convert", include_ends=True, example=self.example)
            shifted = {*low_bits(twin)}
        found: dict[str, tuple[str, ...]] = {}
        for name in quantizable(self.model, self.exclude):
            own = tuple(o for o in self.options if name in shifted or o == FLOAT or OPTIONS[o][0] != "dense_shift")
            found |= {name: own} if own else {}
        return found

    @cached_property
    def options(self) -> tuple[str, ...]:
        """All options."""
        return options_of(self.bits, self.kinds)

    @cached_property
    def choices(self) -> Choices:
        found: dict[str, tuple[str, ...]] = {}
        for name, own in self.layers.items():
            found[name] = own
            if len(self.modes) > 1:
                found[f"{name}{_MODE}"] = self.modes
        return found

    def canonical(self, arch: Arch) -> Arch:
        """Return the policy with the first mode where a mode has no effect: for floats and for powers of two."""
        if len(self.modes) == 1:
            return arch
        still = {f"{name}{_MODE}": self.modes[0] for name in self.layers if not _has_mode(str(arch[name]))}
        return arch | still

    def build(self, arch: Arch) -> nn.Module:
        """Return a copy of the model with low-bit weights (`apply_policy`), in evaluation mode.

        Raises:
            ArchError: the policy is not of this space.
        """
        return apply_policy(self.model, self.policy_of(arch), example=self.example)

    def policy_of(self, arch: Mapping[str, Any]) -> dict[str, str]:
        """Return a policy as `apply_policy` and `save_policy` take it: the mode, if not "symmetric", with the option.

        Raises:
            ArchError: it is not of this space.
        """
        arch = self.canonical(self.check(arch))
        policy = {}
        for name in self.layers:
            option = str(arch[name])
            mode = str(arch.get(f"{name}{_MODE}", self.modes[0]))
            policy[name] = f"{option} {mode}" if mode == MODES[1] and _has_mode(option) else option
        return policy

    def arch_of(self, policy: Policy) -> Arch:
        """Return the architecture of a policy: the inverse of `policy_of`. Layers that it does not name are float.

        Raises:
            CompressionError, ArchError: the policy does not fit the model, or is not of this space.
        """
        named = check_policy(policy, self.model)
        named = {name: option for name, option in named.items() if option != FLOAT}
        values: dict[str, str] = {}
        for name, option in (dict.fromkeys(self.layers, FLOAT) | named).items():
            base, _, mode = option.partition(" ")
            if _has_mode(base) and (mode or MODES[0]) not in self.modes:
                raise CompressionError(
                    f"layer {name!r} has option {option!r}, which is {mode or MODES[0]}, but the space has modes="
                    f"{self.modes}."
                )
            values[name] = base
            if len(self.modes) > 1:
                values[f"{name}{_MODE}"] = mode or MODES[0]
        return self.canonical(self.check(values))

    def uniform(self) -> dict[str, Arch]:
        """Return for every option the policy that gives it to all layers: what any search has to beat.

        A layer that has no such option gets its last.
        """
        first = {f"{name}{_MODE}": self.modes[0] for name in self.layers if len(self.modes) > 1}
        found = {}
        for option in self.options:
            chosen = {name: option if option in own else own[-1] for name, own in self.layers.items()}
            found[option] = self.check(chosen | first)
        return found

    def objective(
        self, data: Data, *, recipe: Recipe | None = None, seed: int = 0, device: str = "auto", **changes: Any
    ) -> PolicyObjective:
        """Return what measures policies on data; nothing is trained, so a recipe has no meaning.

        Raises:
            ImportError: the packages of the extra `deploy` are not installed.
            CompressionError: the model does not fit the data; or settings of training are given.
        """
        from compress.policy_objective import PolicyObjective

        if recipe is not None or changes:
            given = next(iter(changes), "recipe")
            raise CompressionError(
                f"{given!r} is about training, but a PolicySpace trains nothing: it deploys the model that it has. "
                "Leave it out; train the model before, with nasbench.fit."
            )
        return PolicyObjective(self, data, seed=seed, device=device)

    def to_json(self) -> str:
        """Return the settings as JSON; the model is told by its class and a hash of its layers and tensors."""
        settings = {
            "space": type(self).__name__,
            "model": type(self.model).__name__,
            "weights": self._hash,
            "bits": self.bits,
            "kinds": self.kinds,
            "modes": self.modes,
            "calibration": self.calibration,
            "exclude": self.exclude,
        }
        return json.dumps(settings)

    @cached_property
    def _hash(self) -> str:
        layers = re.sub(r" at 0x\w+", "", repr(self.model))  # without addresses of functions
        digest = hashlib.sha256(layers.encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolicySpace) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self._hash)


def _has_mode(option: str) -> bool:
    return option != FLOAT and OPTIONS[option][0] != "dense_shift"
