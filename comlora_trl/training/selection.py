"""The validation half of the trainer: every branch's NLL and score, the winner, and its export."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from comlora_trl.competition import ValidationTally
from comlora_trl.training.export import new_folder, save_branch
from comlora_trl.training.model import CompetitionOutput
from comlora_trl.training.report import competition_summary


class WinnerSelection:
    """Mixin before TRL's trainer: evaluates all branches at once and exports the one that wins (eq. 11–12)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tally = ValidationTally(self.args.comlora_k)
        self._tallies: list[ValidationTally] = []

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's evaluation, with every branch's validation NLL and score, and the winner so far."""
        self._tally = ValidationTally(self._settings.k)
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        self._tallies.append(self._tally)
        result = self._result(self._tally)
        self.comlora_model.competition_state.last_evaluation = result
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = result["eval_loss"]
        for branch in range(self._settings.k):
            output.metrics[f"{prefix}_comlora/loss_{branch}"] = result["validation_nll"][branch]
            if result["scores"] is not None:
                output.metrics[f"{prefix}_comlora/score_{branch}"] = result["scores"][branch]
        output.metrics[f"{prefix}_comlora/winner"] = result["winner"]
        return output

    def _add_to_tally(self, output: CompetitionOutput, rows_per_example: Tensor | None, examples: int) -> None:
        example = None
        if rows_per_example is not None:
            known = torch.arange(examples, device=rows_per_example.device).repeat_interleave(rows_per_example)
            example = known.new_full((output.tokens.numel(),), examples)
            example[: known.numel()] = known
        lines = self._tally.columns(output.nll, output.tokens, output.scores, example, examples)
        self._tally.add(self.accelerator.gather_for_metrics(lines))

    def _result(self, tally: ValidationTally) -> dict[str, Any]:
        by_selector = self.args.comlora_winner_by == "selector" and self.args.comlora_selector
        alive = self.comlora_model.alive(torch.device("cpu"))
        return tally.result(alive, by_selector, self.state.global_step)

    def determine_winner(self) -> int:
        """Chooses the winner on the validation set (eq. 11–12), each example counted once; several sets add up.

        Returns:
            the branch's index, which also becomes the model's active adapter.

        Raises:
            RuntimeError: if every branch is disqualified.
        """
        state = self.comlora_model.competition_state
        last = state.last_evaluation
        fresh = last is not None and last["step"] == self.state.global_step
        if not fresh or isinstance(self.eval_dataset, dict) or self.args.load_best_model_at_end:
            self._tallies = []
            self.evaluate()
            total = self._tallies[0]
            for tally in self._tallies[1:]:
                total = total + tally
            state.last_evaluation = self._result(total)
        self.comlora_model.set_adapter(f"branch_{self._winner}")
        return self._winner

    @property
    def _winner(self) -> int:
        return self.comlora_model.competition_state.last_evaluation["winner"]

    def _summary(self) -> dict[str, Any]:
        return competition_summary(self.comlora_model.competition_state, self.state.log_history)

    def export_winner(self, path: str | Path | None = None) -> Path:
        """Exports the winner (determined first if need be) as an ordinary PEFT adapter, atomically.

        Args:
            path: the folder; `comlora_winner_dir` by default.

        Raises:
            FileExistsError: if the folder is not empty and `comlora_overwrite_winner` is False.
        """
        path = Path(path or self.args.winner_dir)
        if self.comlora_model.competition_state.last_evaluation is None:
            self.determine_winner()
        sharded = self.is_fsdp_enabled or (
            self.is_deepspeed_enabled and self.accelerator.deepspeed_config["zero_optimization"]["stage"] == 3
        )
        state_dict = self.accelerator.get_state_dict(self.model_wrapped) if sharded else None
        if self.args.should_save:
            self.create_model_card(model_name=path.name)
            with new_folder(path, self.args.comlora_overwrite_winner) as folder:
                save_branch(
                    self.comlora_model, self._winner, folder, self._summary(), self.processing_class, state_dict
                )
                (folder / "README.md").write_bytes((Path(self.args.output_dir) / "README.md").read_bytes())
        self.accelerator.wait_for_everyone()
        return path
