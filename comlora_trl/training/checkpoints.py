"""A checkpoint folder: each branch in a folder of its own, the selector, and what the competition has come to."""

import json
from pathlib import Path

from comlora_trl.competition import CompetitionState

SELECTOR_FILE = "selector.safetensors"
STATE_FILE = "comlora.json"


def save_state(state: CompetitionState, folder: str | Path) -> None:
    """Writes `comlora.json` into a checkpoint."""
    (Path(folder) / STATE_FILE).write_text(json.dumps(vars(state), indent=2) + "\n")


def load_state(folder: str | Path) -> CompetitionState:
    """Reads `comlora.json` from a checkpoint.

    Raises:
        ValueError: if the folder is no ComLoRA checkpoint.
    """
    file = Path(folder) / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is not a ComLoRA checkpoint (it has no {STATE_FILE}): give a checkpoint-N folder.")
    return CompetitionState.from_dict(json.loads(file.read_text()))


def check_checkpoint(folder: str | Path, k: int, selector: bool) -> None:
    """Refuses a checkpoint of another K, or one that differs in having a selector, in one clear line.

    Raises:
        ValueError: saying what the checkpoint has, what the run wants and what to do.
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
