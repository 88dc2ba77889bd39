"""lm_eval's Hugging Face model for an adapter alone: `--model comlora --model_args peft=winner/`.

Declared as the entry point `lm_eval.models`, which lm_eval's main branch reads (pull request 4013); 0.4.13 does not.
"""

from typing import Any

from lm_eval.models.huggingface import HFLM

from comlora_trl.evaluation.adapters import hf_arguments


class ComLoRALM(HFLM):
    """[`HFLM`] whose base model, tokenizer and revision come from the adapter, unless they are given.

    Args:
        peft: the adapter's folder or hub id.
        kwargs: those of [`HFLM`].

    Raises:
        ValueError: there is no adapter, or its base model can't be found.
    """

    def __init__(self, peft: str, **kwargs: Any) -> None:
        filled = {} if "pretrained" in kwargs else hf_arguments(peft, kwargs)
        super().__init__(**{"peft": peft, **kwargs, **filled})
