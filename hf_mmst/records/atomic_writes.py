"""Atomic writes: files are written beside, flushed to the disk and renamed, so that they are whole or not there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write beside `path`, flush that to the disk and rename it to `path`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def flush(path: Path, deep: bool = True) -> None:
    """Flush a file to the disk, or a folder and, if `deep`, all that is in it."""
    for one in (*(path.rglob("*") if deep else ()), path):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a file system that cannot flush folders
                raise
        finally:
            os.close(descriptor)
