"""`RunFolder`: the checkpoints of a run, each of them whole or not there, whenever the process ends."""

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from .atomic_writes import flush


class RunFolder:
    """
    The checkpoints of a run, each of which is written in a folder beside them and renamed.

    What is to go is moved aside before it is deleted, so that no half of it is ever taken for a checkpoint.

    Args:
        path (`str`): the folder.

    Attributes:
        beside (`Path`): where checkpoints are written.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.beside = self.path / "_saving"
        self._aside = self.beside / "aside"
        self._deleting = self.path / "_deleting"

    def tidy(self) -> None:
        """Bring back whole checkpoints that an interrupted save moved aside, and delete what was half written."""
        for folder in self._aside.glob("*"):
            if not (self.path / folder.name).exists():
                os.replace(folder, self.path / folder.name)
        self.discard()

    def put(self, name: str) -> None:
        """Put the checkpoint `name` that was written beside in its place, flushed to the disk."""
        flush(self.beside / name)
        self.set_aside(name)
        os.replace(self.beside / name, self.path / name)
        flush(self.path, deep=False)

    def rotate(self, limit: int | None, best: str | None) -> None:
        """As `Trainer`'s `rotate_checkpoints`: delete all but the newest `limit` checkpoints and the best one."""
        if limit is not None and limit > 0:
            folders = sort_checkpoints(str(self.path), use_mtime=True)
            spare = [Path(one) for one in folders[:-1] if best is None or Path(one) != Path(best)]
            for folder in spare[: max(len(folders) - limit, 0)]:
                self.set_aside(folder.name)

    def set_aside(self, name: str) -> None:
        """Move the checkpoint `name`, if there is one, to where [`discard`] deletes and [`tidy`] finds it."""
        if (self.path / name).exists():
            self._aside.mkdir(parents=True, exist_ok=True)
            os.replace(self.path / name, self._aside / name)

    def discard(self) -> None:
        """Delete what is beside the checkpoints."""
        shutil.rmtree(self._deleting, ignore_errors=True)
        if self.beside.exists():
            os.replace(self.beside, self._deleting)  # what is half deleted is not to come back
        shutil.rmtree(self._deleting, ignore_errors=True)
