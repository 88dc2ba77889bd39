"""When the competition acts within TRL's training loop, by the Trainer's own callbacks."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

if TYPE_CHECKING:
    from comlora_trl.training.trainer import ComLoRASFTTrainer


class CompetitionFlow(TrainerCallback):
    """Begins a competition with each training, selects where it evaluates and at its end, and exports the winner.

    It comes right after the Trainer's own flow control, so that a selection precedes the evaluation and the checkpoint
    of its step, and the winner is out before any other callback ends the run, or fails.
    """

    def __init__(self, trainer: "ComLoRASFTTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.begin_competition()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.note_rates()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        known = self.trainer.comlora_model.competition_state.selection
        self.trainer.reach_rung()
        self._select(state, control, known)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._select(state, control, self.trainer.comlora_model.competition_state.selection)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.finish_competition()

    def _select(self, state: TrainerState, control: TrainerControl, known: Any) -> None:
        last = state.global_step >= state.max_steps or control.should_training_stop
        if self.trainer.can_select and (control.should_evaluate or last):
            self.trainer.select()
        new = self.trainer.comlora_model.competition_state.selection is not known
        if new and not control.should_evaluate:
            # A log of a later step would bear that step's number
            (self.trainer.log_selection_next if control.should_log else self.trainer.log_selection)()
