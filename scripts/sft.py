"""`comlora-sft` from a checkout: see `comlora_trl/cli/sft.py`.

python scripts/sft.py --comlora_k 2
"""

from comlora_trl.cli.sft import main

if __name__ == "__main__":
    main()
