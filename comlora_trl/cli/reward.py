"""Train K competing LoRA branches as reward models and export the winner as an ordinary PEFT adapter.

With the embedded model and preferences (small, offline):

    comlora-reward

With your own model and data. Every flag of TRL's reward.py works:

    comlora-reward --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_preferences.json \\
        --comlora_tournament true --lora_r 16

--dataset_name takes demo, a hub id, or a local JSON file with the columns chosen and rejected. The winner is exported
to ./winner.
"""

from comlora_trl import ComLoRARewardConfig, ComLoRARewardTrainer
from comlora_trl.cli.preferences import run
from comlora_trl.cli.script_config import script_config

ComLoRARewardScriptConfig = script_config(ComLoRARewardConfig, __name__)


def main(argv: list[str] | None = None) -> None:
    """Runs the command `comlora-reward` with the flags in `argv`, or with the process's arguments if it is None."""
    run("reward", ComLoRARewardTrainer, ComLoRARewardScriptConfig, __doc__, argv)


if __name__ == "__main__":
    main()
