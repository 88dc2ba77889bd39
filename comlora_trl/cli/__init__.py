"""The installed commands: comlora-sft, -dpo, -kto, -reward, -export, -eval, -tables and -plot."""
