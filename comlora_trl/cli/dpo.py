"""Train a competition of K LoRA branches by DPO; the winner leaves as an ordinary PEFT adapter.

The embedded default (a small model and preferences, offline):

    comlora-dpo

A model and data of your own; every flag of TRL's own dpo.py works:

    comlora-dpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_preferences.json \\
        --comlora_tournament true --lora_r 16

--dataset_name takes demo, a hub id, or a local JSON file with prompt, chosen and rejected. The winner is left
in ./winner.
"""

from comlora_trl import ComLoRADPOConfig, ComLoRADPOTrainer
from comlora_trl.cli.preferences import run
from comlora_trl.cli.script_config import script_config

ComLoRADPOScriptConfig = script_config(ComLoRADPOConfig, __name__)


def main(argv: list[str] | None = None) -> None:
    """The command `comlora-dpo`. Without `argv`, the process's arguments."""
    run("dpo", ComLoRADPOTrainer, ComLoRADPOScriptConfig, __doc__, argv)


if __name__ == "__main__":
    main()
