"""Where the Trainer saves or pushes "the model": the winner, as an ordinary adapter, and a card that works.

Checkpoints hold every branch, and at their root the leader, which is what the Trainer pushes in training; `save_model`
and `push_to_hub` give the winner alone.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_config_model_id

from comlora_trl.training.export import save_branch
from comlora_trl.training.sharding import state_to_save


class WinnerPublishing:
    """Mixin before TRL's trainer: see the module's text."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the winner as an ordinary adapter; for a checkpoint, which the Trainer makes, every branch."""
        if _internal_call and output_dir is not None:
            # Whole weights, whatever the base is sharded by
            self._save(output_dir, state_dict=state_to_save(self.comlora_model, self.model_wrapped))
            return
        self._save_winner(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_winner(self, folder: Path) -> None:
        winner, state_dict = self.determine_winner(), state_to_save(self.comlora_model, self.model_wrapped)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            summary = self.competition_summary()
            save_branch(self.comlora_model, winner, folder, summary, state_dict, self.processing_class)
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
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", *self._inside_output()],
            revision=revision or self.args.hub_revision,
        )

    def _inside_output(self) -> list[str]:
        """Patterns of the exported winner's files where they lie below `output_dir`: the root holds them already."""
        winner, output = Path(self.args.winner_dir).absolute(), Path(self.args.output_dir).absolute()
        return [f"{winner.relative_to(output).as_posix()}/*"] if output in winner.parents else []

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's card, for an adapter: with the base named where it is a folder, and a quick start that runs."""
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        card = ModelCard.load(path)
        card.data.library_name = "peft"
        base = get_config_model_id(self.comlora_model.config)
        if not base or os.path.isdir(base):
            named = f"the model in the folder `{base}`" if base else "a model without a name"
            card.text = re.sub(r"\[None\]\(\S*\)", lambda _: named, card.text)
        quick_start = _quick_start(self.hub_model_id or str(Path(self.args.winner_dir).absolute()), base, self._chats)
        card.text = re.sub(r"```python\n.*?```", lambda _: quick_start, card.text, count=1, flags=re.DOTALL)
        card.save(path)

    @property
    def _chats(self) -> bool:
        return getattr(self.processing_class, "chat_template", None) is not None


def _quick_start(adapter: str, base: str, chats: bool) -> str:
    loading = 'AutoPeftModelForCausalLM.from_pretrained("ADAPTER")'
    if not base:
        loading = 'PeftModel.from_pretrained(base_model, "ADAPTER")  # the base model it was trained on'
    question = "If you had a time machine, would you go to the past or to the future?"
    asking = f'tokenizer("{question}", return_tensors="pt")'
    if chats:
        asking = 'tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")'
    lines = [
        f"from peft import {loading.split('.')[0]}",
        "from transformers import AutoTokenizer",
        "",
        f"model = {loading}",
        'tokenizer = AutoTokenizer.from_pretrained("ADAPTER")',
        *([f'messages = [{{"role": "user", "content": "{question}"}}]'] if chats else []),
        f"inputs = {asking}",
        'output = model.generate(inputs["input_ids"], max_new_tokens=128)',
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ]
    return "\n".join(["```python", *lines, "```"]).replace("ADAPTER", adapter)
