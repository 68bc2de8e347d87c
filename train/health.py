"""Health of a run: whether its losses, gradients and weights are as they should be, and when it has diverged."""

import math
from collections.abc import Callable, Iterable

import torch

from parallel.engine import StepResult

DIVERGED = 3
"""The exit code of a run that has diverged."""
NOT_FINITE = "the weights are not finite"


class Health:
    """Judges the steps of a run. It is told the same on every rank, and so says the same on every rank.

    Attributes:
        in_a_row: the number of steps up to the last that were skipped, as not finite or as spikes.
        last_sound: the last step before those, or the one that a run was resumed at.

    Args:
        steps_before: taken before the run was resumed.
        max_skipped: so many in a row are a divergence (`train.max_skipped`); None sets no limit.
        weights_are_finite: tells whether the weights of all ranks are; all ranks call it together.
        validation_loss: measures it; all ranks call it together. None where nothing is held out.
    """

    def __init__(
        self,
        steps_before: int,
        max_skipped: int | None,
        weights_are_finite: Callable[[], bool],
        validation_loss: Callable[[], float | None],
    ):
        self.in_a_row, self.last_sound = 0, steps_before
        self._max_skipped, self._losses_in_a_row, self._nonfinite_in_a_row = max_skipped, 0, 0
        self._weights_are_finite, self._validation_loss = weights_are_finite, validation_loss

    def diverged(self, step: int, result: StepResult, val_loss: float | None, last: bool) -> str | None:
        """Judge a step: say, in a clause, why the run has diverged; None where it has not.

        Args:
            step: its number.
            result: of the engine.
            val_loss: the validation loss after it, where one was measured.
            last: whether the run is over with it.
        """
        loss_is_finite = math.isfinite(result.loss)
        if loss_is_finite and not result.skipped:
            self.in_a_row, self._losses_in_a_row, self._nonfinite_in_a_row, self.last_sound = 0, 0, 0, step
            if not last:
                return None
            # No loss follows that would tell what the last update has made of the weights.
            if not self._weights_are_finite():
                return NOT_FINITE
            unsound = val_loss is not None and not math.isfinite(val_loss)
            return f"the validation loss after the last step is {val_loss}" if unsound else None
        self.in_a_row += 1
        self._losses_in_a_row += not loss_is_finite
        self._nonfinite_in_a_row += not (loss_is_finite and math.isfinite(result.grad_norm))
        # Skipped updates leave weights as they are: one look at them is enough.
        if self.in_a_row == 1 and not self._weights_are_finite():
            return NOT_FINITE
        if self._max_skipped is not None and self.in_a_row >= self._max_skipped:
            spikes = self.in_a_row - self._nonfinite_in_a_row
            why = f"{spikes} as spikes (train.spike_sigmas)" if spikes else "as not finite"
            why += ", the others as not finite" if spikes and self._nonfinite_in_a_row else ""
            return f"{self.in_a_row} steps in a row were skipped, {why}; so many are train.max_skipped"
        if last and not loss_is_finite and not (val_loss is not None and math.isfinite(val_loss)):
            return f"the loss of the last step is {result.loss}"
        return None

    def weights_are_lost(self) -> bool:
        """Tell whether the weights of a diverged run are worth nothing, finite or not. All ranks call it together.

        They are where no loss since the last update was finite, that over the held-out sequences included; else it is
        updates alone that were skipped.
        """
        if self._losses_in_a_row < self.in_a_row:
            return False
        val_loss = self._validation_loss()
        return val_loss is None or not math.isfinite(val_loss)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Tell whether all elements of some tensors are finite; the host waits for the device once."""
    extremes = [torch.stack(one.aminmax()) for one in tensors if one.numel()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())
