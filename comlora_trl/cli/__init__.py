"""The commands that an installation brings: comlora-sft, -export, -eval, -tables and -plot."""
