"""The embedded default: a small pretrained model, a data set in the eight commonsense formats, and their recipe.

`tools/demo/make_demo_data.py` writes the data, `tools/demo/make_preferences.py` preferences between its answers, and
`tools/demo/pretrain_demo.py` the model. Nothing here imports torch.
"""

from pathlib import Path

# The name of the embedded base in files that outlive a path; `resolve_base` finds the folder
DEMO_BASE = "comlora-trl/demo"
DEMO_SPLITS = ("train", "validation", "test")
_FOLDER = Path(__file__).resolve().parent


def demo_model_path() -> Path:
    """Folder of the base model and its tokenizer, as `from_pretrained` takes it."""
    return _FOLDER / "model"


def base_name(base: str) -> str:
    """`DEMO_BASE` for a path of the embedded base model, in any installation; else the name itself."""
    return DEMO_BASE if Path(base).parts[-3:] == ("comlora_trl", "demo", "model") else base


def resolve_base(base: str) -> str:
    """Where a base model is: the installed package's folder for the embedded one, also under its former path.

    Args:
        base: a hub id, a folder or `DEMO_BASE`.
    """
    if base == DEMO_BASE or (base_name(base) == DEMO_BASE and not Path(base).expanduser().is_dir()):
        return str(demo_model_path())
    return base


def demo_data_path(split: str) -> Path:
    """JSON file of one split (train, validation or test): rows of instruction, input, output, answer and task.

    Raises:
        ValueError: `split` is none of the three.
    """
    if split not in DEMO_SPLITS:
        raise ValueError(f"demo split is {split!r}; allowed: {', '.join(DEMO_SPLITS)}")
    return _FOLDER / "data" / f"{split}.json"


def demo_preferences_path(split: str) -> Path:
    """JSON file of a split (train or validation) of the preferences: rows of instruction, chosen and rejected.

    Raises:
        ValueError: `split` is neither of the two.
    """
    if split not in DEMO_SPLITS[:2]:
        raise ValueError(f"demo preferences split is {split!r}; allowed: {', '.join(DEMO_SPLITS[:2])}")
    return _FOLDER / "preferences" / f"{split}.json"


def demo_preferences_recipe_path() -> Path:
    """YAML file with the hyper-parameters of the preference trainers' default runs, under their names in TRL."""
    return _FOLDER / "preferences" / "recipe.yaml"


def demo_recipe_path() -> Path:
    """YAML file with the hyper-parameters of the default run, under their names in TRL's `SFTConfig`."""
    return _FOLDER / "recipe.yaml"
