"""Exit codes of the command and the recipes: an error is one line on stderr, without a traceback."""

import argparse
import sys
import textwrap
from collections.abc import Callable
from typing import NoReturn

LONGEST = 1000  # characters of a message


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: {in_one_line(message)}\n")


def exit_code(name: str, program: Callable[[], int | None]) -> int:
    """
    Run a program, and print its errors in one line.

    Args:
        name (`str`): what the line begins with.
        program (`Callable[[], int | None]`): what is run; 0 if it returns nothing.

    Returns:
        `int`: what `program` returned; 2 if a file, a value or a package was wrong.
    """
    try:
        return program() or 0
    except (OSError, ValueError, ImportError) as error:
        print(f"{name}: {in_one_line(error)}", file=sys.stderr)
        return 2


def in_one_line(message: object) -> str:
    """A message without line breaks; of long ones, such as lists of all models, the beginning."""
    text = str(message).strip()
    if "Original Traceback" in text:  # of a worker of a data loader, which hands on all that was printed
        text = text.rpartition("\n")[2]
    return textwrap.shorten(text, LONGEST, placeholder=" ...")
