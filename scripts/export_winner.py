"""`comlora-export` from a checkout: see `comlora_trl/cli/export.py`.

python scripts/export_winner.py comlora-output/checkpoint-500
"""

from comlora_trl.cli.export import main

if __name__ == "__main__":
    main()
