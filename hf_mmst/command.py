"""The command `hf-mmst`."""

import argparse
import sys
from collections.abc import Sequence

CHOICES = ("auto", "fp32", "bf16", "fp16")


def main(args: Sequence[str] | None = None) -> int:
    """
    `hf-mmst plan MODEL --batch-size 32 --budget 4GiB`: a table of ways to train MODEL and the one that fits.

    Args:
        args (`Sequence[str]`, *optional*): the command line; `sys.argv[1:]` by default.

    Returns:
        `int`: 0; 1 if nothing fits; 2 for arguments that cannot be.
    """
    parser = argparse.ArgumentParser("hf-mmst", description="Train large encoders in a fraction of the memory.")
    command = parser.add_subparsers(required=True, metavar="plan").add_parser(
        "plan", help="estimate the memory of ways of training a model, without allocating it, and choose one"
    )
    command.add_argument("model", help="a name on the Hub, or a folder with a config.json")
    command.add_argument("--batch-size", type=int, default=8, help="samples at once on one device (default: 8)")
    command.add_argument("--budget", help="memory of the device, such as 4GiB; without it nothing is chosen")
    shape = command.add_mutually_exclusive_group()
    shape.add_argument("--image-size", type=int, help="side of an image, in pixels; the model's own by default")
    shape.add_argument("--seq-len", type=int, help="tokens of a text (default: 128)")
    command.add_argument(
        "--precision",
        choices=CHOICES,
        default="fp32",
        help="autocast, if not fp32 (default); auto: bf16 where that takes less compute in the budget",
    )
    command.add_argument("--num-stages", type=int, help="the only number of stages to try")
    command.add_argument("--layers", action="store_true", help="show what each layer takes, too")
    given = parser.parse_args(args)

    from rich.console import Console

    from .planner import plan

    sizes = {"image_size": given.image_size, "seq_len": given.seq_len or 128}
    try:
        found = plan(
            given.model,
            given.batch_size,
            given.budget,
            given.precision,
            num_stages=given.num_stages,
            **{name: size for name, size in sizes.items() if size is not None},
        )
    except (OSError, ValueError) as error:
        print(f"hf-mmst plan: {error}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if given.layers:
        console.print(found.layer_table())
    console.print(found.table())
    console.print(found.reason, highlight=False, soft_wrap=True)
    if found.chosen is not None:
        console.print(found.config(), highlight=False, soft_wrap=True)
    return int(found.budget is not None and found.chosen is None)
