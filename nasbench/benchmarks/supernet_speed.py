"""Steps of a DARTS search in our fast form against the textbook form, which computes as the published code does.

    python -m nasbench.benchmarks.supernet_speed --batches 8 16 64 --threads 1

The published search network (8 cells, 16 channels, 32x32 images) takes four kinds of steps. Textbook: weight step
(forward, backward, clipping, SGD with momentum); first-order architecture step as published, which computes and throws
away the gradients of the weights; second-order step as published, with a copy of the model, a virtual step and a
finite difference; a weight step of one sampled operation per edge. Ours: `nasbench.strategies.bilevel`. All start from
the same weights, on random images. Variants take turns, the first turn is dropped. Times are processor times with one
thread, wall-clock times with more. Memory is that of a weight step: what is saved for the backward pass, in distinct
storages, and by how much the process grows at most.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.benchmarks.common import record
from nasbench.strategies import bilevel
from search_spaces.base import Mixture, Supernet
from search_spaces.darts import DARTS
from search_spaces.relaxed import RelaxedCell

VARIANTS = {  # name -> form, channels_last, recompute
    "textbook": ("textbook", False, False),
    "textbook_channels_last": ("textbook", True, False),
    "fast": ("fast", True, False),
    "fast_recompute": ("fast", True, True),
}
LR, MOMENTUM, DECAY, CLIP = 0.025, 0.9, 3e-4, 5.0
Batch = tuple[Tensor, Tensor]


@dataclass
class Search:
    """One variant in the middle of its search."""

    supernet: Supernet
    logits: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    train: Batch
    val: Batch

    def mixture(self) -> Mixture:
        """The relaxed choice of DARTS."""
        return Mixture({site: logits.softmax(0) for site, logits in self.logits.items()})

    def sample(self) -> Mixture:
        """One operation per edge, weights as in GDAS: 1, with the gradient of the softmax."""
        weights, active = {}, {}
        for i, (site, soft) in enumerate(self.mixture().items()):
            chosen = 1 + i % (len(soft) - 1)  # each operation as often as others, none excepted
            weights[site] = F.one_hot(torch.tensor(chosen), len(soft)) - soft.detach() + soft
            active[site] = (chosen,)
        return Mixture(weights, active)

    def loss(self, batch: Batch, supernet: nn.Module | None = None) -> Tensor:
        """The cross entropy of a batch."""
        loss: Tensor = F.cross_entropy((supernet or self.supernet)(batch[0], self.mixture()), batch[1])
        return loss

    def architecture(self) -> list[Tensor]:
        """The architecture weights."""
        return list(self.logits.values())


def start(variant: str, batch: int, cells: int, channels: int, dtype: torch.dtype = torch.float) -> Search:
    """Return a search on random images; from one seed, so that all variants have the same weights and images."""
    form, channels_last, recompute = VARIANTS[variant]
    torch.manual_seed(0)
    space = DARTS(channels=channels, cells=cells, classes=10, in_channels=3)
    supernet = space.supernet(form=form, recompute=recompute).to(dtype)
    logits = {site: (1e-3 * torch.randn(len(o), dtype=dtype)).requires_grad_() for site, o in space.sites.items()}
    images = [torch.randn(batch, 3, 32, 32, dtype=dtype) for _ in range(2)]
    labels = [torch.randint(0, 10, (batch,)) for _ in range(2)]
    if channels_last:
        supernet = supernet.to(memory_format=torch.channels_last)
        images = [x.contiguous(memory_format=torch.channels_last) for x in images]
    optimizer = torch.optim.SGD(supernet.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)
    return Search(supernet, logits, optimizer, (images[0], labels[0]), (images[1], labels[1]))


def weight_step(search: Search, sampled: bool = False) -> None:
    """Change the weights on a training batch."""
    mixture = search.sample() if sampled else search.mixture()
    bilevel.weight_gradients(search.supernet, mixture, search.train)
    nn.utils.clip_grad_norm_(search.supernet.parameters(), CLIP)
    search.optimizer.step()


def published_weight_step(search: Search, sampled: bool = False) -> None:
    """The same as published: the gradients of the architecture weights are computed too."""
    search.optimizer.zero_grad()
    mixture = search.sample() if sampled else search.mixture()
    F.cross_entropy(search.supernet(search.train[0], mixture), search.train[1]).backward()
    nn.utils.clip_grad_norm_(search.supernet.parameters(), CLIP)
    search.optimizer.step()


def first_order(search: Search) -> None:
    """Compute the gradient of the architecture weights."""
    bilevel.first_order(search.supernet, search.mixture, search.architecture(), search.val)


def published_first_order(search: Search) -> None:
    """The same as published: a backward pass through everything."""
    search.loss(search.val).backward()


def second_order(search: Search) -> None:
    """Compute it through a virtual step."""
    bilevel.second_order(
        search.supernet, search.mixture, search.architecture(), search.train, search.val, search.optimizer
    )


def published_second_order(search: Search) -> None:
    """The same as published, whose authors copy the model for the virtual step."""
    model, weights = search.supernet, list(search.supernet.parameters())
    gradients = torch.autograd.grad(search.loss(search.train), weights)
    unrolled = copy.deepcopy(model)
    with torch.no_grad():
        for new, weight, g in zip(unrolled.parameters(), weights, gradients, strict=True):
            buffer = search.optimizer.state.get(weight, {}).get("momentum_buffer", torch.zeros(()))
            new.sub_(LR * (MOMENTUM * buffer + g + DECAY * weight))
    search.loss(search.val, unrolled).backward()
    vector = [p.grad for p in unrolled.parameters() if p.grad is not None]
    radius = 0.01 / torch.cat([v.flatten() for v in vector]).norm()
    for factor in (1.0, -2.0):
        with torch.no_grad():
            for weight, v in zip(weights, vector, strict=True):
                weight.add_(factor * radius * v)
        torch.autograd.grad(search.loss(search.train), search.architecture())
    with torch.no_grad():
        for weight, v in zip(weights, vector, strict=True):
            weight.add_(radius * v)


OURS: dict[str, Callable[[Search], None]] = {
    "weight": weight_step,
    "first_order": first_order,
    "second_order": second_order,
    "sampled": partial(weight_step, sampled=True),
}
PUBLISHED: dict[str, Callable[[Search], None]] = {
    "weight": published_weight_step,
    "first_order": published_first_order,
    "second_order": published_second_order,
    "sampled": partial(published_weight_step, sampled=True),
}


def milliseconds(
    batch: int, cells: int, channels: int, repeats: int, steps: list[str], clock: Callable[[], float]
) -> dict[str, dict[str, list[float]]]:
    """Return the times of each step of each variant, taken in turns."""
    searches = {name: start(name, batch, cells, channels) for name in VARIANTS}
    times: dict[str, dict[str, list[float]]] = {step: {name: [] for name in VARIANTS} for step in steps}
    for turn in range(repeats + 1):
        for step in steps:
            for name, search in searches.items():
                run = (PUBLISHED if name.startswith("textbook") else OURS)[step]
                before = clock()
                run(search)
                if turn:
                    times[step][name].append(1000 * (clock() - before))
                for parameter in [*search.supernet.parameters(), *search.architecture()]:
                    parameter.grad = None
            print(f"batch {batch}, turn {turn}: {step} done", flush=True)
    return times


def ratios(times: Mapping[str, list[float]], reference: str) -> dict[str, float]:
    """Return how many times faster the variants are than one of them: the median over turns."""
    return {
        name: round(median(a / b for a, b in zip(times[reference], own, strict=True)), 2) for name, own in times.items()
    }


def saved_bytes(search: Search) -> int:
    """Return the size of all that the forward pass leaves for the backward pass, without the weights."""
    known = {t.untyped_storage().data_ptr() for t in [*search.supernet.parameters(), *search.supernet.buffers()]}
    storages: dict[int, int] = {}
    held = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    def keep_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> None:  # what a checkpoint keeps goes past the hooks
        for x in inputs[1:]:
            keep(x)

    hooks = [m.register_forward_pre_hook(keep_inputs) for m in search.supernet.modules() if isinstance(m, RelaxedCell)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = search.loss(search.train)
    for hook in hooks:
        hook.remove()
    assert loss.requires_grad
    return sum(storages.values())


def memory(variant: str, batch: int, cells: int, channels: int) -> tuple[int, int]:
    """Return, in a process of its own, the bytes saved for backward and the growth of the process in a weight step."""
    torch.set_num_threads(1)
    saved = saved_bytes(start(variant, 2, cells, channels)) * batch // 2
    search = start(variant, batch, cells, channels)
    before = _kibibytes("VmRSS")
    weight_step(search)
    return saved, 1024 * (_kibibytes("VmHWM") - before)


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def difference(cells: int, channels: int) -> dict[str, float]:
    """Return how far gradients of our form are from the textbook's in float64, relative to their norm."""
    found = []
    for variant in ("textbook", "fast", "fast_recompute"):
        search = start(variant, 2, cells, channels, torch.double)
        leaves = [*search.architecture(), *search.supernet.parameters()]
        found.append(torch.autograd.grad(search.loss(search.train), leaves))

    def distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
        return float(sum((x - y).square().sum() for x, y in zip(a, b, strict=True)) ** 0.5)

    norm = distance(found[0], tuple(torch.zeros_like(x) for x in found[0]))
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found[1], found[0], strict=True) if b.norm() > 0)
    return {
        "all_gradients": distance(found[1], found[0]) / norm,
        "all_gradients_recompute": distance(found[2], found[0]) / norm,
        "worst_tensor": worst,
    }


def main() -> None:
    """Measure, and write the figures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--repeats", type=int, default=5, help="turns that count; fewer where a batch is above 16")
    parser.add_argument("--threads", type=int, help="torch's own choice if left out")
    parser.add_argument("--steps", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--memory-batch", type=int, default=16)
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    size = arguments.cells, arguments.channels

    figures: dict[str, Any] = {"milliseconds": {}, "ratio_to_textbook": {}, "ratio_to_textbook_channels_last": {}}
    turns = {batch: max(1, arguments.repeats * 16 // max(batch, 16)) for batch in arguments.batches}
    for batch in arguments.batches:
        times = milliseconds(batch, *size, turns[batch], arguments.steps, clock)
        key = f"batch_{batch}"
        figures["milliseconds"][key] = {
            step: {name: round(median(values)) for name, values in own.items()} for step, own in times.items()
        }
        for reference in ("textbook", "textbook_channels_last"):
            figures[f"ratio_to_{reference}"][key] = {s: ratios(own, reference) for s, own in times.items()}
        if "sampled" in times and "weight" in times:
            dense, one = times["weight"]["textbook"], times["sampled"]["fast"]
            figures["ratio_to_textbook"][key]["sampled_to_dense"] = round(
                median(a / b for a, b in zip(dense, one, strict=True)), 1
            )
        print(figures, flush=True)

    batch = arguments.memory_batch
    amounts = {}
    for name in VARIANTS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            amounts[name] = pool.submit(memory, name, batch, *size).result()
    for i, what in enumerate(("saved", "peak")):
        each = {name: round(amount[i] / batch / 1e6, 1) for name, amount in amounts.items()}
        figures[f"{what}_megabytes_per_image"] = each
        figures[f"{what}_ratio_to_textbook"] = {n: round(each["textbook"] / value, 2) for n, value in each.items()}
    figures["float64_gradient_difference"] = difference(*size)
    if arguments.dry:
        print(figures)
        return
    record(
        __file__,
        figures,
        seeds=[0],
        batches=arguments.batches,
        memory_batch=batch,
        cells=arguments.cells,
        channels=arguments.channels,
        image=[3, 32, 32],
        turns=[turns[batch] for batch in arguments.batches],
        clock=f"{'processor' if clock is time.process_time else 'wall'} time, medians of interleaved turns",
        pixels="random",
    )


if __name__ == "__main__":
    main()
