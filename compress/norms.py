"""Which batch norm follows a layer, and follows nothing else: what it can take over from the layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from search_spaces.tracing import Trace


def norms_behind(traces: Sequence[Trace]) -> dict[str, str]:
    """Return every layer that is called as a module, and the batch norm that alone reads it, or "".

    Both must be so in all traces, and the norm must be over the layer's channels and read no other layer.
    """
    behind: dict[str, set[str]] = {}
    before: dict[str, set[str]] = {}
    functions: set[str] = set()
    for found in traces:
        for node in found.graph.nodes:
            layer = found.layers.get(node)
            if found.kinds[node] == "dense" and layer is not None and layer.is_function:
                functions.add(layer.owner)
            if node.op != "call_module":
                continue
            name = str(node.target)
            if found.kinds[node] == "dense":
                over_channels = layer is not None and layer.axis == 1
                readers = {_module_of(user) for user in node.users} if over_channels else {""}
                behind.setdefault(name, set()).update(readers)
            elif isinstance(found.model.get_submodule(name), _BatchNorm):
                before.setdefault(name, set()).update(_module_of(source) for source in node.all_input_nodes)
    pairs = {}
    for name, readers in behind.items():
        if name not in functions:
            reader = next(iter(readers), "")
            pairs[name] = reader if len(readers) == 1 and before.get(reader) == {name} else ""
    return pairs


def _module_of(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else f"{node.op} {node.name}"
