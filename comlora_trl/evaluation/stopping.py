"""Stop strings that are looked for in every row.

lm_eval's own check (0.4.13, `MultiTokenEOSCriteria`) looks at the first batch_size rows and gives one verdict for the
whole batch. Under beam search there are batch_size x num_beams rows, so the answers depend on the batch size. Our
tasks carry a stop string with `RESPONSE_MARK` in it, and for requests with one the check here takes its place; every
other request keeps lm_eval's own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RESPONSE_MARK = "### Response:"


class RowStopCriteria:
    """Ends each row on its own, as soon as a stop string is in its new text.

    Args:
        tokenizer: decodes the rows.
        stop_sequences: the stop strings.
        prompt_length: tokens of the (padded) prompt, which is not searched.
    """

    def __init__(self, tokenizer: Any, stop_sequences: list[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.stop_sequences = [sequence for sequence in stop_sequences if sequence]
        self.prompt_length = prompt_length
        # The newest token completes the string, and a token is seldom empty text: this many tokens hold it
        self.lookback = max(map(len, self.stop_sequences), default=0) + 4

    def __call__(self, input_ids: "torch.Tensor", scores: Any = None, **kwargs: Any) -> "torch.Tensor":
        """Which rows of `input_ids` (rows, tokens) are done, as a bool tensor (rows,)."""
        import torch

        new = input_ids[:, self.prompt_length :][:, -self.lookback :]
        texts = self.tokenizer.batch_decode(new)
        done = [any(sequence in text for sequence in self.stop_sequences) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def install_row_stopping() -> None:
    """Lets lm_eval's Hugging Face models use [`RowStopCriteria`] for requests that carry `RESPONSE_MARK`."""
    from lm_eval.models import huggingface

    stock = huggingface.stop_sequences_criteria
    if getattr(stock, "comlora", False):
        return

    def stop_sequences_criteria(
        tokenizer: Any, stop_sequences: list[str], initial_decoder_input_length: int, batch_size: int
    ) -> Any:
        if not any(RESPONSE_MARK in sequence for sequence in stop_sequences):
            return stock(tokenizer, stop_sequences, initial_decoder_input_length, batch_size)
        from transformers import StoppingCriteriaList

        return StoppingCriteriaList([RowStopCriteria(tokenizer, stop_sequences, initial_decoder_input_length)])

    stop_sequences_criteria.comlora = True
    huggingface.stop_sequences_criteria = stop_sequences_criteria
