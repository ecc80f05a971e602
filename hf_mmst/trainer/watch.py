"""How a custom trainer runs the model in a training step -> an error, where stages would learn otherwise than said."""

import contextlib

import torch

from ..method.engine import Stagewise


class Watch:
    """
    Watches the steps in which stages learn from losses of their own: they do so within `compute_loss` alone.

    Args:
        owner (`str`): the class of the trainer, for messages.
    """

    def __init__(self, owner: str):
        self._owner = owner
        self._hooks = contextlib.ExitStack()
        self._awaited = False  # whether a loss is still to be stepped back through

    def begin(self, engine: Stagewise) -> None:
        """Begin an optimizer step; the one before may have been broken off."""
        self.end()
        self._awaited = False
        self._hooks.enter_context(engine.alone(self._refuse_past))

    def end(self) -> None:
        """End the step."""
        self._hooks.close()

    def learn(self, stepped: bool) -> None:
        """
        Stages are about to learn; `stepped` says whether some have stepped already since [`begin`].

        Raises:
            `ValueError`: if they cannot once more.
        """
        if self._awaited:
            raise ValueError(
                f"{self._owner} calls compute_loss of MMSTTrainer again before the first loss is stepped back through: "
                "the stages before the last have learned from it already, and would learn twice for once of the last. "
                "Call it once for each backward pass, or set num_stages=1 to train end to end."
            )
        if stepped:
            raise ValueError(
                f"{self._owner} calls compute_loss of MMSTTrainer again in a step in which stages have stepped, each "
                "right after its backward. Set stage_clipping=False, and max_grad_norm above 0, so that all step at "
                "the end."
            )

    def awaits(self, loss: torch.Tensor) -> None:
        """The loss of the last stage that learns is handed out."""
        if loss.requires_grad:
            self._awaited = True
            loss.register_hook(self._arrived)

    def _arrived(self, _gradient: torch.Tensor) -> None:
        self._awaited = False

    def _refuse_past(self) -> None:
        raise ValueError(
            f"{self._owner} runs the model by itself in a training step, not through compute_loss of MMSTTrainer: it "
            "would learn end to end, past its stages. Pass the loss as compute_loss_func, which gets the logits of "
            "every stage; or add to what super().compute_loss returns; or call super().training_step once more; or "
            "run the model within torch.no_grad(), if it is not to learn; or set num_stages=1 to train end to end."
        )
