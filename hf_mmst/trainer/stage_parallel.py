"""Stages shared out over processes: what of the host's loop each process does for its own stages, what for all."""

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import EvalLoopOutput

from ..config import MMSTConfig
from ..cut.partition import Partition
from ..distributed.relay import Relay
from ..distributed.stage_shares import Share, is_released, take_share
from ..method.engine import Stagewise
from ..method.heads import HEADS, StageHeads
from ..method.observing_pass import StageView
from ..method.order import Segment
from ..method.transport import TransportWeights
from .evaluation import StageScores


class WholeBatches(Accelerator):
    """An accelerator whose processes each read all samples of all batches; models are not wrapped."""

    num_processes = 1
    process_index = 0
    distributed_type = DistributedType.NO

    def gather(self, tensor):
        """What this process has, which is all."""
        return tensor

    def pad_across_processes(self, tensor, dim=0, pad_index=0, pad_first=False):
        """What this process has, which is as long as in all processes."""
        return tensor


class StageParallel(Trainer):
    """
    What [`MMSTTrainer`], which sets the attributes below, does with `stage_parallel=True`; else it does nothing.

    Each process runs the host's loop on all batches with the layers of its own stages. It takes the input of its first
    stage from the process before, which made it with the weights from before that batch's step, as in the simultaneous
    order of one process. What is known of all stages is brought together when something is logged, evaluated or saved.
    """

    args: MMSTConfig
    accelerator: Any
    partition: Partition
    heads: StageHeads
    _engine: Stagewise
    _weights: TransportWeights
    _log_sums: torch.Tensor
    _stage_parameters: list[list[nn.Parameter]]
    _core: Callable[[], nn.Module]
    _criterion: Callable[..., torch.Tensor]
    _labels_of: Callable[[Any], Any]
    _relay: Relay | None = None
    _share: Share
    _watched: torch.optim.Optimizer | None = None
    _stamp = 0
    _num_batches = 0  # of the optimizer step, so far

    # ---- The shares ----

    def create_accelerator_and_postprocess(self):
        """As the host's, with [`WholeBatches`]."""
        super().create_accelerator_and_postprocess()
        if not self.args.stage_parallel:
            return
        for name in ("deepspeed", "fsdp"):
            if getattr(self, f"is_{name}_enabled"):
                raise ValueError(
                    f"{name} is switched on in the accelerate configuration, which shares out tensors in another way "
                    "than stage_parallel=True. Use a configuration without it, or set stage_parallel=False."
                )
        loading = self.accelerator.dataloader_config
        loading.split_batches, loading.dispatch_batches = False, False
        # Nothing is drawn in one process for another, so no random state is to be brought in line.
        self.accelerator = WholeBatches(**self._build_accelerator_args(dataloader_config=loading, rng_types=[]))
        self.accelerator.device_placement = False  # the model is not to be moved as a whole
        self.gather_function = self.accelerator.gather_for_metrics
        self._relay = Relay(self.args.device, timedelta(seconds=self.args.ddp_timeout))

    def _take_share(self) -> None:
        """Keep the stages of this process and let the others go."""
        if self._relay is None:
            return
        model, args = self._core(), self.args
        self._refuse_model(model)
        every, rank, number = self._stage_parameters, self._relay.rank, self._relay.num_ranks
        clips = args.max_grad_norm > 0
        self._share = take_share(model, self.partition, self.heads, every, rank, number, args.device, clips)
        self._engine.outputs.update(self._share.outputs)

    def _refuse_model(self, model: nn.Module) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"stage_parallel=True is for plain Hugging Face models, not for a {type(model).__name__}. Set "
                "stage_parallel=False."
            )
        if self.heads.kind == "own":
            raise ValueError(
                f"The stages of a {type(model).__name__} share its own head, but with stage_parallel=True each process "
                "holds its own stages alone. Set stage_parallel=False."
            )
        if len(self.heads.layers):
            raise ValueError(
                f"head_layers={len(self.heads.layers)}, the default for a pretrained model, gives the heads of all "
                "stages the same layers, but with stage_parallel=True each process holds its own stages alone. Set "
                "head_layers=0."
            )

    def _own_part(self, segment: Segment) -> Segment:
        """The stages of `segment` that this process has."""
        return segment if self._relay is None else replace(segment, stages=tuple(self._share.own))

    def _summary_of_shares(self) -> str:
        if self._relay is None:
            return ""
        return f"; {self._relay.num_ranks} processes with stages {self._share}"

    @contextlib.contextmanager
    def _flowing(self) -> Iterator[None]:
        """Within this context activations flow, and errors say where they were raised."""
        if self._relay is None:
            yield
            return
        try:
            with self._relay.flowing():
                yield
        except Exception as error:
            first, *_, last = [stage + 1 for stage in self._share.own for _ in range(2)]
            stages = f"stages {first} to {last}" if last > first else f"stage {first}"
            error.add_note(f"hf_mmst: raised in rank {self._relay.rank} of {self._relay.num_ranks}, with {stages}.")
            raise

    # ---- Training ----

    def train(self, *args, **kwargs):
        """As the host's."""
        with self._flowing():
            return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the host's."""
        self._num_batches = 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the host's; what is drawn at random is another in each process, and leaves the order of samples alone."""
        if self._relay is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._stamp = self._stamp_of(inputs)
        seed = hash((self.args.seed, self.state.global_step, self._num_batches, self._relay.rank)) % 2**63
        self._num_batches += 1
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return super().training_step(model, inputs, num_items_in_batch)

    def _taken(self) -> tuple[int, torch.Tensor] | None:
        """The first stage of this process and its input, if the process before has that."""
        if self._relay is None or self._relay.rank == 0:
            return None
        return self._share.own[0], self._relay.take(self._stamp)

    def _hand_on(self, output: torch.Tensor | None) -> None:
        if self._relay is not None and output is not None:
            self._relay.hand_on(output, self._stamp)

    def _stamp_of(self, inputs: Mapping[str, Any]) -> int:
        """A check sum of what all processes read of a batch, which is all but the main input."""
        tensors = [t for n, t in sorted(inputs.items()) if n != self._core().main_input_name and torch.is_tensor(t)]
        return zlib.crc32(b"".join(t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors))

    def floating_point_ops(self, inputs):
        """As the host's, counted once."""
        return super().floating_point_ops(inputs) if self._relay is None or self._relay.rank == 0 else 0

    # ---- Logging ----

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        """As the host's; before something is logged, it is brought together."""
        if self._relay is not None and self.control.should_log and grad_norm is not None:
            found = self._relay.gather((tr_loss.item(), float(grad_norm), self._log_sums.cpu()))
            losses, norms, sums = zip(*found, strict=True)
            tr_loss.fill_(losses[-1])
            grad_norm = math.hypot(*norms)
            self._log_sums = torch.stack(sums).sum(0)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        """As the host's, with the loss of the last stage."""
        if self._relay is not None:
            self._tr_loss.fill_(self._relay.from_last(self._tr_loss.item()))
        return super()._finalize_training(*args, **kwargs)

    # ---- Evaluation ----

    @contextlib.contextmanager
    def _observing(self, inputs: Mapping[str, Any], read: Callable[[torch.Tensor], Any]) -> Iterator[StageView]:
        """Within this context a forward pass without learning shows the stages of this process."""
        mask = inputs.get("attention_mask")
        if self._relay is None:
            with self._engine.observe(mask, read) as view:
                yield view
            return
        self._stamp = self._stamp_of(inputs)

        def criterion(logits):
            return self._criterion(logits, self._labels_of(inputs))

        with self._engine.observe(mask, read, self._share.own, self._taken(), criterion) as view:
            yield view
        self._hand_on(view.output)

    def _of_all(self, scores: StageScores) -> StageScores:
        """The scores of all stages, of those of this process's."""
        return scores if self._relay is None else StageScores.joined(self._relay.gather(scores))

    def _joined(self, found: tuple[Any, Sequence[Any]]) -> tuple[Any, Sequence[Any]]:
        """The model's predictions and the logits of all heads, of what this process's stages say."""
        if self._relay is None:
            return found
        parts = self._relay.gather(found)
        return parts[-1][0], tuple(one for _, logits in parts for one in logits)

    def evaluation_loop(self, *args, **kwargs):
        """As the host's; predictions and metrics are those of the last process, which has the model's own head."""
        if self._relay is None:
            return super().evaluation_loop(*args, **kwargs)
        with self._flowing():
            output = super().evaluation_loop(*args, **kwargs)
        predictions, metrics = self._relay.from_last((output.predictions, output.metrics))
        return EvalLoopOutput(predictions, output.label_ids, metrics, output.num_samples)

    # ---- Checkpoints ----

    def _save(self, output_dir=None, state_dict=None):
        """As the host's, of what all processes have."""
        if self._relay is not None:
            heads = {f"{HEADS}.{name}": tensor for name, tensor in self.heads.state_dict().items()}
            whole = self._core().state_dict() | heads
            own = {name: tensor for name, tensor in whole.items() if self._share.owners[name] == self._relay.rank}
            found = self._relay.collect(own)
            state_dict = {name: found[name] for name in whole if name in found}
            states = zip(self._share.stages, self._relay.gather(self._weights.state_dict()), strict=True)
            self._weights.load_state_dict(_by_stage({k: state for own, state in states for k in own}))
        super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir):
        """As the host's, once: the random state that orders the samples is the same in all processes."""
        if self._relay is None or self.args.should_save:
            super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        """As the host's, of what all processes have, as one process writes it."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._relay is None:
            return
        own = self.optimizer.state_dict()
        found = self._relay.collect({(i, name): v for i, state in own["state"].items() for name, v in state.items()})
        if self.args.should_save:
            states: dict[int, dict[str, Any]] = {}
            for (index, name), value in sorted(found.items()):
                states.setdefault(index, {})[name] = value
            torch.save({**own, "state": states}, os.path.join(output_dir, OPTIMIZER_NAME))

    def _keep_own_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Hold optimizer states of this process's parameters alone; the others never have gradients here."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        if self._relay is None or optimizer is self._watched:
            return
        self._watched = optimizer
        for parameter in [p for p in optimizer.state if is_released(p)]:
            del optimizer.state[parameter]

        def own_part(optimizer, state_dict):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {index: s for index, s in state_dict["state"].items() if not is_released(parameters[index])}
            return {**state_dict, "state": state}

        optimizer.register_load_state_dict_pre_hook(own_part)

    def hyperparameter_search(self, *args, **kwargs):
        """As the host's; not where processes share out the stages."""
        if self._relay is not None:
            raise ValueError("hyperparameter_search draws settings in one process. Set stage_parallel=False.")
        return super().hyperparameter_search(*args, **kwargs)


def _by_stage(states: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """State of the transport weights, of which each stage's part is the one that its own process has."""
    by_stage = {name for name, value in states[0].items() if isinstance(value, list)}
    return states[0] | {name: [states[k][name][k] for k in sorted(states)] for name in by_stage}
