"""`Step`: what a training step computes and moves -> the seconds that it is predicted to take on a device."""

from dataclasses import dataclass

from .devices import Device

ENOUGH = 0.9  # of in-memory speed
UPDATE = 7  # times that AdamW passes over the bytes of what learns: gradient, weight twice, both states twice
CLIPPING = 3  # times that clipping passes over them: the norm, and the scaling in place


@dataclass(frozen=True)
class Phase:
    """
    A part of a step, in which computing, moving and stepping can go on at the same time.

    Attributes:
        flops (`float`), nbytes (`float`): what operators compute, and read and write, in proportion to the batch.
        moved_in (`float`), moved_out (`float`): bytes to the device and from it, whatever the batch.
        stepped (`float`): bytes that clipping and the optimizer read and write.
        on_host (`bool`): whether they do so in host memory.
        sent (`float`): bytes that come from other processes, and go to them.
        overlaps (`bool`): whether a GPU does all of that at the same time.
        made (`float`): bytes of tensors whose memory is new, in proportion to the batch.
    """

    flops: float = 0
    nbytes: float = 0
    moved_in: float = 0
    moved_out: float = 0
    stepped: float = 0
    on_host: bool = False
    overlaps: bool = True
    sent: float = 0
    made: float = 0

    def seconds(self, device: Device, precision: str, batches: float = 1) -> float:
        """The longest of its parts where they overlap on a GPU, else their sum; a link has two directions."""
        computing = batches * (self.flops / device.flops[precision] + self.nbytes / device.memory_bandwidth)
        in_host = self.on_host or device.is_host
        stepping = self.stepped / (device.host_bandwidth if in_host else device.memory_bandwidth)
        if not in_host:
            computing, stepping = computing + stepping, 0.0
        sending = self.sent / device.between if self.sent and device.between is not None else 0.0
        computing += batches * self.made / device.new_memory if device.new_memory else 0
        moved_out = self.moved_out / (device.link_out or device.link)
        parts = computing, self.moved_in / device.link, moved_out, stepping, sending
        return max(parts) if self.overlaps and not device.is_host else sum(parts)

    def in_memory(self) -> "Phase":
        """The same, had nothing to be moved."""
        return Phase(self.flops, self.nbytes, stepped=self.stepped, made=self.made)


@dataclass(frozen=True)
class Step:
    """A training step: its forward pass, its backward pass with what is recomputed, and the optimizer's step."""

    phases: tuple[Phase, ...]

    def seconds(self, device: Device, precision: str, batches: float = 1) -> float:
        """Predicted, with a batch that many times as large."""
        return sum(phase.seconds(device, precision, batches) for phase in self.phases)

    def speed(self, device: Device, precision: str, batches: float = 1) -> float:
        """The share of the speed that the same computation would have with all of it in device memory."""
        whole = Step(tuple(phase.in_memory() for phase in self.phases))
        return whole.seconds(device, precision, batches) / self.seconds(device, precision, batches)

    def batches_for(self, speed: float, device: Device, precision: str) -> float | None:
        """How many times as large a batch has to be to reach that share; `None` if nothing is moved."""
        if not any(phase.moved_in or phase.moved_out or phase.sent for phase in self.phases):
            return None
        least, most = 1e-6, 1e9  # the larger the batch, the smaller the part of what is moved
        while most / least > 1.001:
            middle = (least * most) ** 0.5
            if self.speed(device, precision, middle) < speed:
                least = middle
            else:
                most = middle
        return most


@dataclass(frozen=True)
class Prediction:
    """
    Predicted, not measured.

    Attributes:
        seconds (`float`): of one batch, in all stages.
        speed (`float`): the share of the speed of the same computation with all of it in device memory.
        tokens (`int`, *optional*): in a batch with which that share is 90 %; `None` if nothing is moved or sent.
    """

    seconds: float
    speed: float
    tokens: int | None


def predict(step: Step, device: Device, precision: str, num_tokens: int) -> Prediction | None:
    """The time of a step on a batch of `num_tokens`; `None` if it sends bytes over a link of unknown speed."""
    if device.between is None and any(phase.sent for phase in step.phases):
        return None
    batches = step.batches_for(ENOUGH, device, precision)
    tokens = None if batches is None else round(batches * num_tokens)
    return Prediction(step.seconds(device, precision), step.speed(device, precision), tokens)
