"""A `Trainer` whose loss is a mean over the optimizer step, whatever its model makes of `num_items_in_batch`."""

from typing import Any

from transformers import Trainer

from ..cut.temporary_attributes import replaced


class MeanLosses(Trainer):
    """Some models divide their loss by `num_items_in_batch`, others ignore it; here none is told of it."""

    current_gradient_accumulation_steps: int
    _learned = False  # whether this micro-batch has a loss that is weighed by its share
    _scales_own_loss: bool | None = None  # what a custom trainer has set loss_is_scaled_for_ga to

    def _mean_loss(self, *given: Any) -> Any:
        """The host's loss, the mean over a micro-batch."""
        with replaced(self, "model_accepts_loss_kwargs", False):
            return super().compute_loss(*given)

    def _as_the_host_divides(self, loss: Any) -> Any:
        """A loss that is weighed; where the class of a custom trainer says it is not, the host divides it again."""
        self._learned = True
        return loss * self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga is False else loss

    @property
    def loss_is_scaled_for_ga(self):
        """A loss that is weighed by its share of the step is; that of a custom trainer is left to the host."""
        return self._learned or self._scales_own_loss

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value):
        self._scales_own_loss = value
