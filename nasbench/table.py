"""Tabular benchmarks: what every architecture of a space scored, looked up instead of trained.

The file is an npz without pickles. `header` is JSON as bytes: space, choices, metrics, conditions. `index` numbers the
rows (differences of `space.index`); it is left out when every architecture of the space has its row. An accuracy is a
share of a count of images, so a metric is kept as whole numbers over one denominator if that gives back every bit, and
as floats if not. Metrics of one number type share a matrix (rows, columns). Matrices and index are stored as planes of
bytes, the lowest first: deflate packs them a sixth smaller than whole numbers, and unpacks them faster.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

import search_spaces
from nasbench.errors import TableError
from nasbench.files import atomic_write
from nasbench.packing import Floats, Packed, as_metric, joined, planes
from search_spaces.base import Arch, ArchError, Option, SearchSpace, nearest

if TYPE_CHECKING:
    from nasbench.data import Data
    from nasbench.recipe import Recipe

ArchLike = Mapping[str, Option] | str

_FORMAT = 1
SHIPPED = Path(__file__).with_name("tables")
_DAMAGE = (OSError, ValueError, EOFError, LookupError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
_STORES = ("uint16", "uint32", "float32", "float64")
# Our name of a data set -> what a NATS-Bench API calls it, and the number we want. Its "cifar10" was trained on train
# and validation images together, so validation accuracies are those of "cifar10-valid".
_NATS = {
    "cifar10": {"val": ("cifar10-valid", "valid-accuracy"), "test": ("cifar10", "test-accuracy")},
    "cifar100": {"val": ("cifar100", "valid-accuracy"), "test": ("cifar100", "test-accuracy")},
    "imagenet16_120": {"val": ("ImageNet16-120", "valid-accuracy"), "test": ("ImageNet16-120", "test-accuracy")},
}


class Table:
    """Metrics of architectures that were measured before: one row each, in the order of `space.index`.

    Args:
        space: what the rows are architectures of. A search may use any space of the same choices (see `check`).
        metrics: name -> (rows,) or (rows, seeds) numbers; NaN is a missing measurement. float32 stays float32, all else
            becomes float64.
        archs: the rows' architectures or their strings, in any order; left out, the rows are the whole space in order.
        canonical: there are rows for canonical architectures only; a question about another is answered by its own.
        conditions: how the numbers were measured, as JSON values: data, recipe, seeds, versions, ...

    Raises:
        TableError: the arrays and architectures do not make a table.

    Example:
        >>> from search_spaces import NASBench201
        >>> space = NASBench201()
        >>> table = Table(space, {"val_accuracy": [[0.5, 0.7], [0.9, 1.0]]}, archs=[space.at(7), space.at(0)])
        >>> table
        Table(NASBench201, 2 of 15,625 architectures, metrics: val_accuracy x 2 seeds)
        >>> table.query(space.at(7))
        {'val_accuracy': 0.6}
        >>> table.query(space.to_string(space.at(0)), "val_accuracy", seed=1)
        1.0
    """

    space: SearchSpace
    metrics: tuple[str, ...]
    conditions: dict[str, Any]
    canonical: bool

    def __init__(
        self,
        space: SearchSpace,
        metrics: Mapping[str, ArrayLike],
        *,
        archs: Iterable[ArchLike] | None = None,
        canonical: bool = False,
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        if space.size >= 2**63:
            raise TableError(f"{type(space).__name__} has {space.size:.1e} architectures; a table can number 2**63.")
        arrays = {name: as_metric(name, values) for name, values in metrics.items()}
        if not arrays:
            raise TableError("a table needs at least one metric, got none. Pass metrics={'val_accuracy': array}.")
        index = None if archs is None else _numbers(space, archs)
        lengths = {"archs": space.size if index is None else len(index)} | {n: len(a) for n, a in arrays.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
            raise TableError(f"every metric of a table has one row per architecture; found rows: {found}.")
        if index is not None:
            order = np.argsort(index)
            index, arrays = index[order], {name: array[order] for name, array in arrays.items()}
            if len(twice := index[1:][index[1:] == index[:-1]]):
                raise TableError(f"an architecture has two rows: {space.at(int(twice[0]))}. Give it one.")
        try:
            plain = json.loads(json.dumps(dict(conditions or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TableError(f"the conditions of a table are JSON values, these are not: {error}.") from None
        self._fill(space, arrays, index, canonical, plain)
        for arch in self.archs() if canonical else ():
            if (other := space.canonical(arch)) != arch:
                raise TableError(f"{arch} is not canonical, {other} is. Give rows for canonical architectures only.")

    def _fill(
        self,
        space: SearchSpace,
        columns: Mapping[str, Floats | Packed],
        index: NDArray[np.int64] | None,
        canonical: bool,
        conditions: dict[str, Any],
    ) -> None:
        self.space, self.metrics, self.canonical, self.conditions = space, tuple(columns), canonical, conditions
        self._columns = dict(columns)
        self._index = None if index is not None and len(index) == space.size else index
        self._length = space.size if index is None else len(index)
        self._row_of: dict[int, int] = {}  # an architecture's number -> its row; filled on first use
        self._values: dict[tuple[str, int | None], Floats] = {}

    # Questions -----------------------------------------------------------------------------------------------------

    @overload
    def query(self, arch: ArchLike, metric: str, seed: int | None = None) -> float: ...
    @overload
    def query(self, arch: ArchLike, metric: None = None, seed: int | None = None) -> dict[str, float]: ...
    def query(self, arch: ArchLike, metric: str | None = None, seed: int | None = None) -> float | dict[str, float]:
        """Return one metric of an architecture, or all of them by name: the mean over seeds, or that of one seed.

        Args:
            arch: an architecture, or its string in the space's notation.
            metric: one of `metrics`.
            seed: 0 for the first seed the metric was measured with, and so on.

        Raises:
            TableError: no such row, metric or seed, or it was not measured (NaN).
            ArchError: the architecture is not of the table's space.
        """
        row = self._row(arch)
        if metric is None:
            return {name: self._value(row, name, seed) for name in self.metrics}
        return self._value(row, metric, seed)

    def values(self, metric: str, seed: int | None = None) -> Floats:
        """Return a metric of all rows, (rows,), read-only: the mean over seeds, or that of one seed. NaN is missing.

        Raises:
            TableError: no such metric or seed.
        """
        if (known := self._values.get((metric, seed))) is not None:
            return known
        array = self._array(metric)
        if seed is None:
            # Averaged in float64, then rounded once to the metric's own precision.
            values = array if array.ndim == 1 else array.mean(axis=1, dtype=np.float64).astype(array.dtype)
        elif array.ndim == 1:
            raise TableError(f"{metric!r} has one value per architecture, asked for seed {seed}. Leave seed out.")
        elif seed not in range(array.shape[1]):
            raise TableError(f"{metric!r} was measured with seeds 0 to {array.shape[1] - 1}, asked for {seed!r}.")
        else:
            values = np.ascontiguousarray(array[:, seed])
        values.flags.writeable = False
        self._values[metric, seed] = values
        return values

    def rows(self, archs: Iterable[ArchLike]) -> NDArray[np.int64]:
        """Return the rows of architectures or their strings, as in ``table.values(metric)[table.rows(archs)]``.

        Raises:
            TableError: an architecture has no row.
            ArchError: an architecture is not of the table's space.
        """
        return np.fromiter(map(self._row, archs), np.int64)

    def best(self, metric: str, *, minimize: bool = False) -> tuple[Arch, float]:
        """Return the architecture with the highest (or lowest) mean of a metric, and that mean. Ties: the first row.

        Raises:
            TableError: no such metric, or none of it was measured.
        """
        values = self.values(metric)
        if np.isnan(values).all():
            raise TableError(f"there is no best {metric!r}: it was not measured for any architecture of this table.")
        row = int(np.nanargmin(values) if minimize else np.nanargmax(values))
        return self._arch(row), values.item(row)

    def archs(self) -> Iterator[Arch]:
        """Yield the architectures in the order of the rows."""
        return map(self._arch, range(self._length))

    def check(self, space: SearchSpace) -> None:
        """Compare a space's choices with the table's; settings that scale a network (`channels`) may differ.

        Raises:
            TableError: the choices differ.
        """
        if difference := _difference(_choices(self.space), _choices(space)):
            name, other = type(self.space).__name__, type(space).__name__
            raise TableError(f"this is a table of {name}, asked about {other}: {difference}. Use the space {name}.")

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the choices, rows and numbers: equal for equal tables, however made."""
        digest = hashlib.sha256(json.dumps([_choices(self.space), self.canonical, sorted(self.metrics)]).encode())
        digest.update(b"" if self._index is None else self._index.tobytes())
        for name in sorted(self.metrics):
            digest.update(self._array(name).tobytes())
        return digest.hexdigest()[:12]

    def __len__(self) -> int:
        return self._length

    def __contains__(self, arch: object) -> bool:
        try:
            self._row(arch)  # type: ignore[arg-type]
        except (TableError, ArchError):
            return False
        return True

    def __repr__(self) -> str:
        shapes = {name: self._array(name).shape for name in self.metrics}
        metrics = ", ".join(f"{n} x {s[1]} seeds" if len(s) == 2 else n for n, s in shapes.items())
        count = f"{len(self):,} of {self.space.size:,} architectures{', canonical' if self.canonical else ''}"
        return f"Table({type(self.space).__name__}, {count}, metrics: {metrics})"

    def to_frame(self) -> Any:
        """Return a pandas DataFrame: a row per architecture, its decisions and the means of all metrics.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Table.to_frame needs pandas, which is not installed. Run: pip install pandas") from error
        decisions = pandas.DataFrame([dict(arch) for arch in self.archs()])
        return decisions.assign(**{name: self.values(name) for name in self.metrics})

    def _array(self, metric: str) -> Floats:
        """Return a metric's numbers, (rows,) or (rows, seeds), unpacked on first use."""
        if metric not in self._columns:
            raise TableError(f"the table has no metric {metric!r}; {nearest(metric, self.metrics)}")
        column = self._columns[metric]
        if isinstance(column, Packed):
            column = self._columns[metric] = column.unpack()
        return column

    def _value(self, row: int, metric: str, seed: int | None) -> float:
        value: float = self.values(metric, seed).item(row)
        if value != value:
            which = "" if seed is None else f" with seed {seed}"
            raise TableError(f"{metric!r} of {self._arch(row)} was not measured{which}. Ask for another metric or row.")
        return value

    def _arch(self, row: int) -> Arch:
        return self.space.at(row if self._index is None else int(self._index[row]))

    def _row(self, arch: ArchLike) -> int:
        number = _number(self.space, arch)
        if self._index is None:
            return number
        if not self._row_of:
            self._row_of = dict(zip(self._index.tolist(), range(self._length), strict=True))
        row = self._row_of.get(number)
        if row is None and self.canonical:
            standing = self.space.canonical(self.space.at(number))
            if (row := self._row_of.get(self.space.index(standing))) is not None:
                self._row_of[number] = row
        if row is None:
            raise TableError(
                f"{self.space.at(number)} is not in the table: it has {self._length:,} of the {self.space.size:,} "
                f"architectures of {type(self.space).__name__}. Take one of table.archs()."
            )
        return row

    # Files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path, *, space: SearchSpace | None = None) -> Table:
        """Read a table: one that is shipped, by name; one that `save` wrote; or plain arrays.

        Plain arrays are an npz of `arch`, architectures as strings, and an array (rows,) or (rows, seeds) per metric.

        Args:
            source: a shipped table's name ("nasbench201-digits"), or a path.
            space: the table's space, if it is none of `search_spaces.SPACES`: a file may name your class, but cannot
                have it imported. Plain arrays are taken for `NASBench201` if left out.

        Raises:
            TableError: no such table, a pickle, a damaged file, or a file that is no table.
        """
        path = _find(source)
        arrays = _read(path)
        try:
            return cls._from_header(arrays, space) if "header" in arrays else cls._from_plain(arrays, space)
        except TableError as error:
            raise TableError(f"cannot load {path}: {error}") from None

    @classmethod
    def _from_plain(cls, arrays: dict[str, NDArray[Any]], space: SearchSpace | None) -> Table:
        archs = arrays.pop("arch", None)
        if archs is None or archs.dtype.kind not in "US" or archs.ndim != 1 or not len(archs):
            raise TableError("it has no array 'arch' of architecture strings. A table is written by Table.save.")
        strings = archs.astype(str).tolist()
        if space is None:
            space = search_spaces.space("nasbench201")
            try:
                space.parse(strings[0])
            except ArchError as error:
                raise TableError(f"no space was given, and {error} For another space pass space=.") from None
        return cls(space, arrays, archs=strings)

    @classmethod
    def _from_header(cls, arrays: dict[str, NDArray[Any]], space: SearchSpace | None) -> Table:
        try:
            header = json.loads(arrays["header"].tobytes())
            if header["format"] != _FORMAT:
                raise TableError(f"it has format {header['format']}, this version reads {_FORMAT}. Update nasbench.")
            space = space or _space(header["space"])
            if difference := _difference(header["choices"], _choices(space)):
                raise TableError(f"its space is not {type(space).__name__}: {difference}. Pass the right space=.")
            index = np.cumsum(joined(arrays["index"], "int64")) if "index" in arrays else None
            # Rows out of order would answer for other architectures.
            if index is not None and not (index[0] >= 0 and (np.diff(index) > 0).all() and index[-1] < space.size):
                raise ValueError("the rows are not numbered in order")
            matrices = {store: joined(arrays[store], store) for store in _STORES if store in arrays}
            length = space.size if index is None else len(index)
            columns = {entry["name"]: Packed.from_header(entry, matrices, length) for entry in header["metrics"]}
            table = cls.__new__(cls)
            table._fill(space, columns, index, bool(header["canonical"]), dict(header["conditions"]))
        except TableError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise TableError(f"it is damaged ({error!r}). Get the file again, or build the table again.") from None
        return table

    def save(self, path: str | Path) -> Path:
        """Write the table as npz, whole or not at all, without loss. Equal tables give equal bytes.

        Raises:
            OSError: the file cannot be written.
        """
        entries = []
        matrices: dict[str, list[NDArray[Any]]] = {}
        for name in self.metrics:
            column = Packed.pack(self._array(name))
            group = matrices.setdefault(column.codes.dtype.name, [])
            entries.append({"name": name, "first": sum(codes.shape[1] for codes in group), **column.to_header()})
            group.append(column.codes)
        header = {
            "format": _FORMAT,
            "space": json.loads(self.space.to_json()),
            "choices": _choices(self.space),
            "canonical": self.canonical,
            "conditions": self.conditions,
            "metrics": entries,
        }
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
        if self._index is not None:
            arrays["index"] = planes(np.diff(self._index, prepend=0))
        arrays |= {store: planes(np.concatenate(group, axis=1)) for store, group in matrices.items()}
        with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
            for name, array in arrays.items():
                member = io.BytesIO()
                np.lib.format.write_array(member, array, allow_pickle=False)
                # Not numpy.savez, which stamps the time: equal tables are to be equal files.
                file.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED, 9)
        return Path(path)

    @classmethod
    def convert(
        cls,
        api: Any,
        *,
        space: SearchSpace | None = None,
        datasets: Sequence[str] = tuple(_NATS),
        epochs: Sequence[int] = (12, 200),
        progress: bool = True,
    ) -> Table:
        """Return the accuracies of a NATS-Bench API object as a table, in percent, float32, mean over its seeds.

        You load the object, since that unpickles its file: ``api = nats_bench.create(path, "tss", fast_mode=True,
        verbose=False)``. Metrics get names like ``cifar10_val_12``: data set, split, epochs. What the benchmark says
        nothing about becomes NaN, or is left out if there is none of it.

        Args:
            api: has ``len(api)``, ``api[i]`` (a string), ``api.get_more_info(i, dataset, hp=epochs, is_random=False)``.
            space: reads the strings; `NASBench201` if left out.
            datasets: some of "cifar10", "cifar100", "imagenet16_120".
            epochs: the benchmark's ``hp``: 12 and 200 in its topology space; 1, 12 and 90 in its size space.

        Raises:
            TableError: the object has no such methods, data sets or epochs, or strings of another space.

        Source: Dong et al., NATS-Bench, TPAMI 2021, arXiv:2009.00437.
        """
        if not all(hasattr(api, name) for name in ("get_more_info", "__len__", "__getitem__")):
            raise TableError(
                f"convert takes a loaded NATS-Bench API object, got {type(api).__name__} {api!r:.80}. "
                'Load it yourself: api = nats_bench.create(path, "tss", verbose=False).'
            )
        if unknown := [name for name in datasets if name not in _NATS]:
            raise TableError(f"NATS-Bench has no data set {unknown[0]!r}; {nearest(unknown[0], _NATS)}")
        sources = {
            f"{name}_{split}_{hp}": (dataset, f"{hp:02d}", key)
            for hp in epochs
            for name in datasets
            for split, (dataset, key) in _NATS[name].items()
        }
        metrics = {name: np.full(len(api), np.nan, np.float32) for name in sources}
        for row in tqdm(range(len(api)), desc="convert", unit="arch", disable=not progress):
            for name, (dataset, hp, key) in sources.items():
                try:
                    value = api.get_more_info(row, dataset, hp=hp, is_random=False).get(key)
                except (LookupError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
                    raise TableError(
                        f"the benchmark has no {dataset!r} after {hp} epochs for architecture {row}: {error!r}. "
                        "Leave it out with datasets= or epochs=."
                    ) from error
                if value is not None:
                    metrics[name][row] = value
        measured = {name: values for name, values in metrics.items() if not np.isnan(values).all()}
        strings = [api[row] for row in range(len(api))]
        conditions = {"source": f"{type(api).__module__}.{type(api).__qualname__}, converted", "unit": "percent"}
        return cls(space or search_spaces.space("nasbench201"), measured, archs=strings, conditions=conditions)

    @classmethod
    def build(
        cls,
        space: SearchSpace,
        data: Data,
        *,
        recipe: Recipe | None = None,
        seeds: int = 3,
        study: str | None = None,
        storage: str | None = None,
        folder: str | Path = "runs",
        workers: int = 1,
        device: str = "auto",
        progress: bool = True,
        **changes: Any,
    ) -> Table:
        """Train every architecture of a space, one of each canonical class, and return the table.

        It is a search with the strategy "grid": killed at any moment, the same call goes on; more processes may help
        (`workers`, or `nasbench worker`). Each row has validation and test accuracy and seconds of every seed: a table
        is where test images are read in bulk, so that no search needs to.

        Args:
            recipe: how to train; `changes` replace its fields (`epochs=10`).
            seeds: training runs per architecture, with seeds 0, 1, ...
            study, storage, folder, workers, device: as for `nasbench.search`.

        Raises:
            StudyError: training failed five times in a row.
            TableError: there are not at least one seed.
        """
        from nasbench.objective import TrainObjective
        from nasbench.recipe import Recipe
        from nasbench.strategies.evolution import canonical_archs
        from nasbench.study import search

        if seeds < 1:
            raise TableError(f"seeds={seeds}: a table needs at least one training run per architecture.")
        space = space.bind(data)
        recipe = (recipe or Recipe()).replace(**changes)
        objective = TrainObjective(space, data, recipe, seeds=range(seeds), device=device, test=data.count("test") > 0)
        archs = canonical_archs(space)
        result = search(
            space,
            objective,
            "grid",
            trials=len(archs),
            study=study or f"table-{type(space).__name__.lower()}-{data.name}",
            storage=storage,
            folder=folder,
            workers=workers,
            device=device,
            progress=progress,
        )
        rows = {trial.arch: trial.runs for trial in result.complete}
        if missing := [arch for arch in archs if arch not in rows]:
            raise TableError(f"{len(missing)} of {len(archs)} architectures are not measured yet. Run this call again.")
        runs = [rows[arch] for arch in archs]
        names = [n for n in ("val_accuracy", "test_accuracy", "seconds") if n in runs[0][0]]
        columns = {name: np.array([[run[name] for run in row] for row in runs], np.float32) for name in names}
        columns["seconds"] = columns["seconds"].round(3)  # no clock is better, and milliseconds pack well
        conditions = result.conditions | {"spreads": _spreads(columns)}
        return cls(space, columns, archs=archs, canonical=True, conditions=conditions)


# Architectures and spaces ------------------------------------------------------------------------------------------


def _spreads(columns: Mapping[str, Floats]) -> dict[str, dict[str, float]]:
    """Return how much cells differ (their means over seeds) and how much the seeds of one cell do, as deviations."""
    found = {}
    for name, values in columns.items():
        within = float(values.std(axis=1, ddof=1).mean()) if values.shape[1] > 1 else 0.0
        found[name] = {
            "mean": round(float(values.mean()), 5),
            "between_architectures": round(float(values.mean(axis=1).std()), 5),
            "between_seeds": round(within, 5),
        }
    return found


def _number(space: SearchSpace, arch: ArchLike) -> int:
    """Return `space.index` of an architecture or its string; a space may have a short cut for strings, `index_of`."""
    if not isinstance(arch, str):
        return space.index(space.check(arch))
    index_of = getattr(space, "index_of", None)
    if index_of is None or arch[:1] == "{":
        return space.index(space.parse(arch))
    number: int = index_of(arch)
    return number


def _numbers(space: SearchSpace, archs: Iterable[ArchLike]) -> NDArray[np.int64]:
    numbers: list[int] = []
    try:
        numbers.extend(_number(space, arch) for arch in archs)
    except ArchError as error:
        raise TableError(f"row {len(numbers)} is no architecture of {type(space).__name__}: {error}") from None
    if not numbers:
        raise TableError("a table needs at least one architecture, got none.")
    return np.array(numbers, np.int64)


def _choices(space: SearchSpace) -> dict[str, list[Option]]:
    return {decision: list(options) for decision, options in space.choices.items()}


def _difference(table: dict[str, list[Option]], asked: dict[str, list[Option]]) -> str:
    """Return the first difference in words, or nothing. Order counts: it makes the numbers of the architectures."""
    if list(table) != list(asked):
        return f"the table has the decisions {', '.join(table)}, the space {', '.join(asked)}"
    for decision, options in table.items():
        if repr(options) != repr(asked[decision]):  # repr tells 1 from 1.0
            return f"decision {decision!r} has the options {options} in the table, {asked[decision]} in the space"
    return ""


def _space(settings: dict[str, Any]) -> SearchSpace:
    name = settings["space"]
    if search_spaces.home_of(name) is None:  # "module:class" neither: importing it would run a stranger's code
        raise TableError(f"it was made for {name!r}, none of our spaces. Pass yours: Table.load(..., space=).")
    try:
        return search_spaces.space(name, **{key: value for key, value in settings.items() if key != "space"})
    except ArchError as error:
        raise TableError(f"its space cannot be made: {error}") from None


# Reading -----------------------------------------------------------------------------------------------------------


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    shipped = {file.stem: file for file in SHIPPED.glob("*.npz")}
    if path.is_file() or str(source) in shipped:
        return path if path.is_file() else shipped[str(source)]
    if path.suffix or len(path.parts) != 1:
        raise TableError(f"there is no table file {path}. Check the path, or name a shipped table.")
    raise TableError(f"there is no shipped table {path.name!r} and no such file; {nearest(path.name, shipped)}")


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an npz, or say why it is none."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror or error}. Check the file's rights.") from None
    if start[:1] == b"\x80" or start[:3] == b"BZh":  # a pickle, or NATS-Bench's bz2 of one
        raise TableError(
            f"{path} is a pickle: reading it can run any code, so it is refused. If it is NATS-Bench and trusted, "
            "load it with its own API and pass that to Table.convert."
        )
    if start[:2] != b"PK":
        raise TableError(f"{path} is no npz file: it begins with {start!r}. A table is written by Table.save.")
    try:
        # Opened here, since numpy leaves the file open when a damaged one is not even a zip.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _DAMAGE as error:
        if "allow_pickle" in str(error):
            raise TableError(f"{path} holds python objects, that is pickles: store numbers and strings.") from None
        raise TableError(f"{path} is truncated or damaged ({error}). Get the file again.") from None
    return arrays
