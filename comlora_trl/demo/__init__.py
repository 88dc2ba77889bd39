"""The embedded default: a small pretrained model, a data set in the eight commonsense formats, and their recipe.

`scripts/make_demo_data.py` writes the data and `scripts/pretrain_demo.py` the model. Nothing here imports torch.
"""

from pathlib import Path

DEMO_SPLITS = ("train", "validation", "test")
_FOLDER = Path(__file__).resolve().parent


def demo_model_path() -> Path:
    """Folder of the base model and its tokenizer, as `from_pretrained` takes it."""
    return _FOLDER / "model"


def demo_data_path(split: str) -> Path:
    """JSON file of one split (train, validation or test): rows of instruction, input, output, answer and task.

    Raises:
        ValueError: `split` is none of the three.
    """
    if split not in DEMO_SPLITS:
        raise ValueError(f"demo split is {split!r}; allowed: {', '.join(DEMO_SPLITS)}")
    return _FOLDER / "data" / f"{split}.json"


def demo_recipe_path() -> Path:
    """YAML file with the hyper-parameters of the default run, under their names in TRL's `SFTConfig`."""
    return _FOLDER / "recipe.yaml"
