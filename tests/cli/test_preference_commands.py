"""The commands of the preference trainers read the flags of all training commands."""

import pytest

from comlora_trl.cli import dpo, kto, reward

COMMANDS = [dpo, kto, reward]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere is not a folder"),
        (["--use_peft", "false"], "--use_peft false is not possible"),
    ],
)
def test_flags_that_cannot_be_followed_end_in_one_line(command, flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
