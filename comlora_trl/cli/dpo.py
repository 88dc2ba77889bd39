"""Train K competing LoRA branches with DPO and export the winner as an ordinary PEFT adapter.

With the embedded model and preferences (small, offline):

    comlora-dpo

With your own model and data. Every flag of TRL's dpo.py works:

    comlora-dpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_preferences.json \\
        --comlora_tournament true --lora_r 16

--dataset_name takes demo, a hub id, or a local JSON file with the columns prompt, chosen and rejected. The winner is
exported to ./winner.
"""

from comlora_trl import ComLoRADPOConfig, ComLoRADPOTrainer
from comlora_trl.cli.preferences import run
from comlora_trl.cli.script_config import script_config

ComLoRADPOScriptConfig = script_config(ComLoRADPOConfig, __name__)


def main(argv: list[str] | None = None) -> None:
    """Runs the command `comlora-dpo` with the flags in `argv`, or with the process's arguments if it is None."""
    run("dpo", ComLoRADPOTrainer, ComLoRADPOScriptConfig, __doc__, argv)


if __name__ == "__main__":
    main()
