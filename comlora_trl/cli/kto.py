"""Train a competition of K LoRA branches by KTO; the winner leaves as an ordinary PEFT adapter.

The embedded default (a small model and preferences, offline):

    comlora-kto

A model and data of your own; every flag of TRL's own kto.py works:

    comlora-kto --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_preferences.json \\
        --comlora_tournament true --lora_r 16

--dataset_name takes demo, a hub id, or a local JSON file with prompt, completion and label. The winner is left
in ./winner.
"""

from comlora_trl import ComLoRAKTOConfig, ComLoRAKTOTrainer
from comlora_trl.cli.preferences import run
from comlora_trl.cli.script_config import script_config

ComLoRAKTOScriptConfig = script_config(ComLoRAKTOConfig, __name__)


def main(argv: list[str] | None = None) -> None:
    """The command `comlora-kto`. Without `argv`, the process's arguments."""
    run("kto", ComLoRAKTOTrainer, ComLoRAKTOScriptConfig, __doc__, argv)


if __name__ == "__main__":
    main()
