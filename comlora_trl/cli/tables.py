"""`comlora-tables`: prints the paper's Tables 2 to 10 with the figures that lm_eval measured beside the paper's."""

import argparse
import sys
from pathlib import Path

from comlora_trl.evaluation.results import paper
from comlora_trl.evaluation.scores import put_on_card
from comlora_trl.evaluation.tables import MEASURED, build_tables, read_runs
from comlora_trl.evaluation.tables_render import FORMATS

_DESCRIPTION = """\
Prints the paper's Table 2 (MMLU), 3 (commonsense), 4 (CONVAI2) or an ablation (5 to 10) from lm_eval's result files:
under each method of the paper its figures (LLaMA-3-8B, means of 5 seeds) and the measured ones,
mean ± standard deviation over seeds, the best of each column bold and the second underlined."""

_EPILOG = """\
Rows:
  The method is NAME where it is given. Else the adapter tells, if its folder is still there: rank from
  adapter_config.json, K from competition.json ("ComLoRA K=2 r=8", "LoRA r=8"). Else it is the model's name.
  A method called as the paper calls it stands beside the paper's row; others follow below.
  An adapter is known by the hash of its weights. Adapters of one method that were trained and measured in the same
  way but for the seed make one row; every other difference (prompt, decoding, chat template, rows, data, base,
  settings, BERTScore's model) keeps rows apart and is named below the table, as is which adapters a row is of.
  Result files of one adapter are put together; the newer one counts where two measured the same in the same way.

Cells and notes:
  A cell that was not measured is "–". The average of Table 3 is that of all eight tasks, else "–".
  Differences from the paper's conditions (--limit, part of the data, another prompt, beams, sampling, a chat
  template, another BERTScore model than roberta-large) are named below the table.

Examples:
  lm_eval --model hf --model_args peft=seed1/winner/ --tasks comlora_commonsense --output_path results/
  comlora-tables results/
  comlora-tables results/ --table 3 --format latex --output table3.tex
  comlora-tables results/ --card winner/
  comlora-tables "ComLoRA K=2 r=8=runs/*/results" "LoRA r=8=lora/results" "mine=other/results"
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "comlora-tables",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results",
        nargs="*",
        default=["."],
        metavar="RESULTS",
        help="a result file of lm_eval, a folder searched for them (what --output_path named) or a quoted pattern; "
        "NAME=RESULTS names the method (default: the current folder)",
    )
    parser.add_argument(
        "--card",
        metavar="ADAPTER",
        help="instead of tables: write the results of this adapter's weights on its card, ADAPTER/README.md",
    )
    parser.add_argument(
        "--table",
        choices=[*paper()["tables"], "all"],
        default="all",
        help="which table (default: all three of the results: 2, 3 and 4; 5 to 10 are the ablations)",
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="markdown",
        help="markdown (default), latex (for the booktabs package) or csv (one unrounded figure a line)",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write to FILE (replaced) instead of the screen")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command `comlora-tables`.

    Returns:
        0, or 1 after one line on stderr if the results can't be read.
    """
    options = _parser().parse_args(arguments)
    numbers = list(MEASURED) if options.table == "all" else [options.table]
    try:
        if options.card:
            path, scores = put_on_card(options.card, options.results)
            for score in scores:
                said = ", ".join(f"{name} {value:.2f}" for name, value in score.metrics.items())
                print(f"{path}: {score.task} {said} ({score.conditions})")
            return 0
        tables = build_tables(read_runs(options.results), numbers)
        text = FORMATS[options.format](tables)
        if options.output:
            options.output.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"comlora-tables: {error}", file=sys.stderr)
        return 1
    if not options.output:
        sys.stdout.write(text)
    if options.format == "csv":
        for table in tables:
            for note in table.notes:
                print(f"Table {table.number}: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
