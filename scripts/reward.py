"""`comlora-reward` from a checkout: see `comlora_trl/cli/reward.py`.

python scripts/reward.py
"""

from comlora_trl.cli.reward import main

if __name__ == "__main__":
    main()
