"""A `Trainer` whose checkpoints are whole or not there, whenever the process ends. Nothing here knows of stages."""

import functools
import os
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from ..records.run_folder import RunFolder


class WholeCheckpoints(Trainer):
    """
    Writes each checkpoint beside the others and renames it; what goes is moved aside before it is deleted.

    The host writes and deletes checkpoints in its own methods, and gives no other way than to override them.
    """

    args: Any
    accelerator: Any
    _writing_in: str | None = None  # the folder in which a checkpoint is being written

    @functools.wraps(Trainer.train)
    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        flags = {"true": True, "false": False}  # what a command line says
        resume_from_checkpoint = flags.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
        self._tidy(self._get_output_dir(trial))
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.is_in_train = False  # also after an error

    def _get_output_dir(self, trial):
        """While a checkpoint is being written, this is the folder it is written in."""
        return self._writing_in or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """The folder `checkpoint-<step>` is written beside and renamed; the push comes after that."""
        run_dir, step = self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        folder, final = RunFolder(run_dir), os.path.join(run_dir, step)
        beside = str(folder.beside)
        self._tidy(run_dir)
        self._find_best(run_dir)
        self._writing_in = beside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_in = None
        if self.state.best_model_checkpoint == os.path.join(beside, step):
            self.state.best_model_checkpoint = final
            if self.args.should_save:
                self.state.save_to_json(os.path.join(beside, step, TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder.put(step)
            folder.rotate(self.args.save_total_limit, self.state.best_model_checkpoint)
            folder.discard()
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing is pushed before a checkpoint is whole, nor into another push."""
        push = getattr(self, "push_in_progress", None)
        if self._writing_in is None and (not push or push.is_done() or self.args.hub_always_push):
            self._put_into_push(checkpoint_folder)
            super()._push_from_checkpoint(checkpoint_folder)

    def _put_into_push(self, checkpoint_folder: str) -> None:
        """Put into the output folder what is to be pushed beside the files that the host knows."""

    def _finalize_training(self, trial, *args):
        """Where the best checkpoint alone is to stay, the others are moved aside before they go."""
        run_dir = self._get_output_dir(trial)
        self._find_best(run_dir)
        folder, best = RunFolder(run_dir), self.state.best_model_checkpoint
        if best is not None and self.args.save_total_limit == 1 and self.args.should_save:
            for other in sort_checkpoints(run_dir):
                if not os.path.samefile(other, best):
                    folder.set_aside(os.path.basename(other))
        output = super()._finalize_training(trial, *args)
        if self.args.should_save:
            folder.discard()
        return output

    def _tidy(self, run_dir: str) -> None:
        """Clear away what a process that was killed has left."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            RunFolder(run_dir).tidy()
        self.accelerator.wait_for_everyone()

    def _find_best(self, run_dir: str) -> None:
        """Find the checkpoint of the best step, which may be saved before it is evaluated, in a folder that moved."""
        best = os.path.join(run_dir, f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and os.path.isdir(best):
            self.state.best_model_checkpoint = best
