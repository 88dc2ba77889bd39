"""README and docs: what they name exists, generated parts are current, links lead somewhere, and Python is Python."""

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from comlora_trl.cli.sft import ComLoRAScriptConfig

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
STUDIES = sorted((ROOT / "studies").glob("*/README.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *DOCS, *STUDIES]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
GENERATED = re.compile(r"<!-- generated: (\w+) -->.*?<!-- end: \1 -->", re.DOTALL)


def load_generator():
    path = ROOT / "tools" / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("docs_generate", path)
    module = sys.modules["docs_generate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


def test_every_field_of_every_config_is_on_the_configuration_page():
    documented = set(re.findall(r"^\| `(\w+)` \|", TEXTS["docs/configuration.md"], re.MULTILINE))
    documented = {name for name in documented if name.islower()}  # the others are environment variables
    own = {field.name for config in generate.documented_configs() for field in generate.own_fields(config)}
    competition = {field.name for config in generate.configs() for field in fields(config)}
    assert {name for name in competition if name.startswith("comlora_")} <= own
    assert "comlora_k" in own and own == documented


def test_every_environment_variable_is_on_the_configuration_page():
    files = [*(ROOT / "comlora_trl").rglob("*.py"), ROOT / "comlora_lm_eval_hook.pth"]
    read = {name for file in files for name in re.findall(r"""["'](COMLORA_[A-Z_]+)["']""", file.read_text())}
    assert "COMLORA_DATA_DIR" in read
    assert not {name for name in read if f"`{name}`" not in TEXTS["docs/configuration.md"]}


@pytest.mark.parametrize("name", generate.PARTS)
def test_generated_parts_are_current(name):
    path, text = generate.rewritten(name)
    assert text == path.read_text(encoding="utf-8"), "run python tools/docs/generate.py"


@pytest.mark.parametrize("page", TEXTS)
def test_flags_named_anywhere_exist(page):
    known = {field.name for field in fields(ComLoRAScriptConfig)}
    assert set(re.findall(r"--(comlora_\w+)", GENERATED.sub("", TEXTS[page]))) <= known


@pytest.mark.parametrize(
    "page, code",
    [(page, code) for page in TEXTS for code in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL)],
)
def test_python_compiles(page, code):
    compile(code, page, "exec")


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_anchors_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", GENERATED.sub("", TEXTS[page]), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        path = (ROOT / page).parent / place if place else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}"


@pytest.mark.parametrize("page", TEXTS)
def test_paths_named_anywhere_exist(page):
    named = re.findall(
        r"`((?:comlora_trl|scripts|lm_eval_tasks|tests|studies|benchmarks|tools|docs)/[\w/.]*)`", TEXTS[page]
    )
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_folder_of_the_package_is_on_the_map():
    folders = {path.name for path in (ROOT / "comlora_trl").iterdir() if (path / "__init__.py").is_file()}
    named = set(re.findall(r"`comlora_trl/(\w+)/`", TEXTS["docs/development.md"]))
    assert folders <= named


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 180 and len(TEXTS["README.md"].split()) <= 1800


def test_scripts_are_few():
    assert len([path for path in (ROOT / "scripts").iterdir() if path.is_file()]) <= 4
