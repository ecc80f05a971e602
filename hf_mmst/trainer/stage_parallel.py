"""Which of the host's loop a process does for its own stages, and which for all, where processes share out stages."""

import contextlib
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
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME

from ..config import MMSTConfig
from ..cut.chosen_tokens import ChosenTokens
from ..distributed.relay import Relay
from ..distributed.stage_shares import Share, is_released, take_share
from ..method.heads import HEADS
from ..method.observing_pass import StageView
from ..method.order import Segment
from .stage_scores import StageScores
from .staging import StagedModel


class AllStages:
    """All stages are in this process: nothing is passed on, nothing has to be brought together."""

    are_shared = False

    def take_share(self, staged: StagedModel, args: MMSTConfig) -> None:
        """Keep the stages of this process, and let go of the others."""

    def own_part(self, segment: Segment) -> Segment:
        """The stages of `segment` that this process has."""
        return segment

    def summary(self) -> str:
        """The end of the line that says how a model was cut."""
        return ""

    # ---- Training ----

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        """Within this context activations flow, and errors say where they were raised."""
        yield

    def begin_step(self) -> None:
        """A new optimizer step begins."""

    @contextlib.contextmanager
    def micro_batch(self, staged: StagedModel, inputs: Mapping[str, Any], seed: tuple[int, ...]) -> Iterator[None]:
        """Within this context a micro-batch is trained on; what is drawn at random comes from `seed` and the rank."""
        yield

    def take(self) -> tuple[int, torch.Tensor] | None:
        """The first stage of this process and its input, if the process before has that."""
        return None

    def hand_on(self, output: torch.Tensor | None) -> None:
        """Pass on the output of the last stage of this process, if another process has the next stage."""

    @property
    def is_first(self) -> bool:
        """Whether this process counts and writes what all have in common."""
        return True

    def gather(self, value: Any) -> list[Any]:
        """What each process that has some of the stages calls this with, in the order of the stages."""
        return [value]

    def from_last(self, value: Any) -> Any:
        """What the process with the last stage has."""
        return value

    # ---- Evaluation ----

    @contextlib.contextmanager
    def observing(
        self,
        staged: StagedModel,
        inputs: Mapping[str, Any],
        read: Callable[[torch.Tensor], Any],
        criterion: Callable,
        tokens: ChosenTokens | None,
    ) -> Iterator[StageView]:
        """Within this context a forward pass without learning shows the stages of this process."""
        with staged.engine.observe(inputs.get("attention_mask"), read, tokens=tokens) as view:
            yield view

    def scores_of_all(self, scores: StageScores) -> StageScores:
        """The scores of all stages, of those of this process's."""
        return scores

    def predictions_of_all(self, found: tuple[Any, Sequence[Any]]) -> tuple[Any, Sequence[Any]]:
        """The model's predictions and the logits of all heads, of what this process's stages say."""
        return found

    # ---- Checkpoints ----

    def state_dict_of_all(self, staged: StagedModel, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
        """The state of the model and its heads, of what this process has; transport weights become those of all."""
        return state_dict

    def save_optimizer(self, optimizer: Any, folder: str, should_save: bool) -> None:
        """Write the optimizer's states of all processes in the place of those of one."""

    def keep_own_states(self, optimizer: Any) -> None:
        """Hold optimizer states of this process's parameters alone."""

    def refuse_search(self) -> None:
        """Refuse a search of hyper-parameters, if it cannot be."""


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


def whole_batches(accelerator: Any, arguments_for: Callable[..., dict[str, Any]]) -> WholeBatches:
    """
    [`WholeBatches`] in the place of `accelerator`.

    Args:
        accelerator (`accelerate.Accelerator`): as the host has made it.
        arguments_for (`Callable`): makes the arguments of another one, with those that are given.

    Raises:
        `ValueError`: if tensors are already shared out in another way.
    """
    for name in ("deepspeed", "fsdp"):
        if getattr(accelerator.state, f"{name}_plugin", None) is not None:
            raise ValueError(
                f"{name} is switched on in the accelerate configuration, which shares out tensors in another way "
                "than stage_parallel=True. Use a configuration without it, or set stage_parallel=False."
            )
    loading = accelerator.dataloader_config
    loading.split_batches, loading.dispatch_batches = False, False
    # Nothing is drawn in one process for another, so no random state is to be brought in line.
    found = WholeBatches(**arguments_for(dataloader_config=loading, rng_types=[]))
    found.device_placement = False  # the model is not to be moved as a whole
    return found


class StageParallel(AllStages):
    """
    The processes share out the stages, as with `stage_parallel=True`.

    Each process runs the host's loop on all batches with the layers of its own stages. It takes the input of its first
    stage from the process before, which made it with the weights from before that batch's step, as in the simultaneous
    order of one process. What is known of all stages is brought together when something is logged, evaluated or saved.

    Args:
        args ([`MMSTConfig`]): the settings of the run.
    """

    are_shared = True

    def __init__(self, args: MMSTConfig):
        self._device = args.device
        self._relay = Relay(args.device, timedelta(seconds=args.ddp_timeout))
        self._share: Share | None = None
        self._watched: torch.optim.Optimizer | None = None
        self._stamp = 0
        self._num_batches = 0  # of the optimizer step, so far

    @property
    def _own(self) -> range:
        assert self._share is not None
        return self._share.own

    def take_share(self, staged: StagedModel, args: MMSTConfig) -> None:
        model, heads = staged.model, staged.heads
        _refuse_model(staged)
        rank, number, clips = self._relay.rank, self._relay.num_ranks, args.max_grad_norm > 0
        share = take_share(model, staged.partition, heads, staged.parameters, rank, number, args.device, clips)
        staged.engine.outputs.update(share.outputs)
        self._share = share

    def own_part(self, segment: Segment) -> Segment:
        return replace(segment, stages=tuple(self._own))

    def summary(self) -> str:
        return f"; {self._relay.num_ranks} processes with stages {self._share}"

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        try:
            with self._relay.flowing():
                yield
        except Exception as error:
            first, *_, last = [stage + 1 for stage in self._own for _ in range(2)]
            stages = f"stages {first} to {last}" if last > first else f"stage {first}"
            error.add_note(f"hf_mmst: raised in rank {self._relay.rank} of {self._relay.num_ranks}, with {stages}.")
            raise

    def begin_step(self) -> None:
        self._num_batches = 0

    @contextlib.contextmanager
    def micro_batch(self, staged: StagedModel, inputs: Mapping[str, Any], seed: tuple[int, ...]) -> Iterator[None]:
        # What is drawn at random is another in each process, and leaves the order of samples alone.
        self._stamp = _stamp_of(staged.model, inputs)
        drawn = hash((*seed, self._num_batches, self._relay.rank)) % 2**63
        self._num_batches += 1
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(drawn)
            yield

    def take(self) -> tuple[int, torch.Tensor] | None:
        return None if self._relay.rank == 0 else (self._own[0], self._relay.take(self._stamp))

    def hand_on(self, output: torch.Tensor | None) -> None:
        if output is not None:
            self._relay.hand_on(output, self._stamp)

    @property
    def is_first(self) -> bool:
        return self._relay.rank == 0

    def gather(self, value: Any) -> list[Any]:
        return self._relay.gather(value)

    def from_last(self, value: Any) -> Any:
        return self._relay.from_last(value)

    @contextlib.contextmanager
    def observing(
        self,
        staged: StagedModel,
        inputs: Mapping[str, Any],
        read: Callable[[torch.Tensor], Any],
        criterion: Callable,
        tokens: ChosenTokens | None,
    ) -> Iterator[StageView]:
        self._stamp = _stamp_of(staged.model, inputs)
        mask = inputs.get("attention_mask")
        with staged.engine.observe(mask, read, self._own, self.take(), criterion, tokens) as view:
            yield view
        self.hand_on(view.output)

    def scores_of_all(self, scores: StageScores) -> StageScores:
        return StageScores.joined(self._relay.gather(scores))

    def predictions_of_all(self, found: tuple[Any, Sequence[Any]]) -> tuple[Any, Sequence[Any]]:
        parts = self._relay.gather(found)
        return parts[-1][0], tuple(one for _, logits in parts for one in logits)

    def state_dict_of_all(self, staged: StagedModel, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
        assert self._share is not None
        heads = {f"{HEADS}.{name}": tensor for name, tensor in staged.heads.state_dict().items()}
        whole = staged.model.state_dict() | heads
        own = {name: tensor for name, tensor in whole.items() if self._share.owners[name] == self._relay.rank}
        found = self._relay.collect(own)
        states = zip(self._share.stages, self._relay.gather(staged.weights.state_dict()), strict=True)
        staged.weights.load_state_dict(_by_stage({k: state for own, state in states for k in own}))
        return {name: found[name] for name in whole if name in found}

    def save_optimizer(self, optimizer: Any, folder: str, should_save: bool) -> None:
        own = optimizer.state_dict()
        found = self._relay.collect({(i, name): v for i, state in own["state"].items() for name, v in state.items()})
        if should_save:
            states: dict[int, dict[str, Any]] = {}
            for (index, name), value in sorted(found.items()):
                states.setdefault(index, {})[name] = value
            torch.save({**own, "state": states}, os.path.join(folder, OPTIMIZER_NAME))

    def keep_own_states(self, optimizer: Any) -> None:
        # The other processes' parameters never have gradients here.
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        if optimizer is self._watched:
            return
        self._watched = optimizer
        for parameter in [p for p in optimizer.state if is_released(p)]:
            del optimizer.state[parameter]

        def own_part(optimizer, state_dict):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {index: s for index, s in state_dict["state"].items() if not is_released(parameters[index])}
            return {**state_dict, "state": state}

        optimizer.register_load_state_dict_pre_hook(own_part)

    def refuse_search(self) -> None:
        raise ValueError("hyperparameter_search draws settings in one process. Set stage_parallel=False.")


def _refuse_model(staged: StagedModel) -> None:
    model, heads = staged.model, staged.heads
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"stage_parallel=True is for plain Hugging Face models, not for a {type(model).__name__}. Set "
            "stage_parallel=False."
        )
    if heads.kind == "own":
        raise ValueError(
            f"The stages of a {type(model).__name__} share its own head, but with stage_parallel=True each process "
            "holds its own stages alone. Set stage_parallel=False."
        )
    if len(heads.layers):
        raise ValueError(
            f"head_layers={len(heads.layers)}, the default for a pretrained model, gives the heads of all "
            "stages the same layers, but with stage_parallel=True each process holds its own stages alone. Set "
            "head_layers=0."
        )


def _stamp_of(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """A check sum of what all processes read of a batch, which is all but the main input."""
    tensors = [t for n, t in sorted(inputs.items()) if n != model.main_input_name and torch.is_tensor(t)]
    return zlib.crc32(b"".join(t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors))


def _by_stage(states: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """State of the transport weights, of which each stage's part is the one that its own process has."""
    by_stage = {name for name, value in states[0].items() if isinstance(value, list)}
    return states[0] | {name: [states[k][name][k] for k in sorted(states)] for name in by_stage}
