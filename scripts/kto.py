"""`comlora-kto` from a checkout: see `comlora_trl/cli/kto.py`.

python scripts/kto.py
"""

from comlora_trl.cli.kto import main

if __name__ == "__main__":
    main()
