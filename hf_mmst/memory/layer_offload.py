"""End-to-end training with one layer in device memory: its own gradient, and everything else at rest."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from ..cut.layers import refuse_shared
from ..cut.partition import Partition
from ..cut.temporary_attributes import not_caching, replaced
from ..method.stepping import steps_elementwise
from .half_sent import HalfSent
from .micro_batches import MicroBatches
from .recomputing import is_in_backward, keeping_buffers
from .resting_inputs import RestingInputs
from .slabs import HOST, Slab
from .stage_offload import StageOffload
from .states import RestingStates


class LayerOffload(StageOffload):
    """
    Runs forward and backward of a whole model while each layer is in device memory only when it is needed.

    Within [`streaming`], a layer comes to the device for its forward pass, whose activations are let go, and again when
    the backward pass recomputes it; its gradient is put to rest when the backward pass has reached the layer before it.
    The optimizer steps where everything rests, in host memory, one layer at a time. The gradients are those of
    end-to-end training; what the device holds is one layer's weights (in a [`Ring`], two layers'), gradient and
    activations, the input of each layer, and the weights and gradients of what is around the layers. Layers that are
    `resident` are as in any other training, and step on the device.

    With W bytes of weights in the layers, G of gradients, and n micro-batches a step, 2 n W + (n - 1) G bytes come in
    and n G go out in a step, less n times what a ring holds: the backward pass finds it there. Clipping adds none, for
    the norms are taken when the gradients are there. Under autocast, W and G are those in low precision, see
    [`HalfSent`], and earlier gradients do not come in.

    Args: those of [`StageOffload`], and

        rests_inputs (`bool`): whether the inputs of layers, too, rest until the layers are recomputed.
        samples (`int`, *optional*): that are in a layer at once, see [`MicroBatches`]; all of the batch by default.
        steps_on_device (`bool`): whether the optimizer steps each layer on the device, to which its weights, gradient
            and states come for that. It saves a slow host the step and costs the link 28 bytes a parameter (AdamW).
        half (`torch.dtype`, *optional*): of autocast, for a device with memory of its own.

    Raises:
        `ValueError`: if layers share weights, which could not rest with one of them; from [`watch`], for an optimizer
            that cannot step them one by one on the device.
    """

    micro_batches = MicroBatches

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        device: torch.device,
        folder: str,
        resident: Collection[str] = (),
        rests_inputs: bool = False,
        samples: int | None = None,
        steps_on_device: bool = False,
        half: torch.dtype | None = None,
    ):
        refuse_shared(model, partition.layers)
        self._half: HalfSent | None = None
        super().__init__(model, partition, device, folder, resident)
        if half is not None and self.link.copies:
            self._half = HalfSent(model, self._parameters, half, lambda tensors: self.slab(tensors, device, folder))
            self.link = self._make_link()  # for smaller slabs
        self._gradients: dict[str, tuple[list[nn.Parameter], Slab]] = {}  # of the layers' parameters that learn
        self._norms: dict[nn.Parameter, tuple[torch.Tensor, int, torch.Tensor]] = {}  # gradient, its version, its norm
        self._limit: tuple[float, torch.Tensor] | None = None  # of the norm of all gradients, and what that is
        self._in_backward: str | None = None
        self._arriving = contextlib.ExitStack()  # holds the hooks on the gradients of that layer
        self._inputs = RestingInputs(device, folder, self.slab, self.link, self._streams) if rests_inputs else None
        self._in_step: list[Slab] = []  # weights and gradients of the layer at its step
        self._stepped: dict[nn.Parameter, torch.Tensor] = {}  # gradients in host memory of layers that have stepped
        self._samples, self._steps_on_device = samples, steps_on_device
        self._away: list[tuple[nn.Parameter, torch.Tensor]] = []  # parameters at their step, and where they belong

    def _hook(self, optimizer: torch.optim.Optimizer, states: RestingStates) -> None:
        if self._steps_on_device and not steps_elementwise(optimizer):
            raise ValueError(
                f'offloaded_step="device" steps layer by layer, but of {type(optimizer).__name__} it is not known '
                'that it steps each parameter by itself. Set offloaded_step="host", or optim to another, such as '
                "adamw_torch."
            )
        super()._hook(optimizer, states)
        optimizer.register_step_post_hook(lambda *_: self._end_step(states))

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """As [`StageOffload.streaming`], and in the backward pass, too."""
        with super().streaming(), not_caching(self._model), contextlib.ExitStack() as stack:
            for name in self._layers:
                layer: Any = self._model.get_submodule(name)
                # The host would recompute it once more; where a stage learns from its own loss, that is done here, too.
                recomputed = getattr(layer, "gradient_checkpointing", False)
                forward = functools.partial(self._forward, name, layer.forward, recomputed)
                if self._samples is not None:
                    forward = functools.partial(self.micro_batches(layer, self._samples, name).run, forward)
                stack.enter_context(replaced(layer, "gradient_checkpointing", False))
                stack.enter_context(replaced(layer, "forward", forward))
            yield

    def _forward(self, name: str, forward: Callable, recomputed: bool, /, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or (name in self._active and not recomputed):
            return forward(*args, **kwargs)
        run = functools.partial(self._run, name, forward)
        if self._inputs is None:
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        named = {key: value for key, value in kwargs.items() if torch.is_tensor(value) and value.requires_grad}
        others = {key: value for key, value in kwargs.items() if key not in named}
        run = functools.partial(_with_names, run, len(args), [*named])
        with self._inputs.saving():  # of what is positional
            return checkpoint(run, *args, *named.values(), use_reentrant=False, **others)

    def _run(self, name: str, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
        if not is_in_backward():
            return forward(*args, **kwargs)
        # The backward pass recomputes it.
        if name not in self._active and name != self._in_backward:
            if self._in_backward is not None:
                self._put_gradient(self._in_backward)
            self._in_backward = name
            self._take(name, -1)
            self._take_gradient(name)
            self._await_gradients(name)
        with keeping_buffers(self._model.get_submodule(name)):
            return forward(*args, **kwargs)

    def settle(self) -> None:
        """Put to rest what the backward pass has left on the device: the layer that it came to last."""
        if self._in_backward is not None:
            self._put_gradient(self._in_backward)
            self._in_backward = None
            self.link.wait()
            if self._half is not None:
                for parameter in self._half.arrive(self._gradients):
                    self._note(parameter)

    def rest(self) -> None:
        """As [`StageOffload.rest`]; gradients of a step that was not taken are forgotten."""
        self._put_back()
        for parameters in self._parameters.values():
            for parameter in parameters:
                parameter.grad = None
        self._in_backward = self._limit = None
        self._arriving.close()
        self._norms.clear()
        self._stepped.clear()
        if self._half is not None:
            self._half.forget()
        if self._inputs is not None:
            self._inputs.forget()
        super().rest()

    def _take_gradient(self, name: str) -> None:
        """Bring what earlier backward passes of the step have left, to which this one adds."""
        if self._half is not None:
            self._half.begin(self._parameters[name])
        elif any(p.grad is not None for p in self._parameters[name]):
            learning, slab = self._gradients[name]
            for parameter, gradient in zip(learning, slab.take(self._device), strict=True):
                if parameter.grad is not None:
                    parameter.grad = gradient
                    self.link.bytes_in += gradient.nbytes

    def _await_gradients(self, name: str) -> None:
        """Where they rest on the device itself, put each gradient to rest once it is there, not all in the end."""
        if not self.link.copies:
            hook = functools.partial(self._arrived, name)
            for parameter in self._parameters[name]:
                if parameter.requires_grad:
                    self._arriving.callback(parameter.register_post_accumulate_grad_hook(hook).remove)

    def _arrived(self, name: str, parameter: nn.Parameter) -> None:
        parameter.grad = self._send(name, [parameter])[parameter]

    def _put_gradient(self, name: str) -> None:
        """Put a layer to rest, and its gradient beside it."""
        self._arriving.close()
        sent = {}
        if self.link.copies:
            sent = self._send(name, [p for p in self._parameters[name] if p.grad is not None])
        self._rest(name)
        for parameter, resting in sent.items():
            parameter.grad = resting

    def _send(self, name: str, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
        """Put gradients of a layer to rest; returns them there."""
        learning = [p for p in self._parameters[name] if p.requires_grad]
        slab = self._gradient_slab(name, learning)
        places = dict(zip(learning, slab.tensors, strict=True))
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        norms = {p: torch.linalg.vector_norm(gradient.to(places[p].dtype)) for p, gradient in gradients.items()}
        for parameter in gradients:
            parameter.grad = None  # it is on the device, where the weights will no longer be
        to = slab if self._half is None else self._half.gradients(name, learning)
        self.link.put(to, [gradients.get(p, resting) for p, resting in zip(learning, to.tensors, strict=True)])
        self.link.bytes_out += sum(gradient.nbytes for gradient in gradients.values())
        for parameter, norm in norms.items():
            self._norms[parameter] = places[parameter], places[parameter]._version, norm
        if self._half is not None:
            self._half.send(name, gradients)
            return {}
        return {p: places[p] for p in gradients}

    def _note(self, parameter: nn.Parameter) -> None:
        """Its gradient has come to rest: the norm that was taken on the device is that of it."""
        if parameter in self._norms:
            resting, _, norm = self._norms[parameter]
            self._norms[parameter] = resting, resting._version, norm

    def _sent(self, name: str) -> Slab:
        return super()._sent(name) if self._half is None else self._half.weights[name]

    def _refresh(self, name: str, step: int) -> None:
        if self._half is not None and step > 0:
            self._half.refresh(name, self._slabs[name].tensors)

    def _gradient_slab(self, name: str, learning: list[nn.Parameter]) -> Slab:
        """Where a layer's gradient rests; made anew if others of its parameters learn than before."""
        before, slab = self._gradients.get(name, ([], None))
        if slab is None or [*map(id, before)] != [*map(id, learning)]:
            at_rest = dict(zip(self._parameters[name], self._slabs[name].tensors, strict=True))
            slab = self.slab([at_rest[p] for p in learning], self._device, self._folder)
            self._gradients[name] = learning, slab
        return slab

    def clip(self, max_norm: float, at_once: bool = False) -> torch.Tensor:
        """The norm of all gradients; they are scaled so that it is at most `max_norm`, in the step or `at_once`."""
        learning = [p for p in self._model.parameters() if p.grad is not None]
        norm = get_total_norm([self._norm(p) for p in learning])  # of norms, in the order of the parameters
        self._limit = max_norm, norm
        if at_once:
            self._clip(learning)
            self._limit = None
        return norm

    def _norm(self, parameter: nn.Parameter) -> torch.Tensor:
        gradient = parameter.grad
        assert gradient is not None
        measured, version, norm = self._norms.get(parameter, (None, 0, gradient))
        if measured is gradient and version == gradient._version:
            return norm
        return torch.linalg.vector_norm(gradient)  # around the layers, or changed since

    def step(self, optimizer: Any) -> None:
        """
        Step each layer's parameters, and have those around the layers in host memory for the caller's own step, which
        is that of resident layers, too.

        An optimizer of which is not known that it steps each parameter by itself has all of them in the caller's step.
        """
        gradients = {p: p.grad for p in self._model.parameters() if p.grad is not None}
        by_layer = steps_elementwise(optimizer)
        if by_layer:
            for parameter in gradients:
                parameter.grad = None
            for name in self._layers:
                if not gradients.keys().isdisjoint(self._parameters[name]):
                    self._step(name, optimizer, gradients)
            self._in_step.clear()
        inside = {p for parameters in self._parameters.values() for p in parameters}
        for parameter, gradient in gradients.items():
            if parameter in self._resident or (by_layer and self._steps_on_device and parameter not in inside):
                parameter.grad = gradient
            elif parameter not in inside:
                self._away.append((parameter, parameter.data))
                parameter.grad = None
                parameter.data = parameter.data.to(HOST)
                parameter.grad = gradient.to(HOST)
        self._clip(gradients)

    def _step(self, name: str, optimizer: Any, gradients: Mapping[nn.Parameter, torch.Tensor]) -> None:
        place = self._device if self._steps_on_device else HOST
        self._keep(name)
        self._set(name, self._slabs[name].take(place))
        learning, slab = self._gradients[name]
        slab.put([gradients.get(p, resting) for p, resting in zip(learning, slab.tensors, strict=True)])
        for parameter, gradient in zip(learning, slab.take(place), strict=True):
            if parameter in gradients:
                parameter.grad = gradient
        self._clip(learning)
        self._in_step = [self._slabs[name], slab]
        optimizer.step()
        for parameter, resting in zip(learning, slab.tensors, strict=True):
            if not self._steps_on_device and parameter.grad is not None:
                self._stepped[parameter] = resting
            parameter.grad = None
        self._put(name)
        if self._steps_on_device and self.states is not None:
            states = self.states.nbytes_of(learning)
            self.link.bytes_in += self._slabs[name].nbytes + slab.nbytes + states
            self.link.bytes_out += self._slabs[name].nbytes + states

    def _clip(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._limit is not None:
            max_norm, norm = self._limit[0], self._limit[1].to(HOST)
            if not max_norm / (norm + 1e-6) >= 1:  # else they would be multiplied by 1
                clip_grads_with_norm_(parameters, max_norm, norm)

    def _end_step(self, states: RestingStates) -> None:
        self._put_back()
        for slab in self._in_step:  # before states that were made in this step come to rest
            slab.let_go()
        states.rest()
        if not self._in_step:  # the last one: callbacks may look at gradients until they are set to zero
            for parameter, gradient in self._stepped.items():
                parameter.grad = gradient
            self._stepped.clear()

    def _put_back(self) -> None:
        """Bring back what is around the layers."""
        for parameter, tensor in self._away:
            if tensor.device != HOST:
                tensor.copy_(parameter.data)
                parameter.grad = None
                parameter.data = tensor
        self._away.clear()


def resident_layers(layers: Sequence[str], number: int) -> list[str]:
    """That many of the layers, evenly spread, so that between any two of them others have time to come."""
    return [layers[(2 * i + 1) * len(layers) // (2 * number)] for i in range(number)]


def _with_names(run: Callable, number: int, names: list[str], *args: Any, **kwargs: Any) -> Any:
    """Run with all arguments but the first `number` given by these names."""
    return run(*args[:number], **dict(zip(names, args[number:], strict=True)), **kwargs)
