"""The hook: what it fills in and what it leaves alone. `test_fresh_environments.py` has the stock command."""

import json
import os
import types
from pathlib import Path

import pytest
from conftest import make_lora, make_model, make_tokenizer
from environments import REPOSITORY, run

lm_eval = pytest.importorskip("lm_eval")

import comlora_lm_eval_hook  # noqa: E402
from comlora_trl.evaluation import adapters, hook  # noqa: E402

STOCK_TASK = """
task: stock
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: ["a", "b"], max_gen_toks: 8, num_beams: 2}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A winner as the trainer leaves one: adapter and tokenizer; its base beside it."""
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("run")
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model = make_model()
    model.name_or_path = model.config._name_or_path = str(folder / "base")
    get_peft_model(model, make_lora(r=24)).save_pretrained(folder / "winner")
    make_tokenizer().save_pretrained(folder / "winner")
    return folder / "winner"


def test_base_and_tokenizer_come_from_the_adapter(adapter, tmp_path):
    base = str(adapter.parent / "base")
    assert adapters.hf_arguments(str(adapter), {}) == {"pretrained": base, "tokenizer": str(adapter)}
    assert "tokenizer" not in adapters.hf_arguments(str(adapter), {"tokenizer": "other"})
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/model", "revision": "v2"})
    )
    assert adapters.hf_arguments(str(tmp_path), {}) == {"pretrained": "org/model", "revision": "v2"}


def test_vllm_gets_a_rank_it_accepts(adapter):
    assert adapters.vllm_arguments(str(adapter), {})["max_lora_rank"] == 32
    assert "max_lora_rank" not in adapters.vllm_arguments(str(adapter), {"max_lora_rank": 64})


def test_models_are_filled_and_nothing_given_is_overridden(adapter, capsys):
    class VLLM:
        def __init__(self, pretrained, **kwargs):
            self.given = {"pretrained": pretrained, **kwargs}

    module = types.SimpleNamespace(VLLM=VLLM)
    hook.apply("lm_eval.models.vllm_causallms", module, comlora_lm_eval_hook.tell)
    hook.apply("lm_eval.models.vllm_causallms", module, comlora_lm_eval_hook.tell)
    path = str(adapter)
    assert VLLM(lora_local_path=path).given == {
        "pretrained": str(adapter.parent / "base"),
        "tokenizer": path,
        "lora_local_path": path,
        "max_lora_rank": 32,
    }
    told = capsys.readouterr().err
    assert told.startswith(f"comlora-trl: from lora_local_path={path}: pretrained=") and told.count("\n") == 1
    assert VLLM(pretrained="mine", lora_local_path=path).given == {"pretrained": "mine", "lora_local_path": path}
    assert VLLM("mine").given == {"pretrained": "mine"}
    assert not capsys.readouterr().err
    with pytest.raises(TypeError, match="pretrained"):
        VLLM()


def test_the_entry_points_model_fills_the_base_too(adapter, monkeypatch):
    from comlora_trl.evaluation.models import HFLM, ComLoRALM

    seen = []
    monkeypatch.setattr(HFLM, "__init__", lambda self, **given: seen.append(given))
    ComLoRALM(peft=str(adapter), batch_size=2)
    ComLoRALM(peft=str(adapter), pretrained="mine")
    base, winner = str(adapter.parent / "base"), str(adapter)
    assert seen[0] == {"pretrained": base, "peft": winner, "tokenizer": winner, "batch_size": 2}
    assert seen[1] == {"pretrained": "mine", "peft": winner}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_model_name_or_path": "/gone/base"}, "its base model /gone/base does not exist.*add pretrained=BASE"),
        ({"base_model_name_or_path": None}, "names no base model; add pretrained=BASE"),
        (None, "adapter_config.json: no such file; expected the folder of a PEFT adapter"),
    ],
)
def test_a_bad_adapter_gets_one_line(tmp_path, config, message):
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        adapters.hf_arguments(str(tmp_path), {})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such folder"):
        adapters.hf_arguments(str(tmp_path / "winner"), {})


def test_an_error_in_the_hook_leaves_lm_eval_alone(capsys, monkeypatch):
    monkeypatch.setattr(comlora_lm_eval_hook, "_told", False)
    for _ in range(2):
        comlora_lm_eval_hook.apply("lm_eval.tasks.manager", types.SimpleNamespace())  # it has no TaskManager
    told = capsys.readouterr().err
    assert told.startswith("comlora-trl: lm_eval is left as it is (AttributeError") and told.count("\n") == 1


def test_the_start_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import comlora_lm_eval_hook as hook; hook.install();"
    code += "sys.exit(str(set(sys.modules) - before - {'comlora_lm_eval_hook'} or 0).replace('0', '') or 0)"
    assert run(["-S", "-c", code], REPOSITORY).returncode == 0


def pth_line() -> str:
    return (REPOSITORY / "comlora_lm_eval_hook.pth").read_text()


def test_the_pth_line_is_switched_off_and_survives_a_missing_module(tmp_path):
    code = (
        pth_line()
        + "import sys; print(any(getattr(f, '__module__', '') == 'comlora_lm_eval_hook' for f in sys.meta_path))"
    )
    assert pth_line().count("\n") == 1 and pth_line().startswith("import ")
    assert run(["-c", code], tmp_path).stdout == "True\n"
    assert run(["-c", code], tmp_path, COMLORA_LM_EVAL_HOOK="0").stdout == "False\n"
    gone = run(["-S", "-c", code], tmp_path, PYTHONPATH="")  # -S: without site-packages, where we may be installed
    assert (gone.stdout, gone.stderr) == ("False\n", "")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_stock_results_are_the_same_with_and_without_the_hook(adapter, tmp_path):
    """Samples, byte for byte, and scores: beams and stop strings included, where our tasks' stop check differs."""
    rows = [{"question": f"what is {'abcdefgh'[i % 8] * (1 + i % 5)} ?", "answer": "x"} for i in range(24)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "stock.yaml").write_text(STOCK_TASK.format(data=data))
    code = (
        pth_line()
        + "import sys, json, lm_eval; from lm_eval.tasks import TaskManager\n"
        + "manager = TaskManager(include_path=sys.argv[1])\n"
        + "hooked = 'comlora_demo' in manager.all_tasks\n"
        + "r = lm_eval.simple_evaluate('hf', {'pretrained': sys.argv[2], 'peft': sys.argv[3]}, ['stock'],"
        + " task_manager=manager, batch_size=8, device='cpu')\n"
        + "print(json.dumps([hooked, json.dumps([r['results'], r['samples'], r['configs']], default=str)]))"
    )
    arguments = ["-c", code, str(tmp_path), str(adapter.parent / "base"), str(adapter)]
    outputs = []
    for switch in ("1", "0"):
        result = run(arguments, tmp_path, COMLORA_LM_EVAL_HOOK=switch)
        assert result.returncode == 0, result.stderr[-2000:]
        outputs.append(json.loads(result.stdout.splitlines()[-1]))
    assert [hooked for hooked, _ in outputs] == [True, False]
    assert outputs[0][1] == outputs[1][1] and "exact_match" in outputs[0][1]


@pytest.mark.slow
def test_a_stale_base_ends_in_one_line(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/base"}))
    command = ["-m", "comlora_trl.cli.eval", "--model", "hf", "--model_args", f"peft={tmp_path}"]
    result = run([*command, "--tasks", "comlora_demo", "--limit", "2"], tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: its base model /gone/base does not exist")


@pytest.mark.slow
def test_missing_data_ends_in_one_line_before_the_model(adapter, tmp_path):
    command = ["-m", "comlora_trl.cli.eval", "--model", "hf", "--model_args", f"peft={adapter}"]
    result = run([*command, "--tasks", "comlora_boolq"], tmp_path, COMLORA_DATA_DIR=str(tmp_path))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    missing = tmp_path / "commonsense" / "boolq" / "test.json"
    assert result.stderr.splitlines()[-1].startswith(f"error: {missing}: no such file")
    assert "comlora-trl: from peft=" not in result.stderr, "the model is not even begun"


# Stands in for vLLM itself, which needs its own build; lm_eval's class for it is the real one
FAKE_VLLM = {
    "vllm/__init__.py": """
class LLM:
    def __init__(self, **given):
        self.given = given
SamplingParams = TokensPrompt = None
""",
    "vllm/lora/__init__.py": "",
    "vllm/lora/request.py": "LoRARequest = lambda *given: given",
    "vllm/tokenizers.py": """
from transformers import AutoTokenizer
def get_tokenizer(name, **given):
    return AutoTokenizer.from_pretrained(name)
""",
    "vllm-0.8.2.dist-info/METADATA": "Name: vllm\nVersion: 0.8.2\n",
}


@pytest.mark.slow
def test_lm_evals_own_vllm_class_gets_the_arguments(adapter, tmp_path):
    for name, text in FAKE_VLLM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    code = (
        pth_line()
        + "import sys, json; from lm_eval.api.registry import get_model\n"
        + "model = get_model('vllm').create_from_arg_string(sys.argv[1])\n"
        + "print(json.dumps([model.model.given, model.lora_request]))"
    )
    paths = os.pathsep.join(map(str, (tmp_path, REPOSITORY)))
    done = run(["-c", code, f"lora_local_path={adapter},dtype=float32"], tmp_path, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-2000:]
    given, lora = json.loads(done.stdout.splitlines()[-1])
    base, winner = str(adapter.parent / "base"), str(adapter)
    assert {name: given[name] for name in ("model", "tokenizer", "dtype", "enable_lora", "max_lora_rank")} == {
        "model": base,
        "tokenizer": winner,
        "dtype": "float32",
        "enable_lora": True,
        "max_lora_rank": 32,
    }
    assert lora == ["finetuned", 1, winner]
