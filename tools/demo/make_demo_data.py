"""Write the demo data set: eight small rule-generated tasks in the formats of the eight commonsense tasks.

Every row has the fields of the LLM-Adapters files (instruction, input, output, answer) plus `task`. Three of five
questions ask for one fact that the base model knows (a robin is a bird, a kettle boils water, ...), the others for
more (`demo_world.py`). Validation and test rows are of the quarter of all questions that training never asks.

    python tools/demo/make_demo_data.py            # rewrites comlora_trl/demo/data/, byte for byte the same
    python tools/demo/make_demo_data.py --train 750 --test 250 --out large         # the same world, more rows
"""

import argparse
import json
import math
import random
from collections import Counter
from pathlib import Path

from demo_facts import DEMO, World, shuffled_world
from demo_world import DEPTHS, Generator, generators

DEPTH_WEIGHTS = (3, 1, 1)  # how often a question has depth 1, 2, 3


def draw_rows(
    maker: tuple[Generator, list[str]], count: int, held_out: bool, seen: set[str], rng: random.Random
) -> list[dict[str, str]]:
    """`count` rows of one task (its generator and facts), held out or not, with new instructions and balanced answers.

    Raises:
        ValueError: if there are not as many.
    """
    make, facts = maker
    rows: list[dict[str, str]] = []
    per_answer: Counter[str] = Counter()
    for _ in range(500 * count):
        item = make(rng.choice(facts), rng.choices(DEPTHS, DEPTH_WEIGHTS)[0], rng)
        row = item.row()
        new = item.held_out == held_out and row["instruction"] not in seen
        if new and per_answer[row["answer"]] < math.ceil(count / len(item.keywords)):
            seen.add(row["instruction"])
            per_answer[row["answer"]] += 1
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ValueError(f"{item.task}: only {len(rows)} of {count} distinct rows found; ask for fewer rows per task")


def make_splits(
    train: int, validation: int, test: int, seed: int, world: World = DEMO
) -> dict[str, list[dict[str, str]]]:
    """All three splits, the given number of rows per task; test keeps the tasks in order, the others are shuffled."""
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for task, maker in generators(world).items():
        rng, seen = random.Random(f"{seed} {task} rows"), set()
        splits["test"] += draw_rows(maker, test, True, seen, rng)
        splits["validation"] += draw_rows(maker, validation, True, seen, rng)
        splits["train"] += draw_rows(maker, train, False, seen, rng)
    for name in ("train", "validation"):
        random.Random(f"{seed} {name}").shuffle(splits[name])
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(__file__).resolve().parents[2] / "comlora_trl" / "demo" / "data"
    parser.add_argument(
        "--out", type=Path, default=default_out, help="folder to write to (default: the package's demo)"
    )
    parser.add_argument("--train", type=int, default=400, help="training rows per task (default %(default)s)")
    parser.add_argument("--validation", type=int, default=25, help="validation rows per task (default %(default)s)")
    parser.add_argument("--test", type=int, default=75, help="test rows per task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--world", type=int, help="seed of a world with other facts, which the base does not know")
    arguments = parser.parse_args()
    world = DEMO if arguments.world is None else shuffled_world(arguments.world)
    arguments.out.mkdir(parents=True, exist_ok=True)
    counts = (arguments.train, arguments.validation, arguments.test)
    for name, rows in make_splits(*counts, arguments.seed, world).items():
        path = arguments.out / f"{name}.json"
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
