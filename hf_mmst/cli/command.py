"""The command `hf-mmst` and its subcommands plan, pilot, train, eval, env and card."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .exit_codes import OneLineParser, exit_code

if TYPE_CHECKING:
    from ..planning.plans import Plan

CHOICES = ("auto", "fp32", "bf16", "fp16")
ORDERS = ("simultaneous", "sequential", "end_to_end")
TASKS = ("images", "texts")
PLANNED_TASKS = (*TASKS, "tokens", "masked-lm", "causal-lm")
RUNS = {
    "train": "train a classifier of images or texts, evaluate and save it",
    "pilot": "short trials of settings, on a part of the samples to train on; prints the best to paste",
}
ABOUT_TASKS = """
Flags of `hf-mmst train | pilot images | texts` are those of MMSTConfig, such as --num_stages, --stage_order,
--learning_rate, --output_dir, --push_to_hub, and those of the task:

  --dataset_name        a name on the Hub, a folder, or a CSV, TSV, JSON or parquet file
  --model_name_or_path  a name on the Hub or a folder (images: a ViT from scratch without it)
  --config FILE.yaml    the same flags as `field: value` lines; flags on the command line go before them

Those of pilot are also --num_trials, --trial_steps and --trial_samples; trials have to fit --memory_budget.
`hf-mmst train images --help` lists them all. On several GPUs: accelerate launch -m hf_mmst.cli.command train images ...
"""


def main(args: Sequence[str] | None = None) -> int:
    """
    `hf-mmst plan | pilot | train | eval | env | card`; each says more with `--help`.

    Args:
        args (`Sequence[str]`, *optional*): the command line; `sys.argv[1:]` by default.

    Returns:
        `int`: 0; 1 if no plan or trial fits; 2 for arguments that cannot be.
    """
    words = list(sys.argv[1:] if args is None else args)
    if len(words) > 1 and words[0] in RUNS and words[1] in TASKS:  # the flags of the task are its own parser's
        return exit_code(f"hf-mmst {words[0]} {words[1]}", lambda: _run(words[0], words[1], words[2:]))
    given = _parser().parse_args(words)
    return exit_code(f"hf-mmst {given.command}", lambda: given.run(given))


def _parser() -> OneLineParser:
    parser = OneLineParser("hf-mmst", description="Train large encoders in a fraction of the memory.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="plan | pilot | train | eval | env | card")

    plan = commands.add_parser(
        "plan", help="estimate the memory of ways of training a model, without allocating it, and choose one"
    )
    plan.set_defaults(run=_plan)
    plan.add_argument("model", help="a name on the Hub, or a folder with a config.json")
    plan.add_argument("--batch-size", type=int, default=8, help="samples at once on one device (default: 8)")
    plan.add_argument("--gpu", help="such as rtx4090: predict its times, and fit its memory if there is no --budget")
    plan.add_argument("--budget", help="memory of the device, such as 4GiB; without it or --gpu nothing is chosen")
    plan.add_argument("--task", choices=PLANNED_TASKS, help="of a model without data; its checkpoint's own by default")
    plan.add_argument("--lora", type=int, metavar="RANK", help="adapters of this rank learn, not the weights (PEFT)")
    shape = plan.add_mutually_exclusive_group()
    shape.add_argument("--image-size", type=int, help="side of an image, in pixels; the model's own by default")
    shape.add_argument("--seq-len", type=int, help="tokens of a text; by default 128, or the model's positions")
    plan.add_argument(
        "--precision",
        choices=CHOICES,
        default="fp32",
        help="autocast, if not fp32 (default); auto: bf16 where that takes less compute in the budget",
    )
    plan.add_argument("--num-stages", type=int, help="the only number of stages to try")
    plan.add_argument(
        "--stage-order",
        choices=ORDERS,
        help="the only order to choose; end_to_end by default, or with --num-stages any",
    )
    plan.add_argument(
        "--num-processes",
        type=int,
        default=1,
        help="GPUs that share the samples, --batch-size on each; the plan is that of one of them (default: 1)",
    )
    plan.add_argument("--host-bandwidth", type=float, metavar="GB/s", help="of host memory beside the GPU")
    plan.add_argument(
        "--device-link", type=float, metavar="GB/s", help="from GPU to GPU, without which several have no times"
    )
    plan.add_argument("--layers", action="store_true", help="show what each layer takes, too")
    plan.add_argument("--plot", metavar="PLAN.png", help="draw the memory of each way by kind, and its time")
    plan.add_argument("--json", help="write the whole plan to this file; - for stdout, in the place of the table")

    for name, text in RUNS.items():
        run = commands.add_parser(
            name, help=text, epilog=ABOUT_TASKS, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        run.add_argument("task", choices=TASKS, help="what is classified")

    evaluate = commands.add_parser("eval", help="accuracy, loss and transport of each stage of a trained model")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("model", help="a folder written by training, or the name of one on the Hub")
    evaluate.add_argument("dataset", help="a name on the Hub, a folder, or (texts) a file; its test split is used")
    evaluate.add_argument("--batch-size", type=int, default=32, help="samples at once (default: 32)")
    evaluate.add_argument("--max-samples", type=int, help="evaluate on this many samples at most")
    evaluate.add_argument("--max-seq-length", type=int, default=128, help="tokens of a text at most (default: 128)")
    evaluate.add_argument("--json", help="write the metrics to this file, too")

    environment = commands.add_parser("env", help="versions and devices, for a report of an error")
    environment.set_defaults(run=_environment)

    card = commands.add_parser("card", help="make a model card of the results of a run")
    card.set_defaults(run=_card)
    card.add_argument("results", help="results.json of the run")
    card.add_argument("--name", help="how the model is loaded; the folder's name by default")
    card.add_argument("--output-dir", help="where README.md and stages.png go; beside the results by default")
    return parser


def _plan(given: argparse.Namespace) -> int:
    import gc

    gc.disable()  # looking for cycles would take a tenth of the time
    try:
        from ..planning.devices import device_named, in_machine, measured_cpu
        from ..planning.planner import plan

        device = measured_cpu(given.precision) if given.gpu is None else device_named(given.gpu)
        found = plan(
            given.model,
            given.batch_size,
            given.budget,
            given.precision,
            num_stages=given.num_stages,
            seq_len=given.seq_len,
            image_size=given.image_size,
            speeds=in_machine(device, given.host_bandwidth, given.device_link),
            task=given.task,
            lora=given.lora,
            stage_order=given.stage_order,
            num_processes=given.num_processes,
        )
    finally:
        gc.enable()
    _show_plan(given, found)
    return int(found.budget is not None and found.chosen is None)


def _show_plan(given: argparse.Namespace, found: "Plan") -> None:
    import json
    from pathlib import Path

    from ..planning.plan_picture import write_plan_picture
    from ..planning.plan_table import layer_table, plan_legend, plan_table
    from ..tasks.report import write_json

    if given.plot is not None:
        write_plan_picture(found, Path(given.plot))
    if given.json == "-":
        print(json.dumps(found.to_dict(), indent=2))
        return
    if given.json is not None:
        write_json(Path(given.json), found.to_dict())
    console = _console()
    if given.layers:
        console.print(layer_table(found))
    console.print(plan_table(found))
    console.print(plan_legend(found), highlight=False, soft_wrap=True)
    console.print(f"\n{found.reason}", highlight=False, soft_wrap=True)
    if found.chosen is not None:
        console.print(found.config(), highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _no_bars_in_logs() -> Iterator[None]:
    """Progress bars of loading are for a terminal; elsewhere they would bury what is said."""
    import datasets
    from transformers.utils import logging

    with contextlib.ExitStack() as restored:
        if not sys.stderr.isatty() and not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            restored.callback(datasets.enable_progress_bars)
        if not sys.stderr.isatty() and logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            restored.callback(logging.enable_progress_bar)
        yield


@_no_bars_in_logs()
def _run(command: str, task: str, flags: Sequence[str]) -> int:
    from .train_and_evaluate import train, try_settings

    if command == "train":
        train(task, flags)
        return 0
    found = try_settings(task, flags)
    console = _console()
    console.print(found.table())
    if found.chosen is None:
        ran = any(trial.metric is not None for trial in found.trials)
        console.print(
            f"{found.metric_name} of no trial is a number. Set learning_rate to less."
            if ran
            else "No trial fits in memory_budget. Set it to more, or per_device_train_batch_size to less."
        )
        return 1
    console.print(found.config(), highlight=False, soft_wrap=True)
    return 0


def _console():
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 140
    return console


@_no_bars_in_logs()
def _evaluate(given: argparse.Namespace) -> int:
    from pathlib import Path

    from ..records.stage_table import print_stages
    from ..tasks.report import write_json
    from .train_and_evaluate import evaluate

    metrics = evaluate(given.model, given.dataset, given.batch_size, given.max_samples, given.max_seq_length)
    print_stages(metrics)
    print(f"accuracy {metrics['eval_accuracy']:.2%}, loss {metrics['eval_loss']:.4f}")
    if given.json is not None:
        write_json(Path(given.json), metrics)
    return 0


def _environment(_given: argparse.Namespace) -> int:
    import platform

    import torch

    from ..records.results import package_versions
    from .offline import hub_is_reachable

    lines = {"python": platform.python_version(), "system": platform.platform(), **package_versions()}
    lines["processors"] = str(torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    lines["hub"] = "reachable" if hub_is_reachable() else "cannot be reached"
    for name, value in lines.items():
        print(f"- {name}: {value}")
    return 0


def _card(given: argparse.Namespace) -> int:
    from pathlib import Path

    from ..records.card import CardContent, write_card
    from ..records.results import read_results

    path = Path(given.results)
    folder = path.parent if given.output_dir is None else Path(given.output_dir)
    name = given.name or folder.resolve().name
    content = CardContent.from_results(read_results(path), name)
    print(f"written to {write_card(folder, content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
