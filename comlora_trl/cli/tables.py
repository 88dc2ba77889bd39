"""`comlora-tables`: prints the paper's Tables 2 to 10 with lm_eval's results beside the paper's figures."""

import argparse
import sys
from pathlib import Path

from comlora_trl.evaluation.results import paper
from comlora_trl.evaluation.scores import put_on_card
from comlora_trl.evaluation.tables import MEASURED, build_tables, read_runs
from comlora_trl.evaluation.tables_render import FORMATS

_DESCRIPTION = """\
Prints the paper's Table 2 (MMLU), 3 (commonsense), 4 (CONVAI2) or an ablation (5 to 10) from lm_eval's result files.
Each method has the paper's figures (LLaMA-3-8B, means of 5 seeds) and below them the measured ones (mean ± standard
deviation over seeds). The best value of a column is bold and the second best underlined."""

_EPILOG = """\
Rows:
  The method's name is NAME if given. Otherwise it comes from the adapter's folder, if that still exists: the rank from
  adapter_config.json and K from competition.json ("ComLoRA K=2 r=8", "LoRA r=8"). Otherwise it is the model's name.
  A method with the same name as in the paper stands next to the paper's row. The others follow at the end.
  An adapter is identified by the hash of its weights. Adapters that differ only in the seed make one row. Adapters
  that differ in anything else (prompt, decoding, chat template, rows, data, base, settings, BERTScore's model) get
  separate rows. The notes below the table name the difference, and the adapters of each row.
  Several result files of one adapter are merged. If two of them measured the same thing, the newer one counts.

Cells and notes:
  "–" means not measured. Table 3 has an average only if all eight tasks were measured.
  The notes name every difference from the paper's conditions (--limit, part of the data, another prompt, beams,
  sampling, a chat template, another BERTScore model than roberta-large).

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
        help="a result file of lm_eval, a folder with result files (lm_eval's --output_path) or a quoted pattern; "
        "NAME=RESULTS names the method (default: the current folder)",
    )
    parser.add_argument(
        "--card",
        metavar="ADAPTER",
        help="print no table; write this adapter's results into its model card, ADAPTER/README.md",
    )
    parser.add_argument(
        "--table",
        choices=[*paper()["tables"], "all"],
        default="all",
        help="which table (default: all, which means the three tables of results 2, 3 and 4; 5 to 10 are ablations)",
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="markdown",
        help="markdown (default), latex (needs the booktabs package) or csv (one unrounded figure per line)",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="write to FILE, replacing it, and not to the screen"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command `comlora-tables` with the given arguments, or with the process's arguments if they are None.

    Returns:
        the exit status: 0, or 1 after a line on stderr if the results can't be read.
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
