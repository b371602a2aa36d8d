"""The command line: `nasbench search|worker|table|compare|report|compress`.

Arguments are parsed before anything heavy is imported, so `nasbench --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces import SPACES

if TYPE_CHECKING:
    from nasbench.data import Data
    from nasbench.result import SearchResult
    from search_spaces.base import SearchSpace

SMALL = {"channels": 8, "cells": 1}
"""The NAS-Bench-201 network that `nasbench search` uses when no space is named: it trains in seconds on a CPU."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 with the reason on standard error."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"nasbench: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "" if options.command == "compress" else "; run the same line again to go on"
        print(f"nasbench: interrupted{goes_on}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nasbench",
        description="Find a neural network. `nasbench search` alone searches NAS-Bench-201 cells on scanned digits.",
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="search|worker|table|compare|report|compress"
    )

    search = commands.add_parser("search", help="search a space on data or a table; run it again to go on")
    _space_options(search)
    data_options(search)
    search.add_argument(
        "--table",
        help="look results up in this table instead of training: a name or an .npz file; a one-shot strategy trains "
        "and tells true ranks from it",
    )
    search.add_argument("--table-metric", help="metric of the table that ranks what a one-shot strategy decodes")
    search.add_argument(
        "--strategy",
        default="evolution",
        help="evolution, top_evolution, local_search, reinforce, linas, eas, grid, random, tpe, gp, nsga2, nsga3; with "
        "one supernet: darts, gdas, drnas, pcdarts, spos, dass",
    )
    search.add_argument(
        "--objectives",
        nargs="+",
        metavar="METRIC",
        help="default: val_accuracy; NAME:maximize where NAME does not tell",
    )
    search.add_argument("--constraint", action="append", default=[], metavar='"params<1e6"')
    search.add_argument("--pruner", help="median, hyperband or halving")
    search.add_argument("--trials", type=int, help="default: 30; one-shot strategies have their own")
    search.add_argument("--epochs", type=int, help="default: 4; of a supernet, as in the strategy's paper")
    search.add_argument("--timeout", type=float, help="seconds")
    search.add_argument("--study", help="name of the study; default: a new one")
    search.add_argument("--storage", help="Optuna storage URL or journal file; default: study.db in the study's folder")
    search.add_argument("--folder", default="runs", help="where study folders lie; default: runs")
    search.add_argument("--seed", type=int, default=0)
    search.add_argument("--device", default="auto")
    search.add_argument("--workers", type=int, default=1, help="processes")
    search.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="fields of the recipe or strategy")
    search.set_defaults(run=_search)

    worker = commands.add_parser("worker", help="help with a study that another process began")
    worker.add_argument("--study", required=True)
    worker.add_argument("--storage", help="default: study.db in the study's folder")
    worker.add_argument("--folder", default="runs")
    worker.add_argument(
        "--trials", type=int, help="finished trials the study is to have in all; default: as it was begun"
    )
    worker.add_argument("--space", help="your own space as module:Class; others are made by name")
    worker.add_argument("--device", default="auto")
    worker.add_argument("--timeout", type=float, help="seconds")
    worker.add_argument("--quiet", action="store_true")
    worker.set_defaults(run=_worker)

    table = commands.add_parser("table", help="measure a whole space, or show a table")
    actions = table.add_subparsers(required=True, metavar="build|show")
    build = actions.add_parser("build", help="train every architecture of a space; resumable")
    _space_options(build)
    data_options(build)
    build.add_argument("output", help="the .npz file to write")
    build.add_argument("--epochs", type=int, default=10)
    build.add_argument("--seeds", type=int, default=3)
    build.add_argument("--storage", help="Optuna storage URL or journal file")
    build.add_argument("--folder", default="runs")
    build.add_argument("--workers", type=int, default=1)
    build.add_argument("--device", default="auto")
    build.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="fields of the recipe")
    build.set_defaults(run=_table_build)
    show = actions.add_parser("show", help="what a table holds, and its best rows")
    show.add_argument("table", help="a name or an .npz file")
    show.add_argument("--arch", help="one architecture, as JSON or in the space's notation")
    show.set_defaults(run=_table_show)

    compare = commands.add_parser("compare", help="strategies side by side over seeds, random search always among them")
    _space_options(compare)
    compare.add_argument("--strategies", nargs="+", default=["evolution", "tpe"])
    compare.add_argument("--table", default="nasbench201-digits", help="a name or an .npz file")
    compare.add_argument("--objective", default="val_accuracy", help="METRIC, or METRIC:minimize")
    compare.add_argument("--report", help="the metric to report of the choice, such as test_accuracy")
    compare.add_argument("--trials", type=int, default=300)
    compare.add_argument("--seeds", type=int, default=20)
    compare.add_argument("--output", default="comparison", help="writes OUTPUT.json and OUTPUT.png")
    compare.set_defaults(run=_compare)

    report = commands.add_parser("report", help="write the report of a study again")
    report.add_argument("study", help="name of the study")
    report.add_argument("--folder", default="runs")
    report.add_argument("--output", help="default: report.html in the study's folder")
    report.add_argument("--space", help="your own space as module:Class; others are made by name")
    report.set_defaults(run=_report)

    from compress.command import add_parser

    add_parser(commands)
    return parser


def _space_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--space", help=f"{', '.join(SPACES)}, or your own as module:Class; default: a small nasbench201"
    )
    parser.add_argument(
        "--space-set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the space; a list is widths=[4,8]"
    )


def data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="digits",
        help="digits, cifar10, cifar100, svhn, an .npz file, a folder per class; pydoc, a .txt file",
    )
    parser.add_argument(
        "--data-set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of data.load, such as root or context"
    )
    parser.add_argument("--download", action="store_true", help="fetch a named data set that is not there")


def read_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE words; values are JSON where they can be, else text."""
    from nasbench.errors import SettingError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SettingError(f"{pair!r} is no setting. Write KEY=VALUE, such as lr=0.05.")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _objectives(words: Sequence[str] | None) -> dict[str, str | None] | None:
    """Read METRIC and METRIC:DIRECTION."""
    if words is None:
        return None
    return {name: direction or None for name, _, direction in (word.partition(":") for word in words)}


def _space(options: argparse.Namespace) -> SearchSpace:
    import search_spaces

    if options.space is None:
        return search_spaces.space("nasbench201", **SMALL | read_settings(options.space_set))
    return search_spaces.space(options.space, **read_settings(options.space_set))


def load_data(options: argparse.Namespace) -> Data:
    from nasbench.data import load

    return load(options.data, download=options.download, **read_settings(options.data_set))


def _search(options: argparse.Namespace) -> None:
    import nasbench as nb
    from nasbench.devices import init_distributed, leave_distributed

    rank, _ = init_distributed()
    settings = read_settings(options.set)
    if options.epochs is not None:
        settings["epochs"] = options.epochs
    table: Any = nb.Table.load(options.table) if options.table is not None else None
    one_shot = options.strategy in nb.strategies.ONE_SHOT
    source: Any = load_data(options) if table is None or one_shot else table
    if options.table_metric and not (one_shot and table is not None):
        raise nb.SettingError(
            "--table-metric ranks what a one-shot strategy decodes: give --table, and --strategy darts, gdas, drnas, "
            "pcdarts, spos or dass."
        )
    if one_shot and table is not None:
        settings["table"] = (table, options.table_metric) if options.table_metric else table
    elif table is None and not one_shot:
        settings.setdefault("epochs", 4)
        settings.setdefault("batch_size", 64)
    result = nb.search(
        _space(options),
        source,
        options.strategy,
        objectives=_objectives(options.objectives),
        constraints=options.constraint,
        pruner=options.pruner,
        trials=options.trials,
        timeout=options.timeout,
        study=options.study,
        storage=options.storage,
        folder=options.folder,
        seed=options.seed,
        device=options.device,
        workers=options.workers,
        progress=rank == 0,
        **settings,
    )
    if rank == 0:
        _tell(result, source)
    leave_distributed()


def _tell(result: SearchResult, source: Any) -> None:
    """Print what a search found, and where it lies."""
    import nasbench as nb
    from nasbench.data import Data
    from nasbench.objective import WEIGHTS

    if len(result.objectives) > 1:
        print(f"{len(result.pareto())} architectures that no other beats in {' and '.join(result.objectives)}:")
        for trial in result.pareto():
            print(f"  trial {trial.number}: {_figures(trial.metrics)}  {trial.arch}")
    elif result.complete:
        best = result.best
        print(f"best of {len(result.complete)}: trial {best.number}\n  {best.arch}\n  {_figures(best.metrics)}")
        if best.supernet is not None:
            print("  measured with the weights it shared in the supernet; train it alone to know how good it is:")
            dass = result.conditions["strategy"]["name"] == "dass"
            fit, more = ("nb.strategies.dass.train_sparse", "density=...") if dass else ("nb.fit", "epochs=...")
            print(f"  model = {fit}(result.best.build(weights=False), data, {more}); nb.evaluate(model, data)")
        elif isinstance(source, Data) and source.count("test"):
            tested = nb.evaluate(best.build(), source)
            print(f"  on test {source.units}, read this once: {_figures(tested)}")
        if result.folder is not None:
            number = best.number if best.copied_from is None else best.copied_from
            weights = result.folder / "trials" / str(number) / WEIGHTS
            if weights.exists():
                print(f"model:  {weights}")
    if result.folder is not None:
        if result.complete:
            print(f"report: {result.folder / 'report.html'}\nplot:   {result.folder / 'search.png'}")
        print(f"study:  {result.folder}  (run again with --study {result.folder.name} to go on)")


def _figures(metrics: Any) -> str:
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    return ", ".join(
        f"{k} {v:,}" if float(v).is_integer() and abs(v) > 1 else f"{k} {v:.4f}" for k, v in numbers.items()
    )


def _worker(options: argparse.Namespace) -> None:
    import nasbench as nb
    import search_spaces

    nb.join(
        options.study,
        options.storage,
        trials=options.trials,
        folder=options.folder,
        space=search_spaces.space(options.space) if options.space else None,
        device=options.device,
        timeout=options.timeout,
        progress=not options.quiet,
    )


def _table_build(options: argparse.Namespace) -> None:
    import nasbench as nb

    table = nb.Table.build(
        _space(options),
        load_data(options),
        epochs=options.epochs,
        seeds=options.seeds,
        storage=options.storage,
        folder=options.folder,
        workers=options.workers,
        device=options.device,
        **read_settings(options.set),
    )
    print(f"{table!r}\nwritten to {table.save(options.output)}")


def _table_show(options: argparse.Namespace) -> None:
    import nasbench as nb

    table = nb.Table.load(options.table)
    print(repr(table))
    if options.arch:
        print(_figures(table.query(table.space.parse(options.arch))))
        return
    for name in table.metrics:
        if name != "seconds":
            arch, value = table.best(name, minimize="loss" in name)
            print(f"best {name}: {value:.4f}  {arch}")
    print(json.dumps(table.conditions, indent=1))


def _compare(options: argparse.Namespace) -> None:
    import nasbench as nb

    table = nb.Table.load(options.table)
    space = table.space if options.space is None else _space(options)
    comparison = nb.compare(
        options.strategies,
        space,
        table,
        trials=options.trials,
        seeds=options.seeds,
        objectives=_objectives([options.objective]),
        report=options.report,
    )
    print(comparison)
    output = Path(options.output)
    comparison.save(output.with_suffix(".json"))
    comparison.plot(output.with_suffix(".png"))
    print(f"written to {output.with_suffix('.json')} and {output.with_suffix('.png')}")


def _report(options: argparse.Namespace) -> None:
    from nasbench.errors import StudyError
    from nasbench.result import SearchResult

    home = Path(options.folder) / options.study
    if not (home / "result.json").exists():
        names = sorted(p.parent.name for p in Path(options.folder).glob("*/result.json"))
        raise StudyError(
            f"there is no study {options.study!r} in {options.folder}/; found {', '.join(names) or 'none'}."
        )
    space = None
    if options.space:
        import search_spaces

        space = search_spaces.space(options.space)
    result = SearchResult.load(home / "result.json", space, folder=home)
    path = result.report(options.output)
    result.plot(path.with_name("search.png"))
    print(f"{result!r}\nreport: {path}")
