"""`comlora-plot`: draws the competition of a winner."""

import argparse
import sys

from comlora_trl.plots import FIGURES, draw


def main(argv: list[str] | None = None) -> None:
    """Runs the command `comlora-plot` with the flags in `argv`, or with the process's arguments if it is None."""
    parser = argparse.ArgumentParser(prog="comlora-plot", description="Draws the competition of a winner.")
    parser.add_argument("folder", help="the winner's folder")
    parser.add_argument(
        "--output",
        help="file to write, .png, .svg or .pdf (default: in the folder, competition.png for losses, else FIGURE.png)",
    )
    help_text = (
        "losses (default): the branches' validation losses and the rungs; wins: share of the training steps that each "
        "branch won (the paper's Figure 2); scores: the selector's scores against the validation loss (Figure 3)"
    )
    parser.add_argument("--figure", choices=list(FIGURES), default="losses", help=help_text)
    args = parser.parse_args(argv)
    try:
        print(draw(args.folder, args.output, args.figure))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
