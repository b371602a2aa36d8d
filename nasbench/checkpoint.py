"""The one file that holds everything a training run needs to go on."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nasbench.errors import CheckpointError, SettingError
from nasbench.files import atomic_write

if TYPE_CHECKING:
    from nasbench.training import Callback, Run

FORMAT = 1
_FIELDS = {"identity", "step", "todo", "seconds", "sums", "loss", "model", "optimizer", "callbacks"}


class Saver:
    """Writes a run's checkpoint: now and then, at the end, before an error leaves. Without a file, does nothing."""

    def __init__(
        self,
        file: Path | None,
        every: float,
        identity: dict[str, Any],
        run: Run,
        callbacks: Sequence[Callback],
    ) -> None:
        self.file, self.every, self.identity, self.run, self.callbacks = file, every, identity, run, callbacks
        self.saved_step, self.saved_at = -1, time.monotonic()

    def sound(self) -> bool:
        """On a GPU the loss may have left the finite numbers since it was last looked at."""
        return self.run.step == 0 or math.isfinite(self.run.train_loss)

    def save_if_due(self) -> None:
        if self.file is not None and time.monotonic() - self.saved_at >= self.every and self.sound():
            self.save()

    def save_before(self, error: BaseException, todo: list[tuple[Callback, str]]) -> None:
        try:
            if self.sound():
                self.save(todo)
        except (OSError, SettingError) as failure:
            error.add_note(f"The checkpoint could not be written: {failure}")

    def save(self, todo: Sequence[tuple[Callback, str]] = ()) -> None:
        run = self.run
        if self.file is None or (run.step == self.saved_step and not todo):
            return
        states = [[type(callback).__qualname__, callback.state_dict()] for callback in self.callbacks]
        for name, state in states:
            if not _is_plain(state):
                raise SettingError(
                    f"the state of callback {name} cannot be kept in a checkpoint: {state!r:.200}. "
                    "Return tensors, numbers, strings, and lists, tuples or dicts of these"
                )
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "step": run.step,
            "todo": [[type(callback).__qualname__, hook] for callback, hook in todo],
            "seconds": run.seconds,
            "sums": [run._seen, run._loss_sum, run._hit_sum],
            "loss": run.last_loss,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "callbacks": [entry for entry in states if entry[1]],
        }
        with atomic_write(self.file) as temporary:
            torch.save(content, temporary)
        self.saved_step, self.saved_at = run.step, time.monotonic()


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    return value is None or type(value) in (bool, int, float, str, Tensor, nn.Parameter)


def check_writable(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {file} could not be written ({error.strerror or error}): name a file where you can write"
        ) from error


def read(file: Path, fields: set[str] = _FIELDS, of: str = "nasbench.fit") -> dict[str, Any]:
    """Return the content of a checkpoint, which must have these fields; `of` is what writes such files."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken zip, pickle or tensor raises half a dozen kinds of error
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"the checkpoint {file} is corrupt, or none ({reason}): delete it to train anew, or name another file"
        ) from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not stored.keys() >= fields:
        raise CheckpointError(f"{file} is not a checkpoint of {of}, version {FORMAT}: name another file")
    return stored


def identity_of(run: Run) -> dict[str, Any]:
    """Return what two runs must have in common for one to continue the other."""
    recipe = dataclasses.asdict(run.recipe)
    return {"model": layers_of(run.model), "data": run.data.fingerprint, "split": run.split, "seed": run.seed, **recipe}


def layers_of(model: nn.Module) -> str:
    """Return twelve hexadecimal digits of a model's modules and the shapes of its parameters."""
    modules = [f"{name}:{type(module).__qualname__}" for name, module in model.named_modules()]
    tensors = [f"{name}:{tuple(tensor.shape)}" for name, tensor in model.named_parameters()]
    return hashlib.sha256("\n".join(modules + tensors).encode()).hexdigest()[:12]


def check_identity(file: Path, stored: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [
        f"{name} is {stored.get(name)!r} there and {here[name]!r} here"
        for name in here
        if stored.get(name) != here[name]
    ]
    if differ:
        raise CheckpointError(
            f"the checkpoint {file} belongs to another run: {'; '.join(differ)}. Continue it with its own settings, "
            "name another file, or delete it to train anew"
        )


def restore(file: Path, stored: dict[str, Any], run: Run, callbacks: Sequence[Callback]) -> list[tuple[Callback, str]]:
    """Put the stored state into run and callbacks; return the hooks that the last step still owes."""
    waiting = list(callbacks)
    for name, state in stored["callbacks"]:
        owner = next((callback for callback in waiting if type(callback).__qualname__ == name), None)
        if owner is None:
            raise CheckpointError(f"the checkpoint {file} holds the state of a callback {name}: pass one again")
        waiting.remove(owner)
        owner.load_state_dict(state)
    try:
        run.model.load_state_dict(stored["model"])
        run.optimizer.load_state_dict(stored["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint {file} does not fit model or optimizer: {error}. Do callbacks change them as before?"
        ) from error
    run.step, run._loss, run._started = stored["step"], stored["loss"], time.monotonic() - stored["seconds"]
    run._seen = stored["sums"][0]
    run._loss_sum.copy_(stored["sums"][1])
    run._hit_sum.copy_(stored["sums"][2])
    hooks = [(callback, hook) for hook in ("on_step", "on_epoch") for callback in callbacks]
    owed = [tuple(entry) for entry in stored["todo"]]
    todo = []
    for callback, hook in reversed(hooks):  # what was left is the end of the list, so look from there
        if (entry := (type(callback).__qualname__, hook)) in owed:
            owed.remove(entry)
            todo.append((callback, hook))
    return todo[::-1]
