"""`TrainingArguments` as stages and offloaded layers need them: placement, processes, and what is pickled."""

import contextlib

from transformers import TrainingArguments


class HostArguments(TrainingArguments):
    """What [`MMSTConfig`] changes of `TrainingArguments` beside its fields."""

    offload: str | None
    memory_budget: str | None
    stage_parallel: bool

    def __getstate__(self):
        """What is pickled, as in `training_args.bin`: everything but the token."""
        return {**vars(self), "hub_token": None}

    @property
    def place_model_on_device(self):
        """As in `TrainingArguments`, but not where layers are offloaded, or before stages are planned or shared out."""
        whole = self.offload == "none" and self.memory_budget is None and not self.stage_parallel
        return super().place_model_on_device if whole else False  # None leaves it to the host

    @property
    def world_size(self):
        """Number of processes that share out the samples; 1 where they share out the stages."""
        return 1 if self.stage_parallel else super().world_size

    @property
    def shards_layers(self) -> bool:
        """Whether offloaded layers are in shards, by FSDP2, as they are where several processes share the samples."""
        return self.offload == "layers" and self.world_size > 1

    @contextlib.contextmanager
    def main_process_first(self, local=True, desc="work"):
        """As in `TrainingArguments`, also where the processes share out the stages."""
        if not self.stage_parallel:
            with super().main_process_first(local, desc):
                yield
        else:
            state = self.distributed_state
            with state.local_main_process_first() if local else state.main_process_first():
                yield

    @property
    def rests_inputs(self) -> bool:
        """Whether the inputs of offloaded layers rest, too: `activation_checkpointing_kwargs={"offload": True}`."""
        return bool((self.activation_checkpointing_kwargs or {}).get("offload"))
