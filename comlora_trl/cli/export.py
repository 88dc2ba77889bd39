"""Export a branch from a checkpoint of a ComLoRA run as an ordinary PEFT adapter.

    comlora-export comlora-output/checkpoint-500                    # the winner so far, to ./winner
    comlora-export comlora-output/checkpoint-500 --branch 1 --output branch-1
    comlora-export comlora-output/checkpoint-500 --branch all --output branches

No model is loaded. With --branch all, each branch is exported to a folder below --output.
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Runs the command `comlora-export` with the flags in `argv`, or with the process's arguments if it is None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint-N folder")
    parser.add_argument("--branch", default="winner", help="winner (default), all, or a branch's number 0..K-1")
    parser.add_argument("--output", default="winner", help="folder to export to (default: winner)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists and is not empty")
    args = parser.parse_args(argv)
    from comlora_trl.training.export import export_checkpoint  # takes seconds, which --help does not need

    try:
        for branch, target in exports(args.checkpoint, args.branch, Path(args.output)):
            branch = export_checkpoint(args.checkpoint, branch, target, args.overwrite)
            print(f"branch_{branch} exported to {target}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def exports(checkpoint: str, branch: str, output: Path) -> list[tuple[int | None, Path]]:
    """The branches to export and their target folders, from the flags. The branch None means the winner.

    Raises:
        ValueError: if `branch` is not "winner", "all" or a number.
    """
    from comlora_trl.branches.model import branch_name
    from comlora_trl.training.checkpoints import load_state

    if branch == "winner":
        return [(None, output)]
    if branch == "all":
        return [(k, output / branch_name(k)) for k in range(load_state(checkpoint).k)]
    if not branch.isdigit():
        raise ValueError(f"--branch {branch} is not possible: give winner, all, or a number 0..K-1.")
    return [(int(branch), output)]


if __name__ == "__main__":
    main()
