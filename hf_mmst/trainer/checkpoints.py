"""What a run writes and reads back: plain checkpoints with their stages beside them, whole or not there."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, sort_checkpoints
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..config import OWN_FIELDS, MMSTConfig
from ..cut.partition import Partition
from ..distributed.stage_shares import load_own
from ..distributed.wrappers import Wrapper, wrapper_of
from ..method.heads import HEADS, StageHeads
from ..method.order import Order
from ..method.transport import TransportWeights
from ..records.reading import load_whole, read_tensors, refuse_others, tensor_names
from ..records.resuming import changes, refuse_other_length, refuse_other_settings
from ..records.run_folder import RunFolder
from ..records.stages import HEADS_NAME, JSON_NAME, Stages, read_stages, save_stages


class StageCheckpoints(Trainer):
    """The checkpoints of [`MMSTTrainer`], which sets the attributes below."""

    args: MMSTConfig
    partition: Partition
    heads: StageHeads
    _weights: TransportWeights
    _order: Order
    _saving_in: str | None = None
    _core: Callable[[], nn.Module]
    _cut: Callable[[], None]
    _mean: Callable[[torch.Tensor], torch.Tensor]

    @property
    def _wrapper(self) -> Wrapper:
        """What is around the model when it trains."""
        return wrapper_of(self.accelerator)

    def _save(self, output_dir=None, state_dict=None):
        """A plain checkpoint of the model, and its stages beside it; of a model in shards, in each process."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        heads = self._wrapper.state_dict(self.heads)
        state_dict = self._core().state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {k: v for k, v in state_dict.items() if not k.startswith(f"{HEADS}.")})
        if self.args.should_save:
            config = {name: getattr(self.args, name) for name in sorted(OWN_FIELDS)}
            heads |= {k.removeprefix(f"{HEADS}."): v for k, v in state_dict.items() if k.startswith(f"{HEADS}.")}
            save_stages(output_dir, Stages(self.partition, self.heads, config, self._weights.state_dict()), heads)

    def _save_checkpoint(self, model, trial):
        """As the host's, written beside and renamed: a folder `checkpoint-<step>` is whole or not there."""
        self._weights.sync(self._mean)
        run_dir, step = self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        folder, final = RunFolder(run_dir), os.path.join(run_dir, step)
        beside = str(folder.beside)
        self._tidy(run_dir)
        self._find_best(run_dir)
        self._saving_in = beside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_in = None
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

    def _finalize_training(self, trial, *args):
        """As the host's; where the best checkpoint alone is to stay, the others are moved aside before they go."""
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

    def _get_output_dir(self, trial):
        """As the host's; while a checkpoint is being written, the folder it is written in."""
        return self._saving_in or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        """As the host's, with the files of the stages; not before the checkpoint is whole, nor into a push."""
        push = getattr(self, "push_in_progress", None)
        if self._saving_in is not None or (push and not push.is_done() and not self.args.hub_always_push):
            return
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            for name in (JSON_NAME, HEADS_NAME):
                shutil.copy(os.path.join(checkpoint_folder, name), self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Weights and heads, as they were saved."""
        self._cut()
        there = os.path.isdir(resume_from_checkpoint)  # if not, the host says so
        if there and not self._is_of_host(resume_from_checkpoint):
            self._check_stages(resume_from_checkpoint)
        if not (there and self._load_weights(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps, train_dataloader, checkpoint):
        """As the host's; transport weights begin anew or, with a checkpoint, go on as they were."""
        self._weights.reset()
        if checkpoint is not None:
            self._go_on(checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, checkpoint)

    def _go_on(self, checkpoint: str) -> None:
        """Take up the transport weights; say what is other from here on, or why that cannot be."""
        if self._is_of_host(checkpoint):
            return
        content = self._check_stages(checkpoint)
        steps = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).max_steps
        refuse_other_length(checkpoint, steps, self._order.total_steps, len(self._order.segments))
        schedule = self._weights.schedule  # what "auto" has come to
        now = {**vars(self.args), "transport_schedule": schedule}
        state = content["transport_state"]
        saved = {**content["config"], "transport_schedule": state.get("schedule", schedule)}
        if saved["transport_norm"] == now["transport_norm"]:
            self._weights.load_state_dict(state)
        changed = changes(saved, now)
        if changed and self.is_world_process_zero():
            print(f"hf_mmst: from {checkpoint} on {changed}")

    def _load_best_model(self):
        """Weights and heads of the best checkpoint."""
        if not self._is_of_host(self.state.best_model_checkpoint):
            self._check_stages(self.state.best_model_checkpoint)
        if not self._load_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _is_of_host(self, folder: str) -> bool:
        """Whether a checkpoint was written by plain Trainer, from which a run with one stage may go on."""
        return self.partition.num_stages == 1 and not os.path.isfile(os.path.join(folder, JSON_NAME))

    def _check_stages(self, folder: str) -> dict[str, Any]:
        """What `folder` says of its stages, which must be those of this run."""
        content = read_stages(folder)
        refuse_other_settings(folder, content["config"], self.args)
        partition = Partition(tuple(tuple(stage) for stage in content["stages"]))
        if partition != self.partition:
            raise ValueError(
                f"{folder} was cut into stages after {', '.join(partition.boundaries)}, this run after "
                f"{', '.join(self.partition.boundaries)}. Set stage_boundaries to the former, or start anew."
            )
        number, own = content["heads"]["num_layers"], len(self.heads.layers)
        if number != own:
            raise ValueError(
                f"{folder} has stage heads with {number} layers, this run with {own}. Set head_layers to {number}, or "
                "start anew."
            )
        pooling = content["heads"]["pooling"]
        if pooling != self.heads.pooling:
            raise ValueError(
                f'{folder} has stage heads that pool "{pooling}", those of this run pool "{self.heads.pooling}". Set '
                f'head_pooling to "{pooling}", or start anew.'
            )
        return content

    def _load_weights(self, folder: str) -> bool:
        """
        Load the heads, and the model's weights by way of `from_pretrained`, if it is a plain Hugging Face model.

        `save_pretrained` writes the key names of the Hub. Where those are not the module's own (ViT, DeiT, Swin, ...),
        the host's `load_state_dict(strict=False)` would restore nothing and only warn.
        """
        if self._wrapper.own_files:
            return False
        if not self._is_of_host(folder):
            load_own(self.heads, read_tensors(Path(folder) / HEADS_NAME, self.heads.state_dict(), "this run"))
        model = self._core()
        if not isinstance(model, PreTrainedModel):
            _check_adapter(folder, model)
            return False
        widest = functools.reduce(torch.promote_types, {p.dtype for p in model.parameters() if p.is_floating_point()})
        load_own(model, load_whole(type(model), folder, config=model.config, dtype=widest).state_dict())
        return True

    def _issue_warnings_after_load(self, load_result):
        """An error in the place of the host's warnings: what a checkpoint lacks would be left to chance."""
        missing = [name for name in load_result.missing_keys if not name.startswith(f"{HEADS}.")]
        refuse_others("The checkpoint", self._core(), missing, load_result.unexpected_keys)


def _check_adapter(folder: str, model: Any) -> None:
    """
    Raises:
        `ValueError`: if the file of the adapter that learns has other tensors: the host would load what it finds.
    """
    adapter = model.active_adapters[0] if hasattr(model, "peft_config") else ""
    path = Path(folder, "" if adapter == "default" else adapter, ADAPTER_SAFE_WEIGHTS_NAME)
    if not adapter or not path.is_file():
        return
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    needed = {name for name in own if HEADS not in name}
    found = tensor_names(path)
    refuse_others(folder, model, needed - found, found - needed - model.state_dict().keys())  # embeddings may be there
