"""`comlora-dpo` from a checkout: see `comlora_trl/cli/dpo.py`.

python scripts/dpo.py
"""

from comlora_trl.cli.dpo import main

if __name__ == "__main__":
    main()
