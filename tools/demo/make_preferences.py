"""Write the demo's preferences: of two answers to a question, the right one is chosen and a wrong one rejected.

The questions are the demo data's own; those of validation are of the quarter that training never asks.

    python tools/demo/make_preferences.py            # rewrites comlora_trl/demo/preferences/, byte for byte the same
"""

import argparse
import json
import random
from pathlib import Path

from comlora_trl.data.keywords import COMMONSENSE_TASKS
from comlora_trl.demo import demo_data_path


def preferences(split: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` questions of each task of a split, in the split's order, each with a right and a wrong answer."""
    rng = random.Random(f"{seed} {split} preferences")
    rows, taken = [], dict.fromkeys(COMMONSENSE_TASKS, 0)
    for row in json.loads(demo_data_path(split).read_text(encoding="utf-8")):
        task, answer = row["task"], row["answer"]
        offered = row["instruction"].rpartition("Answer format: ")[2].split("/")
        wrong = [keyword for keyword in offered if keyword != answer]
        if taken[task] == count:
            continue
        taken[task] += 1
        rejected = row["output"].replace(answer, rng.choice(wrong))
        rows.append({"instruction": row["instruction"], "chosen": row["output"], "rejected": rejected})
    assert all(number == count for number in taken.values()), taken
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(__file__).resolve().parents[2] / "comlora_trl" / "demo" / "preferences"
    parser.add_argument(
        "--out", type=Path, default=default_out, help="folder to write to (default: the package's demo)"
    )
    parser.add_argument("--train", type=int, default=100, help="training pairs per task (default %(default)s)")
    parser.add_argument("--validation", type=int, default=20, help="validation pairs per task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        rows = preferences(split, getattr(arguments, split), arguments.seed)
        path = arguments.out / f"{split}.json"
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {len(rows)} pairs, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
