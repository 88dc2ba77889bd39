"""Train a competition of K LoRA branches as reward models; the winner leaves as an ordinary PEFT adapter.

The embedded default (a small model and preferences, offline):

    comlora-reward

A model and data of your own; every flag of TRL's own reward.py works:

    comlora-reward --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_preferences.json \\
        --comlora_tournament true --lora_r 16

--dataset_name takes demo, a hub id, or a local JSON file with chosen and rejected. The winner is left
in ./winner.
"""

from comlora_trl import ComLoRARewardConfig, ComLoRARewardTrainer
from comlora_trl.cli.preferences import run
from comlora_trl.cli.script_config import script_config

ComLoRARewardScriptConfig = script_config(ComLoRARewardConfig, __name__)


def main(argv: list[str] | None = None) -> None:
    """The command `comlora-reward`. Without `argv`, the process's arguments."""
    run("reward", ComLoRARewardTrainer, ComLoRARewardScriptConfig, __doc__, argv)


if __name__ == "__main__":
    main()
