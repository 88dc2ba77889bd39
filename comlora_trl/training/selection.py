"""Selection: which branch leads, and which one leaves as the winner (eq. 11–12).

`evaluate()`, `predict()` and callbacks report and change nothing; what they measure is the leader. Only [`select`]
chooses, on the validation set, within the training loop.
"""

from pathlib import Path
from typing import Any

from transformers.trainer_utils import EvalLoopOutput

from comlora_trl.branches.model import branch_name
from comlora_trl.training.export import RETIRED, new_folder
from comlora_trl.training.optimizers import enter_evaluation_weights, evaluation_weights, has_evaluation_weights
from comlora_trl.training.report import competition_summary, print_table
from comlora_trl.training.sharding import reshard
from comlora_trl.training.validation import validate


class WinnerSelection:
    """Mixin before TRL's trainer: chooses among the branches and exports the one that wins."""

    _own_evaluation = False

    def select(self) -> dict[str, Any]:
        """Measures every living branch on the validation set and makes the best one the leader.

        Each example counts once, several sets add up. The result is keyed by the optimizer step: asked again at the
        same step, it is not measured again.

        Returns:
            the result, see [`ValidationTally.result`].

        Raises:
            RuntimeError: if there is no example, or every branch is disqualified.
        """
        model, state = self.comlora_model, self.comlora_model.competition_state
        if state.selection is None or state.selection["step"] != self.state.global_step:
            sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            with evaluation_weights(self.optimizer, self.model):
                tally = validate(self.model_wrapped, model, sets, self)
            state.selection = tally.result(state.alive, self.args.winner_by, self.state.global_step)
        self._follow_the_leader()
        return state.selection

    def determine_winner(self) -> int:
        """The branch that wins (eq. 11–12): the newest selection's, or that of one made now.

        Returns:
            the branch's index, which is also the model's active adapter.

        Raises:
            RuntimeError: if every branch is disqualified.
        """
        if self.comlora_model.competition_state.selection is None and self.can_select:
            self.select()
        self._follow_the_leader()
        return self.comlora_model.competition_state.leader

    def export_winner(self, path: str | Path | None = None) -> Path:
        """Exports the winner (determined first if need be) as an ordinary PEFT adapter, atomically.

        Args:
            path: the folder; `comlora_winner_dir` by default.

        Raises:
            FileExistsError: if the folder is not empty, `comlora_overwrite_winner` is False and it is not this
                trainer's own earlier export.
        """
        path = Path(path or self.args.winner_dir)
        self.export_branch(self.determine_winner(), path, self._may_overwrite(path))
        self._exported.add(path.absolute())
        return path

    def export_branch(self, branch: int, path: Path, overwrite: bool) -> None:
        """Exports a branch, see [`write_adapter`]; called by all processes."""
        with evaluation_weights(self.optimizer, self.model):
            snapshot = self.comlora_model.snapshot(branch, self.model_wrapped)
        if self.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(path, overwrite) as folder:
                self.write_adapter(branch, folder, path, snapshot)
        self.accelerator.wait_for_everyone()

    def competition_summary(self) -> dict[str, Any]:
        """The content of `competition.json`: the branches' figures and the history."""
        return competition_summary(self.comlora_model.competition_state, self.state.log_history)

    def finish_competition(self) -> None:
        """Chooses the winner, exports it, prints the table; at the end of training, before any callback's end."""
        enter_evaluation_weights(self.optimizer, self.model)  # the model that is left is the one that is exported
        if self.can_select and not self._decided:
            self.select()
        folder = self.export_winner()
        self.retired_files.wait()
        if self.is_world_process_zero():
            print_table(self.competition_summary())
        line = f"winner: {branch_name(self.determine_winner())} in {folder}"
        if self.comlora_model.competition_state.retired:
            line += f"; the retired branches are in {Path(self.args.output_dir) / RETIRED}"
        self.accelerator.print(line)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's; the loop's own evaluations follow a selection, those too that a user's callback asks for."""
        # The loop names no data, and then the sets of a dict by their keys
        self._own_evaluation = self.is_in_train and (eval_dataset is None or isinstance(eval_dataset, str))
        if self._own_evaluation and self.control.should_evaluate and self.can_select:
            self.select()
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._own_evaluation = False

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's, of the leader; the loop's own also has every branch's figures from its selection."""
        enter_evaluation_weights(self.optimizer, self.model)  # now, for the Trainer would after its cast
        parameters = self.comlora_model.trainable_parameters()
        values = [parameter.data for parameter in parameters]
        try:
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        finally:
            if has_evaluation_weights(self.optimizer):
                reshard(self.model)  # the next step's forward would take FSDP2's gathered copies for the iterate
            if self.args.bf16_full_eval or self.args.fp16_full_eval:
                # The Trainer casts the model for good; what is trained and exported keeps its own precision
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.data = value
        selection = self.comlora_model.competition_state.selection
        if self._own_evaluation and selection is not None and selection["step"] == self.state.global_step:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update(selection_metrics(selection, prefix))
        return output

    def log_selection_next(self) -> None:
        """The newest selection is logged after the step's own figures, and before the run's summary."""
        self._unlogged = True

    def log_selection(self) -> None:
        """Logs the newest selection, where no evaluation does."""
        self._unlogged = False
        training = self.model.training
        # What is logged in training mode ends the window of training's own figures. The loggers, TRL's and ours, read
        # the model's own mode; that of its thousands of modules stays
        self.model.training = False
        self.log(selection_metrics(self.comlora_model.competition_state.selection, "eval"))
        self.model.training = training

    @property
    def can_select(self) -> bool:
        return self.eval_dataset is not None

    def _may_overwrite(self, path: Path) -> bool:
        return self.args.comlora_overwrite_winner or path.absolute() in self._exported

    def _follow_the_leader(self) -> None:
        model, name = self.comlora_model, branch_name(self.comlora_model.competition_state.leader)
        if model.active_adapter != name:
            model.set_adapter(name)


def selection_metrics(selection: dict[str, Any], prefix: str) -> dict[str, float]:
    """A selection's figures as log entries `PREFIX_comlora/...`."""
    metrics = {}
    columns = {"loss": "validation_nll", "accuracy": "validation_accuracy", "score": "scores"}
    for entry, column in columns.items():
        for branch, value in enumerate(selection[column] or []):
            if value is not None:
                metrics[f"{prefix}_comlora/{entry}_{branch}"] = value
    return metrics | {f"{prefix}_comlora/winner": selection["winner"]}
