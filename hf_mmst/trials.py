"""`pilot`: short trials of settings on a part of the data, ranked, to choose what to train with in earnest."""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from .config import MMSTConfig
from .field_checks import parse_bytes, whole
from .method.heads import is_pretrained
from .method.order import Order
from .planning.budget import simulation_of, ways_of
from .planning.simulation import Simulation
from .trainer.mmst_trainer import MMSTTrainer

if TYPE_CHECKING:
    from rich.table import Table

FAST_HEADS = 0.01  # a rate for new linear heads on layers that hardly move


@dataclass(frozen=True)
class Trial:
    """
    The result of one trial.

    Attributes:
        settings (`dict[str, Any]`): fields of [`MMSTConfig`] that were tried.
        metric (`float`, *optional*): on the held-out samples; `None` if the trial was too large to be run.
        planned_bytes (`int`): most bytes of tensors in a training step, of the full batch size.
        epoch_seconds (`float`, *optional*): of an epoch of every stage on all samples, as measured in the trial.
    """

    settings: dict[str, Any]
    metric: float | None
    planned_bytes: int
    epoch_seconds: float | None


@dataclass(frozen=True)
class Pilot:
    """
    The trials, from the best to the worst, and then those that were too large.

    Attributes:
        trials (`list[Trial]`): each set of settings once.
        metric_name (`str`): of what they are ranked by.
    """

    trials: list[Trial]
    metric_name: str

    @property
    def chosen(self) -> Trial | None:
        """The best trial that fits and did not diverge; `None` if none is."""
        return next((trial for trial in self.trials if trial.metric is not None and math.isfinite(trial.metric)), None)

    def config(self) -> str:
        """The chosen settings as code, ready to paste; empty if none was."""
        if self.chosen is None:
            return ""
        return f'MMSTConfig("output", {", ".join(f"{k}={v!r}" for k, v in self.chosen.settings.items())})'

    def table(self) -> "Table":
        """The trials, as a table of the rich library."""
        from rich.table import Table

        names = list(dict.fromkeys(name for trial in self.trials for name in trial.settings))
        table = Table("", *names, self.metric_name, "planned MiB", "epoch s")
        for trial in self.trials:
            table.add_row(
                ">" if trial is self.chosen else "x" if trial.metric is None else "",
                *(str(trial.settings.get(name, "")) for name in names),
                "-" if trial.metric is None else f"{trial.metric:.4f}",
                f"{trial.planned_bytes / 2**20:,.0f}",
                "-" if trial.epoch_seconds is None else f"{trial.epoch_seconds:,.0f}",
            )
        return table


def pilot(
    model_init: Callable[[], nn.Module],
    args: MMSTConfig,
    train_dataset: Dataset,
    compute_metrics: Callable | None = None,
    *,
    eval_dataset: Dataset | None = None,
    data_collator: Callable | None = None,
    processing_class: Any = None,
    budget: int | str | None = None,
    num_trials: int = 12,
    max_steps: int = 60,
    max_samples: int = 2000,
    metric: str = "eval_accuracy",
    greater_is_better: bool = True,
    space: Mapping[str, Sequence[Any]] | None = None,
) -> Pilot:
    """
    Run short trials of settings, chosen by optuna's sampler, on some of the samples, each with a new model.

    A short run ranks settings; it does not say how good the full run will be. The samples that trials are ranked on are
    held out of the others, so that no test set is touched.

    Args:
        model_init (`Callable[[], nn.Module]`): makes the model, each time with the same weights.
        args ([`MMSTConfig`]): of the full run; what is not tried is taken from there.
        train_dataset (`Dataset`): with a length; trials are trained on up to `max_samples` of it.
        compute_metrics (`Callable`, *optional*): as for `Trainer`. Not needed for `metric="eval_loss"`.
        eval_dataset (`Dataset`, *optional*): what trials are ranked on; a fifth of the samples, held out, by default.
        data_collator, processing_class: as for `Trainer`.
        budget (`int` or `str`, *optional*): bytes of device memory, as in `"4GiB"`; what needs more is not run. By
            default `args.memory_budget`.
        num_trials (`int`): at most; settings that were drawn before are not run again.
        max_steps (`int`): optimizer steps of each trial, over all stages.
        max_samples (`int`): of the dataset, chosen with `args.seed`.
        metric (`str`): name of the metric to rank by, as [`MMSTTrainer.evaluate`] returns it.
        greater_is_better (`bool`): whether more of it is better.
        space (`Mapping[str, Sequence[Any]]`, *optional*): values to try of fields of [`MMSTConfig`]; by default several
            numbers of stages, `head_layers` 0 and 1, `head_learning_rate` as in `args` and 0.01, five weights of the
            transport term, `end_to_end_laps` 0 and 1; for a pretrained model, first its default, end to end with layers
            offloaded, at both rates.

    Returns:
        [`Pilot`]

    Raises:
        `ValueError`: for numbers below 1, too few samples, a field that does not exist, one without values, a budget
            that cannot be read, or a metric that is not there.
    """
    import optuna

    whole(1, "12 by default")("num_trials", num_trials)
    whole(1, "60 by default")("max_steps", max_steps)
    whole(2 if eval_dataset is None else 1, "2000 by default")("max_samples", max_samples)
    _check_space(space)
    train, held_out = _samples(train_dataset, eval_dataset, max_samples, args.seed)
    budget = args.memory_budget if budget is None else budget
    limit = None if budget is None else parse_bytes("budget", budget)
    model = model_init()
    simulation = _simulation(model, args, train_dataset, data_collator, processing_class)
    tried = _space(simulation, args) if space is None else space
    found: dict[str, Trial] = {}

    def objective(trial: Any) -> float:
        named = {name: values[trial.suggest_categorical(name, range(len(values)))] for name, values in tried.items()}
        return score(named)

    def score(settings: dict[str, Any]) -> float:
        key = repr(settings)
        if key not in found:
            planned = _planned(simulation, args, settings)
            found[key] = Trial(settings, None, planned, None)
            if limit is None or planned <= limit:
                found[key] = run(settings, planned)
        value = found[key].metric
        if value is None:
            raise optuna.TrialPruned
        return value

    def run(settings: dict[str, Any], planned: int) -> Trial:
        trainer = MMSTTrainer(
            model_init(),
            _arguments(args, settings, max_steps),
            data_collator,
            train,
            held_out,
            processing_class,
            compute_metrics=compute_metrics,
        )
        trainer.train()
        metrics = trainer.evaluate()
        if not isinstance(metrics.get(metric), Real):
            known = sorted(name for name, value in metrics.items() if name[:5] == "eval_" and isinstance(value, Real))
            raise ValueError(f"There is no metric {metric!r}. Set metric to one of {', '.join(known)}.")
        runtime = next(entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
        steps = math.ceil(len(train_dataset) / trainer.args.train_batch_size)  # type: ignore[arg-type]
        return Trial(settings, float(metrics[metric]), planned, runtime / max_steps * steps * _turns(trainer))

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what a trial raises is raised here, too
    try:
        study = optuna.create_study(
            direction="maximize" if greater_is_better else "minimize",
            sampler=optuna.samplers.TPESampler(seed=args.seed, n_startup_trials=max(2, num_trials // 2)),
        )
        first = _end_to_end(args) if space is None and is_pretrained(model) else []
        for settings in first[:num_trials]:
            with contextlib.suppress(optuna.TrialPruned):
                score(settings)
        study.optimize(objective, n_trials=max(0, num_trials - len(first)))
    finally:
        optuna.logging.set_verbosity(verbosity)
    return Pilot(sorted(found.values(), key=lambda one: _rank(one.metric, greater_is_better)), metric)


def _rank(metric: float | None, greater_is_better: bool) -> tuple[int, float]:
    """The best first, then what diverged, then what was not run."""
    if metric is None or not math.isfinite(metric):
        return (2, 0.0) if metric is None else (1, 0.0)
    return 0, -metric if greater_is_better else metric


def _check_space(space: Mapping[str, Sequence[Any]] | None) -> None:
    if space is not None and (not isinstance(space, Mapping) or not space):
        raise ValueError(f"space={space!r} has no fields to try. Set space to fields and values, or leave it out.")
    for name, values in (space or {}).items():
        if name not in {field.name for field in fields(MMSTConfig)}:
            raise ValueError(f"space names {name!r}, which is no field of MMSTConfig. Set space to fields and values.")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"space has {values!r} for {name}, not a list of values. Set it to one, as in [1, 2].")


def _space(simulation: Simulation, args: MMSTConfig) -> dict[str, list[Any]]:
    count = len(simulation.ends)
    one_width = len({layer.width for layer in simulation.profile}) == 1
    return {
        "num_stages": sorted({min(number, count) for number in (2, 4, 8, count)}),
        **({"head_layers": [0, 1] if one_width else [0]} if args.stage_objective == "local" else {}),
        "head_learning_rate": list(dict.fromkeys([args.head_learning_rate, FAST_HEADS])),
        "transport_weight": [0.0, 0.1, 0.3, 1.0, 3.0],
        "end_to_end_laps": [0, 1],
    }


def _end_to_end(args: MMSTConfig) -> list[dict[str, Any]]:
    """Settings of exact gradients, if the order is left open."""
    if not (args.chooses_order and args.chooses_stages):
        return []
    rates = dict.fromkeys([args.head_learning_rate, FAST_HEADS])
    return [{"stage_order": "end_to_end", "head_learning_rate": rate} for rate in rates]


def _samples(train: Any, held_out: Any, max_samples: int, seed: int) -> tuple[Any, Any]:
    def pick(indices: list[int]) -> Any:
        return train.select(indices) if hasattr(train, "select") else Subset(train, indices)

    _check_length("train_dataset", train, 2 if held_out is None else 1)
    if held_out is not None:
        _check_length("eval_dataset", held_out, 1)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:max_samples].tolist()
    if held_out is not None:
        return pick(order), held_out
    cut = max(1, len(order) // 5)
    return pick(order[cut:]), pick(order[:cut])


def _check_length(name: str, dataset: Any, least: int) -> None:
    if not hasattr(dataset, "__len__") or len(dataset) < least:
        raise ValueError(f"{name} has fewer than {least} samples, or no length. Set {name} to a larger one.")


def _simulation(model: nn.Module, args: MMSTConfig, dataset: Any, collate: Any, processing_class: Any) -> Simulation:
    """With a batch of the full run's size."""
    trainer = MMSTTrainer(
        model,
        _arguments(args, {"offload": "none", "resident_layers": 0}, 1),
        collate,
        dataset,
        processing_class=processing_class,
    )
    return simulation_of(args, model, next(iter(trainer.get_train_dataloader())))


def _planned(simulation: Simulation, args: MMSTConfig, settings: Mapping[str, Any]) -> int:
    """The most over local and end-to-end laps."""
    simulation.head_layers = settings.get("head_layers", simulation.head_layers)
    ways = ways_of(_arguments(args, settings, 1), len(simulation.ends))
    return max(simulation.peak(way).total for way in ways)


def _arguments(args: MMSTConfig, settings: Mapping[str, Any], max_steps: int) -> MMSTConfig:
    """Those of the full run with some others, for a trial that leaves nothing behind."""
    chosen = copy.deepcopy(args)
    short = {
        "max_steps": max_steps,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "push_to_hub": False,
    }
    for name, value in {**short, "memory_budget": None, "load_best_model_at_end": False, **settings}.items():
        setattr(chosen, name, value)
    chosen.check_stages()
    return chosen


def _turns(trainer: MMSTTrainer) -> float:
    """Epochs that all stages together take for one of each; by the model's loss, they share them out."""
    args = trainer.args
    if args.stage_objective == "model":
        return 1
    turns = Order.turns(args.order, trainer.partition.num_stages, args.num_laps, args.end_to_end_laps)
    return len(turns) / (args.num_laps + args.end_to_end_laps)
