"""A model as a graph: what it computes in evaluation and in training, with the shapes of an example."""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import activation, batchnorm, dropout, instancenorm, padding, pooling
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from search_spaces.operations import DropPath


class GrowthError(ValueError):
    """A network cannot be changed as asked; the message says why and what can be done."""


Kind = Literal[
    "input", "attribute", "dense", "norm", "mix", "each", "space", "reduce", "cat", "move", "fresh", "output", "other"
]

# Operations by what they do to channels, as functions of torch, operator or functional and as methods of tensors.
# each: every element on its own, tensors broadcast; space: per channel, over the last dimensions; move: no arithmetic;
# fresh: a new tensor, of a shape.
_NAMES: Mapping[Kind, str] = {
    "each": "add sub mul div truediv true_divide pow neg iadd isub imul itruediv maximum minimum abs exp log sqrt "
    "rsqrt square sigmoid tanh clamp clip clamp_min clamp_max relu relu6 gelu silu mish elu celu selu leaky_relu "
    "hardtanh hardswish hardsigmoid softplus softsign logsigmoid threshold dropout dropout1d dropout2d dropout3d "
    "alpha_dropout feature_alpha_dropout erf sin cos reciprocal positive contiguous clone detach float double half "
    "bfloat16 expand expand_as gt ge lt le eq ne where masked_fill lerp addcmul addcdiv round floor ceil sign "
    "zeros_like ones_like",
    "space": "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d "
    "lp_pool2d interpolate upsample pad",
    "reduce": "mean sum amax amin std var",
    "cat": "cat concat concatenate",
    "move": "flatten reshape view permute transpose swapaxes swapdims movedim unsqueeze squeeze chunk split "
    "tensor_split unbind narrow getitem stack flip roll unflatten channel_shuffle pixel_shuffle pixel_unshuffle "
    "select t",
    "dense": "linear conv1d conv2d conv3d",
    "norm": "batch_norm instance_norm",
    "mix": "layer_norm group_norm",
    "fresh": "new_empty new_zeros new_ones new_full empty_like rand_like randn_like",
}
_INPLACE = "add_ sub_ mul_ div_ relu_ relu6_ sigmoid_ tanh_ clamp_ hardtanh_ elu_ leaky_relu_ silu_ hardswish_ to"
_METHODS: dict[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_METHODS |= dict.fromkeys(_INPLACE.split(), "each")
_AUGMENTED = ("iadd", "isub", "imul", "itruediv")
_ALIASES = {*_AUGMENTED, *_INPLACE.split(), "contiguous", "detach", "float", "double", "half", "bfloat16"}
_ALIASES |= {"expand", "expand_as"}
_NAMED: dict[Any, str] = {
    getattr(home, name): name for name in _METHODS for home in (F, torch, operator) if hasattr(home, name)
}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MOVES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_OTHER = (
    *(nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU),
    *(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),  # at random places, in evaluation too
)


def kind_of(module: nn.Module) -> Kind:
    """Return what a module of torch does to channels; a subclass, of torch.ao for one, may compute something else."""
    own = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    known = own.__module__.startswith("torch.nn.modules.") or own is DropPath
    return family_of(module) if known else "other"


def family_of(module: nn.Module) -> Kind:
    """Return what a module of torch does to channels, or a subclass does that calls its super's forward."""
    homes = {own.__module__ for own in type(module).__mro__}
    if isinstance(module, (nn.Linear, *_CONVS)):
        return "dense"
    if isinstance(module, batchnorm._BatchNorm | instancenorm._InstanceNorm | nn.PReLU):
        return "norm"
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return "mix"
    if isinstance(module, _MOVES):
        return "move"
    if isinstance(module, _OTHER):
        return "other"
    if homes & {pooling.__name__, padding.__name__} or isinstance(module, nn.Upsample):
        return "space"
    each = homes & {activation.__name__, dropout.__name__} or isinstance(module, nn.Identity | DropPath)
    return "each" if each else "other"


@dataclass(frozen=True, eq=False)
class Trace:
    """What a model computes in one mode.

    Attributes:
        model: what was traced: a copy that shares the model's parameters, in evaluation.
        graph: its operations in order.
        values: what each of them gives for the example: tensors on the meta device, so shapes only, and plain values.
        training: whether this is the training mode.
        constants: tensors that forward computes from no input, by the names that the graph has for them.
    """

    model: nn.Module
    graph: fx.Graph
    values: Mapping[fx.Node, Any]
    training: bool
    constants: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> Mapping[fx.Node, Kind]:
        """What the operations do to channels."""
        return {node: self._kind(node) for node in self.graph.nodes}

    @cached_property
    def layers(self) -> Mapping[fx.Node, Layer | None]:
        """Of operations of kind dense, norm and mix the layers; ``None`` where a weight is computed."""
        return {node: layer_of(self, node) for node, kind in self.kinds.items() if kind in ("dense", "norm", "mix")}

    def _kind(self, node: fx.Node) -> Kind:
        if node.op in ("placeholder", "get_attr", "output"):
            kinds: dict[str, Kind] = {"placeholder": "input", "get_attr": "attribute", "output": "output"}
            return kinds[node.op]
        if node.op == "call_module":
            return kind_of(self.model.get_submodule(str(node.target)))
        if node.op == "call_method":
            return _METHODS.get(str(node.target), "other")
        if getattr(node.target, "__module__", "") == "torchvision.ops.stochastic_depth":
            return "each"
        return _METHODS.get(_NAMED.get(node.target, ""), "other")

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of what an operation gives, a tensor."""
        return tuple(self.values[node].shape)

    def is_tensor(self, node: object) -> bool:
        """Whether this is an operation that gives one tensor."""
        return isinstance(node, fx.Node) and isinstance(self.values[node], Tensor)


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that an operation calls."""
    return _NAMED.get(node.target) or str(getattr(node.target, "__name__", node.target))


def argument(found: Trace, node: fx.Node, position: int, *names: str) -> Any:
    """Return an argument of a call by its position or one of its names, ``None`` if it was left out.

    Numbers and shapes are those of the example.
    """
    if len(node.args) > position:
        given = node.args[position]
    else:
        given = next((node.kwargs[name] for name in names if name in node.kwargs), None)
    return fx.node.map_arg(given, lambda source: source if has_tensors(found.values[source]) else found.values[source])


def has_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or a list or the like with one."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def call(found: Trace, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """Do an operation on other values."""
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    if node.op == "call_module":
        return found.model.get_submodule(str(node.target)).forward(*args, **kwargs)
    if node.op == "call_method" and node.target == "view":  # what it is done on may lie otherwise in memory
        return args[0].reshape(*args[1:], **kwargs)
    return run(node, args, kwargs)


def untouched(found: Trace, node: fx.Node) -> int:
    """Return how many dimensions a pooling or the like leaves alone."""
    dimensions = len(found.shape(node))
    if node.target is F.pad:
        return dimensions - len(argument(found, node, 1, "pad")) // 2
    module = found.model.get_submodule(str(node.target)) if node.op == "call_module" else None
    spatial = re.search(r"([123])d", type(module).__name__ if module is not None else name_of(node))
    return dimensions - int(spatial[1]) if spatial else 2


def reduced(found: Trace, node: fx.Node, dimensions: int) -> set[int]:
    """Return the dimensions over which a mean or the like is taken."""
    dims = argument(found, node, 1, "dim", "axis")
    if dims is None or isinstance(dims, bool) or dims in ([], ()):
        return set(range(dimensions))
    several = [dims] if isinstance(dims, int) else dims
    return {dim % dimensions for dim in several}


def writes(found: Trace, node: fx.Node) -> fx.Node | None:
    """Return the operation whose result is changed in place, through a part or another view of it; ``None`` if none is.

    A change of the whole is the result of the operation that makes it, and can be followed; a change of a part is not.
    """
    module = found.model.get_submodule(str(node.target)) if node.op == "call_module" else None
    here = getattr(module, "inplace", False) or node.kwargs.get("inplace") or name_of(node) in _AUGMENTED
    here = here or (node.op in ("call_method", "call_function") and re.fullmatch(r"[a-z0-9_]*[a-z0-9]_", name_of(node)))
    base = argument(found, node, 0, "input") if here else node.kwargs.get("out")
    part = False
    while isinstance(base, fx.Node) and _may_alias(found, base):
        part = part or found.kinds[base] == "move"
        base = argument(found, base, 0, "input")
    return base if part and isinstance(base, fx.Node) and _read_after(found, base, node) else None


def _read_after(found: Trace, base: fx.Node, node: fx.Node) -> bool:
    """Whether something reads a tensor after an operation, itself or as what has the same memory."""
    others = [user for user in base.users if user is not node]
    return any(user > node or (_may_alias(found, user) and _read_after(found, user, node)) for user in others)


def _may_alias(found: Trace, node: fx.Node) -> bool:
    """Whether an operation may give its input itself, or a part of it, instead of new numbers."""
    if node.op == "call_module":
        module = found.model.get_submodule(str(node.target))
        home = type(module).__module__
        same = (
            isinstance(module, nn.Identity | DropPath) or home == dropout.__name__ or getattr(module, "inplace", False)
        )
    else:
        same = name_of(node) in _ALIASES or "dropout" in name_of(node) or bool(node.kwargs.get("inplace"))
    return same or found.kinds[node] == "move"


def trace(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    whole: str | None = None,
    modes: tuple[bool, ...] = (False, True),
) -> tuple[Trace, ...]:
    """Trace a model in evaluation, and in training if that is another graph, with shapes of the example.

    Nothing is computed: the model, its buffers and torch's random numbers stay as they are.

    Args:
        model: any module that torch.fx can trace.
        example: an input, a batch; a tuple if the model takes several.
        whole: name of a module whose call is one operation, whatever it computes.
        modes: to trace in training (True) or not.

    Raises:
        GrowthError: the model's code depends on values, or does not take the example.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise GrowthError(f"a model is an nn.Module that is not scripted, got {type(model).__name__}.")
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise GrowthError(
                f"{name or 'the model'!r} has no weights yet: let the model compute a batch once, then grow."
            )
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise GrowthError(
                f"{name or 'the model'!r} has hooks, which would see other channels than they were written for. Remove "
                "them, and add them to what is returned (weight_norm of torch.nn.utils is one: remove_weight_norm)."
            )
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not any(isinstance(x, Tensor) for x in inputs):
        raise GrowthError(
            "example is an input of the model, a tensor or a tuple of them, got "
            f"{', '.join(type(x).__name__ for x in inputs) or 'nothing'}."
        )
    model = copied(model, share_parameters=True)  # forward may store what it computes, which would be no tensors here
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        found: list[Trace] = []
        for training in modes:
            torch.default_generator.manual_seed(0)  # random constants are the same, each time
            with switched(model, training):
                graph, constants = _graph(model, len(inputs), training, whole)
            if not found or _differ(graph, constants, found[0]):
                # In evaluation, whatever the graph: batch norm cannot train on a single value, and shapes are the same.
                with switched(model, False):
                    values = _shapes(model, graph, constants, inputs, training)
                found.append(Trace(model, graph, values, training, constants))
    for module in model.modules():
        module.training = False  # so that nothing changes a buffer when weights are looked at
    return tuple(found)


def check_same_calls(before: tuple[Trace, ...], model: nn.Module, example: tuple[Any, ...], whole: str | None) -> None:
    """Refuse a grown model whose code does something else than it did: it may ask its layers for their sizes or types.

    Args:
        before: the graphs of the model that was grown.
        model: what it became.
        example: a batch.
        whole: name of the module that replaced another.

    Raises:
        GrowthError: the calls are others, or have other settings or constants.
    """
    try:
        after = trace(model, example, whole, tuple(traced.training for traced in before))
    except GrowthError as error:
        raise GrowthError(f"the grown model does not run: {error}") from error.__cause__
    differ = len(before) != len(after) or any(
        _differ(a.graph, a.constants, b) for a, b in zip(after, before, strict=True)
    )
    if differ:
        raise GrowthError(
            "forward computes with the size, the type or a buffer of a layer that changes, so that it would compute "
            "something else afterwards. Let it use the shapes of tensors instead, or numbers that are stored elsewhere."
        )


def copied(model: nn.Module, share_parameters: bool = False) -> nn.Module:
    """Return a deep copy of a model, on request with the very parameters of the model.

    Raises:
        GrowthError: it cannot be copied.
    """
    memo = {id(parameter): parameter for parameter in model.parameters()} if share_parameters else {}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise GrowthError(
            f"{type(model).__name__} cannot be copied: {_said(error)} Remove what it stores that is "
            "no weight, such as results with gradients, locks or open files."
        ) from error


def _call_of(node: fx.Node) -> tuple[str, str]:
    """Return what is called, without those sizes that a layer's own forward hands over, and that torch checks."""
    own = {
        "layer_norm": (1, "normalized_shape"),
        "conv1d": (6, "groups"),
        "conv2d": (6, "groups"),
        "conv3d": (6, "groups"),
    }
    place, size = own.get(name_of(node), (None, None)) if node.op == "call_function" else (None, None)
    args = [value for i, value in enumerate(node.args) if i != place]
    return str(node.target), f"{args}{ {name: value for name, value in node.kwargs.items() if name != size} }"


def _differ(graph: fx.Graph, constants: Mapping[str, Any], other: Trace) -> bool:
    calls, others = ([_call_of(node) for node in g.nodes] for g in (graph, other.graph))
    same = constants.keys() == other.constants.keys() and all(
        torch.equal(value, other.constants[name]) if isinstance(value, Tensor) else True
        for name, value in constants.items()
    )
    return calls != others or not same


@contextmanager
def switched(model: nn.Module, training: bool) -> Iterator[None]:
    """Switch the mode of every module by its flag alone, and back: a model may have a `train` of its own."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Compute with a model without gradients, after which its buffers and torch's random numbers are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)


class _Tracer(fx.Tracer):
    def __init__(self, whole: str | None = None) -> None:
        super().__init__()
        self.whole = whole
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, DropPath) or module_qualified_name == self.whole
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not reached where tracing stops: what is left says where that was
        return result


def _graph(model: nn.Module, inputs: int, training: bool, whole: str | None = None) -> tuple[fx.Graph, dict[str, Any]]:
    tracer, before = _Tracer(whole), set(vars(model))
    constants = {}
    try:
        parameters = inspect.signature(type(model).forward).parameters.values()
        usable = [p for p in list(parameters)[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        left_out = {p.name: p.default for p in usable[inputs:] if p.default is not p.empty}
        graph = tracer.trace(model, left_out or None)
    except Exception as error:
        raise GrowthError(_where(model, tracer.inside, error, training)) from error
    finally:
        for name in set(vars(model)) - before:  # constants, which torch.fx stores on the model
            constants[name] = vars(model).pop(name)
    return graph, constants


def _shapes(
    model: nn.Module, graph: fx.Graph, constants: Mapping[str, Any], inputs: tuple[Any, ...], training: bool
) -> dict[fx.Node, Any]:
    """Run a graph without data, if it can be on few examples."""
    few = min([2, *(len(x) for x in inputs if isinstance(x, Tensor) and x.ndim)])  # two tell what mixes examples
    cut = tuple(x[:few] if isinstance(x, Tensor) and x.ndim else x for x in inputs)
    try:
        return _values(model, graph, constants, cut, training)
    except GrowthError:  # forward has the batch size as a constant, or an input is no batch
        return _values(model, graph, constants, inputs, training)


def _values(
    model: nn.Module, graph: fx.Graph, constants: Mapping[str, Any], inputs: tuple[Any, ...], training: bool
) -> dict[fx.Node, Any]:
    given = list(map(_bare, inputs))
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        try:
            if node.op == "placeholder" and str(node.target).startswith("*"):
                values[node], given = ({} if str(node.target).startswith("**") else tuple(given)), []
            elif node.op == "placeholder":
                if not given and not args:
                    raise TypeError(f"{node.target!r} is missing: give a tuple of all inputs.")
                values[node] = given.pop(0) if given else args[0]
            elif node.op == "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                value = constants[name] if name in constants else getattr(model.get_submodule(owner), name)
                values[node] = _bare(value)
            elif node.op == "call_module":
                module = model.get_submodule(str(node.target))
                if isinstance(module, batchnorm._BatchNorm):  # torch takes a millisecond to find out
                    values[node] = args[0] if args else kwargs["input"]
                else:
                    values[node] = _without_data(module).forward(*args, **kwargs)
            elif node.op == "output":
                if given:
                    raise TypeError(f"it takes {len(inputs) - len(given)} inputs, and the example has {len(inputs)}.")
                values[node] = None
            else:
                values[node] = run(node, args, kwargs)
        except Exception as error:
            raise GrowthError(
                f"{type(model).__name__} stops on the example of shape "
                f"{', '.join(str(list(x.shape)) for x in inputs if isinstance(x, Tensor))} at "
                f"{node.format_node()}: {_said(error)} Give a batch that the "
                f"model takes in {'training' if training else 'evaluation'}."
            ) from error
    return values


def run(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the function or the method of an operation."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _bare(value: Any) -> Any:
    return tree_map(lambda x: x.detach().to("meta") if isinstance(x, Tensor) else x, value)


def _without_data(module: nn.Module) -> nn.Module:
    """Return a copy whose tensors are on the meta device."""
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__ = {
        name: _bare(value) if isinstance(value, Tensor) else value for name, value in vars(module).items()
    }
    for kind in ("_parameters", "_buffers"):
        clone.__dict__[kind] = {name: _bare(tensor) for name, tensor in getattr(module, kind).items()}
    clone.__dict__["_modules"] = {name: child and _without_data(child) for name, child in module._modules.items()}
    return clone


def _where(model: nn.Module, inside: list[str], error: Exception, training: bool) -> str:
    """Say where tracing stopped, and which of the model's children can be traced."""
    place = inside[-1] if inside else ""
    owner = type(model.get_submodule(place)).__name__
    line = next((f for f in reversed(inspect.trace()) if "/torch/" not in f.filename and f.function == "forward"), None)
    at = f" ({Path(line.filename).name}, line {line.lineno})" if line else ""
    mode = "training" if training else "evaluation"
    message = f"tracing stopped in {place or 'forward'!r} of class {owner}{at}, in {mode} mode"
    children = []
    for name, child in model.named_children():
        try:
            _Tracer().trace(copied(child, share_parameters=True))
        except Exception:  # noqa: BLE001 - a model's own code may raise anything
            continue
        children.append(name)
    can = f" These children can be traced: {', '.join(children)}." if children else ""
    return (
        f"{type(model).__name__} cannot be followed by torch.fx: {message}: {type(error).__name__}: "
        f"{(str(error) or 'no message').splitlines()[0]} Keep code that depends on values out of forward, or grow a "
        f"part: give a submodule and an example of its own input, and put back what is returned.{can}"
    )


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of a convolution, a linear layer or a norm, as a module or as a function.

    Attributes:
        name: the module's, or the full name of the weight that is given to a function.
        kind: the module's class or the function's name.
        node: the call.
        source: what is put in.
        owner: name of the module that has the weights.
        tensors: full names of the parameters and buffers with one value or filter per channel, by their role.
        shape: of the weight; () if there is none.
        axis: the dimension of the input that holds the channels; of a layer norm, the first that is normalised.
        groups: of a convolution or of a group norm.
        transposed: whether it is a transposed convolution, whose weight has its inputs first.
    """

    name: str
    kind: str
    node: fx.Node
    source: fx.Node
    owner: str
    tensors: Mapping[str, str]
    shape: tuple[int, ...]
    axis: int
    groups: int = 1
    transposed: bool = False

    @property
    def is_function(self) -> bool:
        """Whether no module of torch is called."""
        return self.node.op != "call_module"

    @property
    def outputs(self) -> int:
        """The channels that a convolution or linear layer gives."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def inputs(self) -> int:
        """The channels that a convolution or linear layer takes."""
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    @property
    def depthwise(self) -> bool:
        """Whether every input channel has filters of its own."""
        return self.groups == self.inputs > 1


_ROLES = {"dense": (None, "weight", "bias"), "norm": (None, "running_mean", "running_var", "weight", "bias")}
_ROLES["mix"] = (None, None, "weight", "bias")


def layer_of(found: Trace, node: fx.Node) -> Layer | None:
    """Return the layer that an operation of kind dense, norm or mix is; ``None`` where a weight is computed."""
    kind = found.kinds[node]
    source = argument(found, node, 0, "input", "x")
    if not found.is_tensor(source):
        return None
    if node.op == "call_module":
        owner = name = str(node.target)
        module = found.model.get_submodule(name)
        label = type(module).__name__
        roles = ("weight", "bias", "running_mean", "running_var")
        tensors = {role: f"{name}.{role}" for role in roles if isinstance(getattr(module, role, None), Tensor)}
        groups = getattr(module, "groups", getattr(module, "num_groups", 1))
        depth = len(getattr(module, "normalized_shape", ()))
    else:
        given = {role: argument(found, node, i, role) for i, role in enumerate(_ROLES[kind]) if role is not None}
        weights = {role: value for role, value in given.items() if value is not None}
        if any(value.op != "get_attr" for value in weights.values()) or (kind == "dense" and "weight" not in weights):
            return None
        if any(value.target in found.constants for value in weights.values()):
            return None
        tensors = {role: str(value.target) for role, value in weights.items()}
        name = tensors.get("weight", "")
        owner = name.rpartition(".")[0]
        module = found.model.get_submodule(owner)
        label = name_of(node)
        groups = (argument(found, node, 6, "groups") or 1) if kind == "dense" and "conv" in label else 1
        groups = argument(found, node, 1, "num_groups") if label == "group_norm" else groups
        depth = len(argument(found, node, 1, "normalized_shape")) if label == "layer_norm" else 0
    weight = getattr(module, tensors["weight"].rpartition(".")[2]) if "weight" in tensors else None
    shape = () if weight is None else tuple(weight.shape)
    dimensions = len(found.shape(source))
    if kind == "dense":
        if len(shape) < 2:
            return None  # of one output that has no dimension
        axis = dimensions - (len(shape) - 1)
    else:
        axis = dimensions - depth if depth else 1
    transposed = node.op == "call_module" and isinstance(module, _CONVS[3:])
    return Layer(name, label, node, source, owner, tensors, shape, axis, groups, transposed)


def _said(error: Exception) -> str:
    """Return an error as a sentence."""
    return f"{type(error).__name__}: {str(error).strip().rstrip('.')}."
