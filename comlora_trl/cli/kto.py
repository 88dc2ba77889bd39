"""Train K competing LoRA branches with KTO and export the winner as an ordinary PEFT adapter.

With the embedded model and preferences (small, offline):

    comlora-kto

With your own model and data. Every flag of TRL's kto.py works:

    comlora-kto --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_preferences.json \\
        --comlora_tournament true --lora_r 16

--dataset_name takes demo, a hub id, or a local JSON file with the columns prompt, completion and label. The winner is
exported to ./winner.
"""

from comlora_trl import ComLoRAKTOConfig, ComLoRAKTOTrainer
from comlora_trl.cli.preferences import run
from comlora_trl.cli.script_config import script_config

ComLoRAKTOScriptConfig = script_config(ComLoRAKTOConfig, __name__)


def main(argv: list[str] | None = None) -> None:
    """Runs the command `comlora-kto` with the flags in `argv`, or with the process's arguments if it is None."""
    run("kto", ComLoRAKTOTrainer, ComLoRAKTOScriptConfig, __doc__, argv)


if __name__ == "__main__":
    main()
