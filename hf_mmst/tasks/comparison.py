"""`compare`: the same model and data trained greedily in stages, in stages with transport, and end to end."""

import contextlib
import copy
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import OWN_FIELDS, MMSTConfig
from ..method.heads import is_pretrained
from ..method.learning_rates import PRETRAINED_FACTOR
from ..records.comparison_picture import WAYS, write_comparison
from ..records.results import provenance, standard_error
from .linear_probe import probed_accuracies
from .progress import speak_in_lines
from .report import evaluating_part, write_json

if TYPE_CHECKING:
    from ..trainer.mmst_trainer import MMSTTrainer

JSON_NAME, PICTURE_NAME = "compare.json", "compare.png"
ERRORS = 2  # standard errors that a difference must have to count as one
CANNOT = {  # what would not be comparable, or is of a single run: the field, what it has to be, and why
    "transport_weight": (lambda value: value > 0, "0 is greedy training, which is one of the three anyway", "0.3"),
    "num_stages": (lambda value: value != 1, "1 is end-to-end training, which is one of the three anyway", "2 or more"),
    "stage_order": (lambda value: value != "end_to_end", "it has no local losses to compare", "simultaneous"),
    "stage_objective": (lambda value: value == "local", "its stages have no heads to compare", "local"),
    "end_to_end_laps": (lambda value: value == 0, "the heads do not learn in these laps", "0"),
    "memory_budget": (lambda value: value is None, "it would plan another way of training", "None"),
    "load_best_model_at_end": (lambda value: not value, "it would choose by the samples that are reported", "False"),
    "resume_from_checkpoint": (lambda value: value is None, "three runs begin anew", "None"),
    "push_to_hub": (lambda value: not value, "no model is kept", "False"),
    "stage_parallel": (lambda value: not value, "all three run in a single process", "False"),
    "world_size": (lambda value: value == 1, "all three run in a single process", "1 (one process)"),
}


@dataclass
class CompareArguments:
    """The argument of a recipe that compares."""

    compare: bool = field(
        default=False,
        metadata={
            "help": "Train three times, in stages greedily and with transport and end to end, less long by default; "
            "write compare.json and compare.png in the place of a model."
        },
    )


def compare(
    make: Callable[[MMSTConfig], "MMSTTrainer"], args: MMSTConfig, *, model: str, dataset: str, elsewhere: str
) -> dict[str, Any]:
    """
    Train three ways, print a table and a verdict, and write `compare.json` and `compare.png` to `args.output_dir`.

    All have the same first weights, order of samples, epochs and learning rates, none of them tuned; the test samples
    choose nothing. The model that was trained end to end has no heads along the way: linear classifiers of what it puts
    out after each stage, trained afterwards on the training samples, stand in for them. No model is kept.

    Args:
        make (`Callable`): makes a trainer with a new model, each time with the same weights, and `accuracy` among its
            metrics.
        args ([`MMSTConfig`]): of the run in stages with transport.
        model (`str`), dataset (`str`): what they are called.
        elsewhere (`str`): a sentence on where the transport term has an effect, for where none is seen here.

    Returns:
        `dict[str, Any]`: what is in `compare.json`; accuracies are fractions, `seconds` of training without evaluation.

    Raises:
        `ValueError`: for settings with which three runs cannot be compared.
    """
    for name, (fits, why, instead) in CANNOT.items():
        if not fits(getattr(args, name)):
            raise ValueError(f"{name}={getattr(args, name)!r} cannot be compared: {why}. Set {name} to {instead}.")
    begin = time.perf_counter()
    rows = {}
    order = args.stage_order or "simultaneous"  # whatever the default of a pretrained model is
    staged = make(_with(args, "stages_greedy", stage_order=order, transport_weight=0.0))
    partition, pretrained = staged.partition, is_pretrained(staged.model)
    rows["stages, greedy"] = _trained(staged)
    heads = staged.heads.cpu()
    del staged  # so that one model is on the device at a time
    rows["stages"] = _trained(make(_with(args, "stages_with_transport", stage_order=order)))
    whole = make(_end_to_end(args, pretrained))
    rows["end to end"] = _trained(whole)
    probes = probed_accuracies(whole, partition, heads)
    rows["end to end"]["stage_accuracy"] = [*probes, rows["end to end"]["accuracy"]]
    found = {
        "model": model,
        "dataset": dataset,
        "num_train_samples": len(whole.train_dataset),
        "num_eval_samples": len(whole.eval_dataset),
        "num_stages": partition.num_stages,
        "depths": [sum(map(len, partition.stages[: k + 1])) for k in range(partition.num_stages)],
        "rows": [{"way": way, **rows[way]} for way in WAYS],
        "seconds": time.perf_counter() - begin,
        **provenance(args.device),
        "seed": args.seed,
    }
    folder = Path(args.output_dir)
    write_json(folder / JSON_NAME, found)
    drawn = write_comparison(found, folder / PICTURE_NAME)
    _say(found, elsewhere)
    print(f"{found['seconds']:.0f} s, written to {folder / JSON_NAME}{f' and {PICTURE_NAME}' if drawn else ''}")
    return found


def _with(args: MMSTConfig, folder: str, **settings: Any) -> MMSTConfig:
    """The arguments with some others, for a run in a folder of its own."""
    chosen = copy.deepcopy(args)
    for name, value in {"output_dir": str(Path(args.output_dir, folder)), **settings}.items():
        setattr(chosen, name, value)
    chosen.check_stages()
    return chosen


def _end_to_end(args: MMSTConfig, pretrained: bool) -> MMSTConfig:
    """Those of plain training; what comes after the last layer learns at the rate that it has in stages."""
    plain = {one.name: one.default for one in fields(MMSTConfig) if one.name in OWN_FIELDS}
    rate = args.head_learning_rate
    if rate is None and pretrained:
        rate = PRETRAINED_FACTOR * args.learning_rate
    return _with(
        args, "end_to_end", **plain | {"num_stages": 1, "stage_order": "simultaneous", "head_learning_rate": rate}
    )


def _trained(trainer: "MMSTTrainer") -> dict[str, Any]:
    """Train and evaluate: results of one way, without what is the same for all."""
    args = trainer.args
    gc.collect()  # a trainer refers to itself, and its model would count as this one's memory
    if args.num_stages == 1:
        print("\nEnd to end")
    else:
        how = "with transport" if args.transport_weight else "greedily"
        print(f"\nIn {args.num_stages} stages, {how}")
    speak_in_lines(trainer)
    trainer.peaks.tracks_tensors = True
    with evaluating_part(trainer):
        trainer.train()  # type: ignore[call-arg]  # functools.wraps hides self
    logs = trainer.state.log_history
    seconds = sum(entry.get("train_runtime", 0) - entry.get("eval_runtime", 0) for entry in logs)
    metrics = trainer.evaluate()
    with contextlib.suppress(OSError):  # it holds checkpoints
        Path(args.output_dir).rmdir()
    error = standard_error(metrics["eval_accuracy"], len(trainer.eval_dataset))
    results = trainer.results(metrics, standard_error=error, seconds=seconds)
    shared = {"command", "device", "versions", "seed", "model", "base_model", "num_processes", "method"}
    return {name: value for name, value in results.items() if name not in shared}


def _say(found: Mapping[str, Any], elsewhere: str) -> None:
    """Print the table of the three ways and what can be said of them."""
    from rich.console import Console
    from rich.table import Table

    title = f"{found['model']} on {found['dataset']}: {found['num_train_samples']:,} samples to train on"
    table = Table("way", "accuracy, %", "best stage - last", "peak of tensors, MiB", "seconds", title=title)
    rows = {row["way"]: row for row in found["rows"]}
    for way, row in rows.items():
        stages, peak = row["stage_accuracy"], row["peak_bytes"]
        table.add_row(
            WAYS[way],
            f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}",
            f"{100 * (max(stages) - stages[-1]):.1f}" if row["num_stages"] > 1 else "-",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
            f"{row['seconds']:,.0f}",
        )
    Console(width=110).print(table)
    print(
        f"± is the standard error of {found['num_eval_samples']:,} test samples; one seed, one learning rate for all, "
        "not tuned for any."
    )
    print(verdict(rows["stages, greedy"], rows["stages"], elsewhere))


def verdict(greedy: Mapping[str, Any], moved: Mapping[str, Any], elsewhere: str) -> str:
    """
    What the transport term did, in words: nothing is made of a difference of less than two standard errors.

    Args:
        greedy, moved (`Mapping[str, Any]`): `accuracy` and `standard_error` without and with it.
        elsewhere (`str`): said where it did not win.
    """
    points = 100 * (moved["accuracy"] - greedy["accuracy"])
    error = 100 * math.hypot(greedy["standard_error"], moved["standard_error"])
    if points > ERRORS * error:
        return f"Transport wins {points:.1f} ± {error:.1f} points over greedy training."
    says = "shows no effect on these data" if points > -ERRORS * error else "loses on these data"
    return f"Transport {says}: {points:+.1f} ± {error:.1f} points to greedy training. {elsewhere}"
