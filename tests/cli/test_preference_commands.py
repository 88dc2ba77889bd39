"""The commands of the preference trainers read the flags of all training commands."""

import pytest

from comlora_trl.cli import dpo, kto, reward
from comlora_trl.cli.preferences import demo_preferences

COMMANDS = [dpo, kto, reward]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere is not a folder"),
        (["--use_peft", "false"], "--use_peft false is not possible"),
        (["--dataset_train_split", "trian"], "--dataset_train_split does nothing with the demo's data or a file"),
        (["--test_split_size", "0.1"], "--test_split_size does nothing without a mixture"),
        (["--dataset_name", "broken.json"], "error: broken.json can't be read as JSON or JSON lines: "),
    ],
)
def test_flags_that_cannot_be_followed_end_in_one_line(command, flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{broken")
    with pytest.raises(SystemExit, match=line):
        command.main([*flags, "--use_cpu", "true"])


@pytest.mark.parametrize("trusts", [True, False])
def test_trust_remote_code_reaches_the_model(trusts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {}

    def built(**given):
        seen.update(given["args"].model_init_kwargs)
        raise ValueError("enough")

    monkeypatch.setattr(dpo, "ComLoRADPOTrainer", built)
    with pytest.raises(SystemExit, match="enough"):
        dpo.main(["--trust_remote_code", str(trusts).lower(), "--use_cpu", "true"])
    assert seen["trust_remote_code"] is trusts


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_embedded_reward_model_learns_which_kind_of_answer_is_asked_for(split):
    pairs, own = demo_preferences(split, "dpo"), demo_preferences(split, "reward")
    assert own["prompt"] == pairs["prompt"] and own["chosen"] == pairs["chosen"]
    for pair, row in zip(pairs, own, strict=True):
        allowed = row["prompt"].split("Answer format: ")[1].split()[0].split("/")
        assert {pair["chosen"].split()[-1], pair["rejected"].split()[-1]} <= {*allowed}
        assert row["rejected"].split()[-1] not in allowed
    assert len({*own["rejected"]}) > 5  # not always the same answer


def test_the_embedded_kto_examples_are_of_both_kinds():
    rows, pairs = demo_preferences("validation", "kto"), demo_preferences("validation", "dpo")
    assert rows["label"][:4] == [True, False, True, False]
    assert rows["completion"][:2] == [pairs["chosen"][0], pairs["rejected"][1]]
