"""The table of the stages, on a terminal or in a notebook."""

from collections.abc import Mapping
from typing import Any

from .results import split_metrics

LAST = ("loss", "transport")  # columns after the user's own metrics


def print_stages(metrics: Mapping[str, Any]) -> None:
    """
    Print what each stage reached, a line a stage; nothing where a model was trained end to end.

    Args:
        metrics (`Mapping[str, Any]`): of [`MMSTTrainer.evaluate`].
    """
    _, found = split_metrics(metrics)
    if not found:
        return
    from rich.console import Console
    from rich.table import Table

    names = [*(name for name in found if name not in LAST), *(name for name in LAST if name in found)]
    names.sort(key="accuracy".__ne__)
    table = Table("stage", *names, title="What each stage reached")
    for k, values in enumerate(zip(*(found[name] for name in names), strict=True), start=1):
        cells = (
            f"{value:.2%}" if name == "accuracy" else f"{value:.4f}" for name, value in zip(names, values, strict=True)
        )
        table.add_row(str(k), *cells)
    Console().print(table)
