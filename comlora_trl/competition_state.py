"""What a competition has come to, and the checkpoint folder it is kept in."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SELECTOR_FILE = "selector.safetensors"
STATE_FILE = "comlora.json"


@dataclass
class CompetitionState:
    """What the competition has come to; saved with every checkpoint as `comlora.json`.

    Attributes:
        k: number of branches.
        disqualified: optimizer step at which a branch was disqualified, by branch.
        wins: optimizer steps won so far, by branch.
        last_evaluation: the newest validation result (see [`comlora_trl.report`]), or None before the first.
    """

    k: int
    disqualified: dict[int, int] = field(default_factory=dict)
    wins: list[float] = field(default_factory=list)
    last_evaluation: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(vars(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "CompetitionState":
        """Reads `comlora.json` from a checkpoint.

        Raises:
            ValueError: if the folder is no ComLoRA checkpoint.
        """
        file = Path(folder) / STATE_FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} is not a ComLoRA checkpoint (it has no {STATE_FILE}): give a checkpoint-N folder."
            )
        values = json.loads(file.read_text())
        values["disqualified"] = {int(branch): step for branch, step in values["disqualified"].items()}
        return cls(**values)


def branch_name(branch: int) -> str:
    """The adapter name of a branch."""
    return f"branch_{branch}"


def check_checkpoint(folder: str | Path, k: int, selector: bool) -> None:
    """Refuses a checkpoint of another K, or one that differs in having a selector, in one clear line.

    Raises:
        ValueError: saying what the checkpoint has, what the run wants and what to do.
    """
    state = CompetitionState.load(folder)
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
