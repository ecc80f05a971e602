"""`Stagewise`: the engine that runs a model's own forward pass in stages, each of which learns from its own loss."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..cut.chosen_tokens import ChosenTokens
from ..cut.hidden_states import hidden_states_of
from ..cut.layers import run_ends
from ..cut.partition import Partition
from .heads import StageHeads
from .observing_pass import ObservingPass, StageView
from .own_head import ModelsOwnHead
from .partial_forward import left_out, until_stopped
from .training_pass import StageStep, TrainingPass
from .transport import RunTracker


class Stagewise:
    """
    Runs a model stage by stage inside its own forward pass.

    For each stage k, on an input z_{k-1} that carries no gradient (the paper's equation 5):

        L_k(F_k(z_k)) + w_k sum_m T(x_m, x_{m+1}),   x_1 = z_{k-1},   x_{m+1} = layer_m(x_m),   z_k = x_{M+1}

    is stepped back through at once, and z_k goes on without its graph. The last stage that learns is left to the
    caller: its loss comes out of the model's forward, as in any training loop, so that wrappers around the model
    (DistributedDataParallel, autocast, a gradient scaler) see what they expect.

    ```python
    engine = Stagewise(model, partition, heads)
    with engine.step(criterion=lambda logits: cross_entropy(logits, labels), weights=[1.0] * 4) as step:
        outputs = model(**inputs, labels=labels)
    (outputs.loss + 1.0 * step.transport).backward()
    ```

    Heads of kind `"own"` are the model's own, see [`ModelsOwnHead`]. The logits of one stage are in memory at a time.

    Args:
        model (`nn.Module`): the model whose layers `partition` names, not a wrapper around it.
        partition (`Partition`): the cut.
        heads (`StageHeads`): auxiliary heads of stages 1 .. K-1.
        transport_norm (`str`): see [`movement`].
        hooks_first (`bool`): whether a stage ends before the hooks run that others have put on its last layer, so that
            recorders of hidden states see what the next stage sees; if not, theirs run within its own.

    Attributes:
        outputs (`dict[str, Any]`): what layers that did not learn returned, tensors left out, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        heads: StageHeads,
        transport_norm: str = "relative",
        hooks_first: bool = True,
    ):
        self.model, self.partition, self.heads, self.norm = model, partition, heads, transport_norm
        self._first = hooks_first
        self.run_ends = {*run_ends(model, partition.layers), *partition.boundaries}
        self.outputs: dict[str, Any] = {}
        self._own_head = ModelsOwnHead(model, partition.layers)
        self._tokens: ChosenTokens | None = None  # that heads look at in a step
        self._passes: int | None = None  # of the model in a step, if one is under way

    @contextlib.contextmanager
    def step(
        self,
        criterion: Callable[[torch.Tensor], torch.Tensor],
        weights: Sequence[float],
        stages: Sequence[int] | None = None,
        mask: torch.Tensor | None = None,
        backward: Callable[..., Any] = torch.Tensor.backward,
        learned: Callable[[int, bool], Any] = lambda stage, shared: None,
        given: tuple[int, torch.Tensor] | None = None,
        to_the_end: bool = False,
        tokens: ChosenTokens | None = None,
    ) -> Iterator[StageStep]:
        """
        Within this context, a forward pass of the model (or of a wrapper around it) trains `stages`.

        Stages before them run in eval mode without graph; stages after them do not run, and the forward pass then
        returns the last stage's logits, with its task loss if labels were passed. Nothing is left on the model.

        With `to_the_end`, one stage learns from the model's own loss instead (F_k is the rest of the model): stages
        after it run with graph, and it is for the caller to have their parameters without `requires_grad`.

        Args:
            criterion: logits of a head to the task's loss, a scalar.
            weights: weight of the transport term in each of the K stages' losses.
            stages: consecutive stages that learn, from 0; all by default.
            mask: `[B, N]`, 1 for tokens that count.
            backward: called with the loss of every stage but the last of `stages`, and with `retain_graph=True` where
                side inputs need its graph once more.
            learned: called with the number of a stage whose gradients are there, and whether later stages will add to
                them, through side inputs of all layers.
            given: a stage, at most `stages[0]`, and its input, so that the layers before it need not run. Ignored
                until they have run once.
            to_the_end: whether the forward pass goes on to the model's own loss; `stages` is then one stage.
            tokens: whose logits alone `criterion` gets, `[M, vocab_size]`, of heads of kind `"own"`; all by default.

        Yields:
            [`StageStep`]: complete when the forward pass has returned.
        """
        stages = range(self.partition.num_stages) if stages is None else stages
        training = TrainingPass(
            self.model,
            self.partition,
            RunTracker(self.run_ends),
            self.norm,
            self.logits,
            self.outputs,
            criterion,
            weights,
            stages,
            mask,
            backward,
            learned,
            to_the_end,
        )
        self._passes, self._tokens = 0, tokens
        try:
            with (
                self._without_layers_before(given),
                self._hooked(training.before_layer, training.after_layer),
                training.forward(),
            ):
                yield training.found
        finally:
            self._passes = self._tokens = None

    @contextlib.contextmanager
    def alone(self, refuse: Callable[[], Any]) -> Iterator[None]:
        """Context in which `refuse` is called if the model runs with gradients outside a [`step`] or twice in one."""

        def before(module, _args):
            if not torch.is_grad_enabled():
                return
            if module is self.model and self._passes is not None:
                self._passes += 1
            if self._passes is None or self._passes > 1:
                refuse()

        with contextlib.ExitStack() as stack:
            path = self.partition.layers[0].split(".")
            around = [self.model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
            for module in around:
                if not isinstance(module, GradientCheckpointingLayer):  # one within another runs again in the backward
                    stack.callback(module.register_forward_pre_hook(before).remove)
            yield

    @contextlib.contextmanager
    def _without_layers_before(self, given: tuple[int, torch.Tensor] | None) -> Iterator[None]:
        names = [name for stage in self.partition.stages[: given[0]] for name in stage] if given else []
        if given is None or not self.outputs.keys() >= {*names}:
            yield
            return
        with left_out(self.model, self.outputs, names, given[1]):
            yield

    def logits(
        self, stage: int, mask: torch.Tensor | None, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor:
        """What a stage's head says, float32, of what its last layer was called with and puts out."""
        found = self.heads(stage, hidden_states_of(output), mask, args, kwargs)
        return (self._own_head.logits(found, output, self._tokens) if self.heads.kind == "own" else found).float()

    @contextlib.contextmanager
    def observe(
        self,
        mask: torch.Tensor | None = None,
        read: Callable[[torch.Tensor], Any] = lambda logits: logits,
        stages: Sequence[int] | None = None,
        given: tuple[int, torch.Tensor] | None = None,
        criterion: Callable[[torch.Tensor], torch.Tensor] | None = None,
        tokens: ChosenTokens | None = None,
    ) -> Iterator[StageView]:
        """
        Within this context, a forward pass without learning, the first one, fills the [`StageView`] that is yielded.

        Args:
            mask: `[B, N]`, 1 for tokens that count.
            read: what is kept of each head's logits; all of them by default.
            stages: consecutive stages to look at, from 0; all by default. Those after them do not run, see [`step`].
            given: as in [`step`].
            criterion: as in [`step`], for the loss of the last of `stages` if that is not the model's last.
            tokens: as in [`step`], of what `read` and `criterion` get.
        """
        stages = range(self.partition.num_stages) if stages is None else stages
        observing = ObservingPass(
            self.partition, RunTracker(self.run_ends), self.norm, self.logits, len(self.heads), mask, read, stages
        )
        training = self.heads.training
        self.heads.eval()
        self._tokens = tokens
        stopping: contextlib.AbstractContextManager = contextlib.nullcontext()
        if stages[-1] < self.partition.num_stages - 1:
            stopping = until_stopped(self.model, criterion, contextlib.nullcontext)
        try:
            with self._without_layers_before(given), self._hooked(None, observing.after_layer), stopping:
                yield observing.view
        finally:
            self._tokens = None
            self.heads.train(training)

    @contextlib.contextmanager
    def _hooked(self, before: Callable | None, after: Callable) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.heads.kind == "own":
                head = self._own_head
                stack.callback(self.model.register_forward_pre_hook(head.remember, with_kwargs=True).remove)
                stack.callback(setattr, head, "inputs", head.inputs)
            for name in self.partition.layers:
                layer = self.model.get_submodule(name)
                if before is not None:
                    beginning = functools.partial(before, name)
                    hook = layer.register_forward_pre_hook(beginning, with_kwargs=True, prepend=not self._first)
                    stack.callback(hook.remove)
                ending = functools.partial(after, name)
                hook = layer.register_forward_hook(ending, with_kwargs=True, prepend=self._first)
                stack.callback(hook.remove)
            yield
