"""Where the Trainer saves or pushes "the model": the winner, as an ordinary adapter with its record and its card.

Checkpoints hold every branch, and at their root the leader, which is what the Trainer pushes in training; `save_model`
and `push_to_hub` give the winner alone.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_config_model_id

from comlora_trl.branches.model import branch_name
from comlora_trl.training.export import save_branch
from comlora_trl.training.model import BranchSnapshot
from comlora_trl.training.optimizers import enter_evaluation_weights, evaluation_weights
from comlora_trl.training.sharding import state_to_save
from comlora_trl.winner.card import CARD_FILE, card
from comlora_trl.winner.files import (
    LM_EVAL_FILE,
    settings_of,
    training_record,
    write_training_record,
    write_winner_files,
)
from comlora_trl.winner.folder import Adapter


class WinnerPublishing:
    """Mixin before TRL's trainer: see the module's text.

    Attributes:
        data_name: what is trained on, a preset's name, a hub id or a path, for the winner's record and card; a
            data set does not know. Set it before [`train`].
    """

    data_name: str | None = None

    def training_record(self) -> dict[str, Any]:
        """The content of `training.json`: base, prompt template, data, settings, seed, versions."""
        model = self.comlora_model
        return training_record(
            base=get_config_model_id(model.config),
            base_revision=model.peft_config[model.active_adapter].revision,
            prompt_template=self.args.comlora_prompt,
            data=self.data_name,
            settings=settings_of(self.args) | self.trained_settings(),
            seed=self.args.seed,
        )

    def write_adapter(self, branch: int, folder: Path, target: Path, snapshot: BranchSnapshot) -> None:
        """Writes a branch as an ordinary adapter, with all that an exported one carries.

        Args:
            folder: where it is written, which exists.
            target: where it will be.
            snapshot: the branch as it is now.
        """
        summary = self.competition_summary() | {"exported_branch": branch}
        save_branch(snapshot, folder, summary, self.processing_class)
        write_winner_files(folder, target=target, record=self.training_record())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the winner as an ordinary adapter; within a checkpoint, which the Trainer makes, every branch."""
        if _internal_call and output_dir is not None:
            self.retired_files.wait()
            enter_evaluation_weights(self.optimizer, self.model)
            self._save(output_dir, state_dict=state_to_save(self.comlora_model, self.model_wrapped))
            if self.args.should_save:
                write_training_record(output_dir, self.training_record())
            return
        self._save_winner(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_winner(self, folder: Path) -> None:
        winner = self.determine_winner()
        with evaluation_weights(self.optimizer, self.model):
            snapshot = self.comlora_model.snapshot(winner, self.model_wrapped)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.write_adapter(winner, folder, folder, snapshot)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        self.accelerator.wait_for_everyone()

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Pushes the winner as the repository's root adapter, with its model card.

        Args:
            kwargs: as for [`create_model_card`].

        Returns:
            the commit, or its future if not `blocking`; None on processes other than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._save_winner(Path(self.args.output_dir))
        if not self.is_world_process_zero():
            return None
        name = kwargs.pop("model_name", None) or self.hub_model_id.split("/")[-1]
        self.create_model_card(model_name=name, **kwargs)
        self._finish_current_push()
        return HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            ignore_patterns=["_*", LM_EVAL_FILE, f"{PREFIX_CHECKPOINT_DIR}-*", *self._inside_output()],
            revision=revision or self.args.hub_revision,
        )

    def _inside_output(self) -> list[str]:
        """Patterns of the exported winner's files where they lie below `output_dir`: the root holds them already."""
        winner, output = Path(self.args.winner_dir).absolute(), Path(self.args.output_dir).absolute()
        return [f"{winner.relative_to(output).as_posix()}/*"] if output in winner.parents else []

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the leader's card and its record into `output_dir`, which the Trainer pushes.

        Args:
            model_name: the card's title; the method's name by default.
            dataset_name: the training data's name, [`data_name`] from now on.
            tags: further tags on the hub.
        """
        self.data_name = dataset_name or self.data_name
        if not self.is_world_process_zero():
            return
        model, folder = self.comlora_model, Path(self.args.output_dir)
        config = model.peft_config[branch_name(model.competition_state.leader)].to_dict()
        chats = getattr(self.processing_class, "chat_template", None) is not None
        leader = Adapter(config, self.training_record(), self.competition_summary(), chats)
        place = self.hub_model_id or folder.absolute().name
        tags = {tags} if isinstance(tags, str) else tags or ()
        (folder / CARD_FILE).write_text(card(leader, place, title=model_name, tags=tags), encoding="utf-8")
        write_training_record(folder, leader.record)
