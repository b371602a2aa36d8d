"""Search spaces: what can be built. Imports torch only, and each space on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search_spaces.base import Arch, ArchError, Mixture, SearchSpace, Supernet, nearest
    from search_spaces.cells import Genotype
    from search_spaces.conv_macro import ConvMacro
    from search_spaces.darts import DARTS
    from search_spaces.densenet import DenseNet
    from search_spaces.gpt import GPT
    from search_spaces.growth import GrowingSpace
    from search_spaces.mobilenet import MobileNetV3
    from search_spaces.nasbench201 import NASBench201
    from search_spaces.nasnet import NASNet
    from search_spaces.plain_cnn import PlainCNN
    from search_spaces.resnet import ResNet
    from search_spaces.vit import ViT

__all__ = [
    "DARTS",
    "GPT",
    "SPACES",
    "Arch",
    "ArchError",
    "ConvMacro",
    "DenseNet",
    "Genotype",
    "GrowingSpace",
    "Mixture",
    "MobileNetV3",
    "NASBench201",
    "NASNet",
    "PlainCNN",
    "ResNet",
    "SearchSpace",
    "Supernet",
    "ViT",
    "nearest",
    "space",
]

SPACES = {  # name on the command line -> module:class
    "conv_macro": "search_spaces.conv_macro:ConvMacro",
    "darts": "search_spaces.darts:DARTS",
    "densenet": "search_spaces.densenet:DenseNet",
    "gpt": "search_spaces.gpt:GPT",
    "mobilenet": "search_spaces.mobilenet:MobileNetV3",
    "nasbench201": "search_spaces.nasbench201:NASBench201",
    "nasnet": "search_spaces.nasnet:NASNet",
    "plain_cnn": "search_spaces.plain_cnn:PlainCNN",
    "resnet": "search_spaces.resnet:ResNet",
    "vit": "search_spaces.vit:ViT",
}
_HOMES = dict.fromkeys(("Arch", "ArchError", "Mixture", "SearchSpace", "Supernet", "nearest"), "search_spaces.base") | {
    "ConvMacro": "search_spaces.conv_macro",
    "DARTS": "search_spaces.darts",
    "DenseNet": "search_spaces.densenet",
    "GPT": "search_spaces.gpt",
    "Genotype": "search_spaces.cells",
    "GrowingSpace": "search_spaces.growth",
    "MobileNetV3": "search_spaces.mobilenet",
    "NASBench201": "search_spaces.nasbench201",
    "NASNet": "search_spaces.nasnet",
    "PlainCNN": "search_spaces.plain_cnn",
    "ResNet": "search_spaces.resnet",
    "ViT": "search_spaces.vit",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'search_spaces' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


def home_of(name: str) -> str | None:
    """Return ``module:class`` of one of our spaces by its name in `SPACES` or by its class, in any case; else None.

    Example:
        >>> home_of("ConvMacro") == home_of("conv_macro")
        True
    """
    classes = {path.partition(":")[2].lower(): path for path in SPACES.values()}
    return SPACES.get(name.lower()) or classes.get(name.lower())


def space(name: str, /, **settings: Any) -> SearchSpace:
    """Return a space by its name in `SPACES` or by its class, in any case, or by ``module:class``, with these settings.

    ``module:class`` imports that module, so it runs code: take it from a user, never from a file or a database.

    Raises:
        ArchError: no such name, module, class or setting.

    Example:
        >>> space("nasbench201", channels=8, cells=1)
        NASBench201(channels=8, cells=1, classes=None, in_channels=None)
    """
    from search_spaces.base import ArchError, SearchSpace, nearest

    path = name if ":" in name else home_of(name)
    if path is None:
        raise ArchError(f"there is no search space {name!r}; {nearest(name.lower(), SPACES)} Your own: 'module:class'.")
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise ArchError(
            f"cannot load the search space {name!r}: {error}. Write 'module:class', for a module that python can find."
        ) from error
    if not (isinstance(found, type) and issubclass(found, SearchSpace)):
        raise ArchError(f"{name!r} is {found!r}, not a subclass of search_spaces.SearchSpace.")
    try:
        return found(**settings)
    except TypeError as error:
        raise ArchError(f"cannot make {found.__name__} with {settings}: {error}.") from error
