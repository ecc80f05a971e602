"""The engine: one forward pass of the model's own, in which each stage learns from its own loss and is let go."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

from ..cut.attributes import replaced
from ..cut.hidden_states import detached, hidden_states_of, with_hidden_states
from ..cut.partition import Partition, run_ends
from ..cut.side_inputs import Sides, mark
from .heads import StageHeads
from .transport import movement, transport


@dataclass
class StageStep:
    """
    What one training step found, by stage number from 0.

    Attributes:
        losses (`dict[int, torch.Tensor]`): task loss of each stage that has already been stepped back through.
        transports (`dict[int, torch.Tensor]`): transport of each stage that learned, without graph.
        transport (`torch.Tensor`): transport of the last stage that learned, with graph: its loss is the caller's.
        features (`torch.Tensor`, *optional*): input of the first stage that learned, if that is not the model's first.
        output (`torch.Tensor`, *optional*): output of the last stage that learned, if that is not the model's last.
    """

    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    transports: dict[int, torch.Tensor] = field(default_factory=dict)
    transport: torch.Tensor | float = 0.0
    features: torch.Tensor | None = None
    output: torch.Tensor | None = None


@dataclass
class StageView:
    """
    What a forward pass without learning shows of the stages that were looked at.

    Attributes:
        logits (`list[Any]`): what was read of their heads' logits, all but the model's own; see [`Stagewise.observe`].
        movements (`list[torch.Tensor]`): how far each of the stages moves each sample, `[B]` each.
        output (`torch.Tensor`, *optional*): output of the last of them, if that is not the model's last.
    """

    logits: list[Any] = field(default_factory=list)
    movements: list[torch.Tensor] = field(default_factory=list)
    output: torch.Tensor | None = None


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

    Heads of kind `"own"` are the model's own: what it makes of z_k is its forward pass on the same inputs with all
    layers left out and z_k in the place of what they put out, whatever comes after them (norms, an output embedding,
    a cap on logits). The logits of one stage are in memory at a time.

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
        self._stage_of = {name: k for k, stage in enumerate(partition.stages) for name in stage}
        self._ends = set(partition.boundaries)
        self.run_ends = {*run_ends(model, partition.layers), *partition.boundaries}
        self.outputs: dict[str, Any] = {}
        self._inputs: tuple[tuple, dict[str, Any]] = (), {}  # what the model was called with, for its own head
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
    ) -> Iterator[StageStep]:
        """
        Within this context, a forward pass of the model (or of a wrapper around it) trains `stages`.

        Stages before them run in eval mode without graph; stages after them do not run, and the forward pass then
        returns the last stage's logits, with its task loss if labels were passed. Nothing is left on the model.

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

        Yields:
            [`StageStep`]: complete when the forward pass has returned.
        """
        stages = range(self.partition.num_stages) if stages is None else stages
        walk = _Walk(self, StageStep(), criterion, weights, stages[0], stages[-1], mask, backward, learned)
        self._passes = 0
        try:
            with (
                self._without_layers_before(given),
                self._hooked(walk.before_layer, walk.after_layer),
                walk.forward_of(self.model),
            ):
                yield walk.found
        finally:
            self._passes = None

    @contextlib.contextmanager
    def alone(self, refuse: Callable[[], Any]) -> Iterator[None]:
        """Within this context, `refuse` is called where the model is run with gradients, but for once in a [`step`]."""

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
        with self._left_out(self.outputs, names, given[1]):
            yield

    @contextlib.contextmanager
    def _left_out(self, outputs: Mapping[str, Any], names: Sequence[str], hidden: torch.Tensor) -> Iterator[None]:
        """Within this context, `names` do not run: the last of them puts out `hidden`, the others what they get."""
        with contextlib.ExitStack() as stack:
            for name in names:
                layer = self.model.get_submodule(name)
                parent, _, child = name.rpartition(".")
                siblings = self.model.get_submodule(parent)._modules
                siblings[child] = _Given(layer, outputs[name], hidden if name == names[-1] else None)
                stack.callback(siblings.__setitem__, child, layer)
            yield

    def logits(
        self, stage: int, mask: torch.Tensor | None, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor:
        """What a stage's head says, float32, of what its last layer was called with and puts out."""
        found = self.heads(stage, hidden_states_of(output), mask, args, kwargs)
        return (self._own_head(found, output) if self.heads.kind == "own" else found).float()

    def _own_head(self, hidden: torch.Tensor, output: Any) -> torch.Tensor:
        layers = self.partition.layers
        args, kwargs = self._inputs
        with self._left_out(dict.fromkeys(layers, _without_tensors(output)), layers, hidden):
            # Not the instance's own forward, which may end at the last stage that learns.
            return type(self.model).forward(self.model, *args, **kwargs)[0]

    def _remember(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Keep what the model is called with; keys and values are not cached, for they would outlive their stage."""
        config: Any = model.config
        if getattr(config, "use_cache", False):
            kwargs = {**kwargs, "use_cache": False}
        self._inputs = args, {name: value for name, value in kwargs.items() if name != "labels"}
        return args, kwargs

    @contextlib.contextmanager
    def observe(
        self,
        mask: torch.Tensor | None = None,
        read: Callable[[torch.Tensor], Any] = lambda logits: logits,
        stages: Sequence[int] | None = None,
        given: tuple[int, torch.Tensor] | None = None,
        criterion: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Iterator[StageView]:
        """
        Within this context, a forward pass without learning, the first one, fills the [`StageView`] that is yielded.

        Args:
            mask: `[B, N]`, 1 for tokens that count.
            read: what is kept of each head's logits; all of them by default.
            stages: consecutive stages to look at, from 0; all by default. Those after them do not run, see [`step`].
            given: as in [`step`].
            criterion: as in [`step`], for the loss of the last of `stages` if that is not the model's last.
        """
        view = StageView()
        stages = range(self.partition.num_stages) if stages is None else stages
        moved: list[torch.Tensor] = []
        run = _Run(self.run_ends)

        def after_layer(name, _module, args, kwargs, output):
            stage = self._stage_of[name]
            if stage < stages[0] or len(view.movements) == len(stages):
                return
            y = hidden_states_of(output)
            kept = _fitting(mask, y)
            for before, after in run.until(name, _input_of(args, kwargs), y):
                moved.append(movement(before, after, kept, self.norm))
            if name in self._ends:
                view.movements.append(torch.stack(moved).sum(0) if moved else y.new_zeros(len(y)).float())
                moved.clear()
                if stage < len(self.heads):
                    logits = self.logits(stage, kept, args, kwargs, output)
                    view.logits.append(read(logits))
                    if stage == stages[-1]:
                        view.output = y
                        raise _StopForward(logits)

        training = self.heads.training
        self.heads.eval()
        stopping: contextlib.AbstractContextManager = contextlib.nullcontext()
        if stages[-1] < self.partition.num_stages - 1:
            stopping = _until_stopped(self.model, criterion, contextlib.nullcontext)
        try:
            with self._without_layers_before(given), self._hooked(None, after_layer), stopping:
                yield view
        finally:
            self.heads.train(training)

    @contextlib.contextmanager
    def _hooked(self, before: Callable | None, after: Callable) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.heads.kind == "own":
                stack.callback(self.model.register_forward_pre_hook(self._remember, with_kwargs=True).remove)
                stack.callback(setattr, self, "_inputs", self._inputs)
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


@dataclass
class _Run:
    """Follows the representation through runs of modules: where a run began, and its last output of the same shape."""

    ends: Collection[str]
    _begin: torch.Tensor | None = None
    _end: torch.Tensor | None = None

    def until(self, name: str, x: torch.Tensor, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """After a module: from where to where its run has moved, if it ends here and has kept the shape up to there."""
        self._begin = x if self._begin is None else self._begin
        self._end = y if y.shape == self._begin.shape else self._end
        if name not in self.ends:
            return []
        found = [] if self._end is None else [(self._begin, self._end)]
        self._begin = self._end = None
        return found


class _Given(nn.Module):
    """Stands in for a frozen layer: returns the hidden states that are given, or else those that it gets."""

    def __init__(self, layer: nn.Module, output: Any, hidden: torch.Tensor | None):
        super().__init__()
        vars(self).update(_layer=layer, _output=output, _hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def forward(self, *args, **kwargs) -> Any:
        return with_hidden_states(self._output, _input_of(args, kwargs) if self._hidden is None else self._hidden)


class _StopForward(Exception):  # noqa: N818 - not an error
    """Ends a forward pass after the last stage that learns, carrying its logits."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits


@dataclass
class _Walk:
    """One forward pass in which stages `first` .. `last` learn."""

    engine: Stagewise
    found: StageStep
    criterion: Callable[[torch.Tensor], torch.Tensor]
    weights: Sequence[float]
    first: int
    last: int
    mask: torch.Tensor | None
    backward: Callable[..., Any]
    learned: Callable[[int, bool], Any]
    _run: _Run = field(init=False)
    _terms: list[torch.Tensor] = field(default_factory=list)
    _sides: Sides = field(default_factory=Sides)

    def __post_init__(self):
        self._run = _Run(self.engine.run_ends)

    def before_layer(self, name: str, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Cut side inputs off that would tie a stage to what is before it."""
        stage = self.engine._stage_of[name]
        return self._sides.enter(stage, args, kwargs, stage == self.last) if stage >= self.first else None

    def after_layer(self, name: str, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Add the layer's transport; at a stage's end, learn and hand on the output without its graph."""
        stage = self.engine._stage_of[name]
        if stage < self.first:
            self.engine.outputs[name] = _without_tensors(output)
            if stage == self.first - 1 and name in self.engine._ends:  # all that runs from here on learns
                self.found.features = hidden_states_of(output)
                torch.set_grad_enabled(True)
                self.engine.model.train()
            return None
        mark(output, stage)
        y = hidden_states_of(output)
        mask = _fitting(self.mask, y)
        for before, after in self._run.until(name, _input_of(args, kwargs), y):
            with torch.set_grad_enabled(self.weights[stage] > 0):
                self._terms.append(transport(before, after, mask, self.engine.norm))
        if name not in self.engine._ends:
            return None
        term = torch.stack(self._terms).sum() if self._terms else y.new_zeros((), dtype=torch.float32)
        self._terms.clear()
        self.found.transports[stage] = term.detach()
        if stage == self.last:
            self.found.transport = term
        if stage == self.engine.partition.num_stages - 1:
            return None
        if stage == self.last:
            self.found.output = y.detach()
            raise _StopForward(self.engine.logits(stage, mask, args, kwargs, output))
        self._learn(stage, self.criterion(self.engine.logits(stage, mask, args, kwargs, output)), term)
        return detached(output)

    def _learn(self, stage: int, loss: torch.Tensor, term: torch.Tensor) -> None:
        self.found.losses[stage] = loss.detach()
        device = loss.device.type
        with torch.autocast(device, enabled=False):
            loss = loss + self.weights[stage] * term
            self.backward(loss, **({"retain_graph": True} if self._sides.share_graph_with(loss) else {}))
            self.learned(stage, self._sides.step_back())
        if torch.is_autocast_enabled(device):
            torch.clear_autocast_cache()  # else the low-precision copies of every stage's weights pile up

    def forward_of(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Let the model's forward begin without graph and end early, where the stages that learn ask for it."""
        if self.first == 0 and self.last == self.engine.partition.num_stages - 1:
            return contextlib.nullcontext()
        return _until_stopped(model, self.criterion, self._frozen_at_first)

    @contextlib.contextmanager
    def _frozen_at_first(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.first == 0):
            self.engine.model.train(self.first == 0)
            try:
                yield
            finally:
                self.engine.model.train()


@contextlib.contextmanager
def _until_stopped(
    model: nn.Module,
    criterion: Callable[[torch.Tensor], torch.Tensor] | None,
    around: Callable[[], contextlib.AbstractContextManager],
) -> Iterator[None]:
    """Within this context the model's forward runs within `around`, and returns the logits that it was stopped with."""
    forward = model.forward

    @functools.wraps(forward)
    def from_first_to_last(*args, **kwargs):
        with around():
            try:
                return forward(*args, **kwargs)
            except _StopForward as stop:
                loss = None if criterion is None or kwargs.get("labels") is None else criterion(stop.logits)
                return SequenceClassifierOutput(loss=loss, logits=stop.logits)

    with replaced(model, "forward", from_first_to_last):
        yield


def _input_of(args: tuple, kwargs: dict) -> torch.Tensor:
    return hidden_states_of(args or tuple(kwargs.values()))


def _without_tensors(output: Any) -> Any:
    return tree_map(lambda x: None if torch.is_tensor(x) else x, output)


def _fitting(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    return mask if mask is not None and hidden.dim() == 3 and mask.shape == hidden.shape[:2] else None
