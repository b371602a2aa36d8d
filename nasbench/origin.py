"""Where a network of our spaces comes from, remembered on the network: enough to build it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import search_spaces
from nasbench.errors import SettingError
from search_spaces.base import Arch, SearchSpace

_ATTRIBUTE = "_nasbench_origin"  # a plain attribute: copied with the module, and in no state_dict


@dataclass(frozen=True)
class Origin:
    """The space and the architecture that a network was built from.

    Args:
        space: one of our spaces.
        arch: the architecture that was built.
        supernet: settings of the supernet it was taken out of, if it was.

    Example:
        >>> from search_spaces import NASBench201
        >>> space = NASBench201(channels=4, cells=1, classes=10, in_channels=1)
        >>> origin = Origin(space, space.at(7))
        >>> Origin.from_json(origin.to_json()) == origin
        True
        >>> sum(p.numel() for p in origin.build().parameters())
        5214
    """

    space: SearchSpace
    arch: Arch
    supernet: Mapping[str, Any] | None = field(default=None, hash=False)

    def build(self, device: str | torch.device = "cpu") -> nn.Module:
        """Return a fresh network of this origin, marked with it; torch's random state stays as it was.

        Args:
            device: where its weights are made; on "meta" they take neither time nor memory.
        """
        with torch.random.fork_rng(devices=[]), torch.device(device):
            if self.supernet is None:
                model = self.space.build(self.arch)
            else:
                model = self.space.supernet(**self.supernet).extract(self.arch)
        return mark(model, self.space, self.arch, self.supernet)

    def to_json(self) -> str:
        """Return the space's name and settings, the architecture and the supernet's settings as JSON."""
        entry = {"space": json.loads(self.space.to_json()), "arch": dict(self.arch), "supernet": self.supernet}
        return json.dumps(entry)

    @classmethod
    def from_json(cls, text: str) -> Origin:
        """Read what `to_json` wrote. Only the names of our spaces are read, so no other code is imported.

        Raises:
            SettingError: the text is no origin, names no space of ours, or one without such an architecture.
        """
        try:
            entry = json.loads(text)
            settings = dict(entry["space"])
            name = settings.pop("space")
            if search_spaces.home_of(name) is None:
                raise SettingError(f"{name!r} is no space of search_spaces; build the network yourself.")
            space = search_spaces.space(name, **settings)
            supernet = entry["supernet"]
            return cls(space, space.check(entry["arch"]), None if supernet is None else dict(supernet))
        except SettingError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise SettingError(f"this is no network of our spaces ({type(error).__name__}: {error}).") from None


def mark(model: nn.Module, space: SearchSpace, arch: Arch, supernet: Mapping[str, Any] | None = None) -> nn.Module:
    """Remember on the model that it was built as `arch` of `space`; return it. Only spaces of ours are remembered.

    Copies of the model remember it too; its `state_dict` does not change.

    Example:
        >>> from search_spaces import ResNet
        >>> space = ResNet(classes=10, in_channels=1)
        >>> model = mark(space.build(space.at(0)), space, space.at(0))
        >>> origin_of(model).space == space
        True
    """
    kind = type(space)
    if f"{kind.__module__}:{kind.__name__}" in search_spaces.SPACES.values():
        setattr(model, _ATTRIBUTE, Origin(space, arch, supernet))
    return model


def origin_of(model: nn.Module) -> Origin | None:
    """Return what `mark` remembered on the model, or None."""
    return getattr(model, _ATTRIBUTE, None)
