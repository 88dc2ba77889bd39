"""`comlora-plot`: draws the competition that a winner comes from."""

import argparse
import sys

from comlora_trl.plots import FIGURES, draw


def main(argv: list[str] | None = None) -> None:
    """The command `comlora-plot`."""
    parser = argparse.ArgumentParser(
        prog="comlora-plot", description="Draws the competition that a winner comes from."
    )
    parser.add_argument("folder", help="the winner's folder")
    parser.add_argument(
        "--output",
        help="picture to write, .png, .svg or .pdf (default: competition.png in the folder, FIGURE.png of the others)",
    )
    help_text = (
        "losses (default): the branches' validation losses and the rungs; wins: share of the training steps won (the "
        "paper's Figure 2); scores: the selector's score against the validation loss (its Figure 3)"
    )
    parser.add_argument("--figure", choices=list(FIGURES), default="losses", help=help_text)
    args = parser.parse_args(argv)
    try:
        print(draw(args.folder, args.output, args.figure))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
