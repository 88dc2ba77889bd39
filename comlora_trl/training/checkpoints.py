"""The competition's files in a checkpoint folder: the state of the competition and the selector's weights.

Each branch is saved in a subfolder.
"""

import json
from pathlib import Path

from comlora_trl.competition import CompetitionState

SELECTOR_FILE = "selector.safetensors"
STATE_FILE = "comlora.json"


def save_state(state: CompetitionState, folder: str | Path) -> None:
    """Writes the state of the competition as `comlora.json` into a checkpoint."""
    (Path(folder) / STATE_FILE).write_text(json.dumps(vars(state), indent=2) + "\n")


def load_state(folder: str | Path) -> CompetitionState:
    """Reads the state of the competition from a checkpoint.

    Raises:
        ValueError: if the folder is not a ComLoRA checkpoint.
    """
    file = Path(folder) / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is not a ComLoRA checkpoint (it has no {STATE_FILE}): give a checkpoint-N folder.")
    return CompetitionState.from_dict(json.loads(file.read_text()))


def check_checkpoint(folder: str | Path, k: int, selector: bool) -> None:
    """Checks that a checkpoint fits a run.

    Args:
        folder: the checkpoint.
        k: the run's number of branches.
        selector: whether the run has a selector.

    Raises:
        ValueError: if the checkpoint has another number of branches, or only one of the two has a selector.
    """
    state = load_state(folder)
    if state.k != k:
        raise ValueError(
            f"checkpoint {folder} has {state.k} branches, but comlora_k={k}: resume with --comlora_k {state.k}, or "
            "start a new run in another output_dir."
        )
    saved = (Path(folder) / SELECTOR_FILE).is_file()
    if saved != selector:
        raise ValueError(
            f"checkpoint {folder} was trained {'with' if saved else 'without'} a selector, but "
            f"comlora_selector={selector}: resume with --comlora_selector {saved}."
        )
