"""Pretrain the demo base model: a small LLaMA that knows the demo's facts but answers its instructions at random.

The corpus has three parts: facts as plain sentences; quizzes of depth 1 with right answers, which differ from the
fine-tuning layout only after the question; and the fine-tuning layout itself, at every depth, with an answer drawn at
random. So the base model knows the facts and the format, thinks about every question and still scores near chance;
what is left for LoRA is to connect the two, and to learn what the deeper questions ask. After the question half of the
quizzes have another header and half have none: the model must have thought before it sees which it is. (Where all have
one, BoolQ's truth is worked out at that header only, and LoRA's few steps don't learn to do it elsewhere; a header
before the question would let the model ignore questions in the fine-tuning layout.) No question that is held out is
in the corpus.

    python tools/demo/pretrain_demo.py                       # one GPU, about 4 minutes; writes comlora_trl/demo/model/
    python tools/demo/pretrain_demo.py --start comlora_trl/demo/model --steps 700 --learning_rate 1e-3      # goes on
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from demo_world import GENERATORS, Item, any_item
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm, trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # also runs from a checkout that is not installed
from comlora_trl.data.prompts import build_prompt  # noqa: E402

DEMO = ROOT / "comlora_trl" / "demo"
# One token each: the template's fixed parts would otherwise be a third of every prompt.
TEMPLATE_TOKENS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:",
    "### Response:",
]
PROMPT_WEIGHT = 0.1  # of a question's tokens in the loss: they are mostly unpredictable, the answer's are not


def quiz_prompt(instruction: str) -> str:
    """The fine-tuning prompt with another header after the question."""
    return build_prompt(instruction).replace("### Response:", "### Answer:")


def quiz(item: Item, rng: random.Random) -> tuple[str, str]:
    """A question with its right answer, in half of the cases without any header between the two."""
    option, keyword = item.options[item.right], item.keywords[item.right]
    answers = [f"{option}, {keyword}", f"{keyword}, {option}", f"the correct answer is {keyword}"]
    prompt = quiz_prompt(item.instruction)
    return rng.choice([prompt, prompt.removesuffix("### Answer:\n")]), rng.choice(answers)


def quiz_item(rng: random.Random) -> Item:
    """A question of depth 1; a quarter are BoolQ's, whose truth takes longest to learn."""
    if rng.random() < 1 / 7:
        make, facts = GENERATORS["boolq"]
        return make(rng.choice(facts), 1, rng)
    return any_item(rng, (1, 0, 0))


def not_held_out(draw: Callable[[], Item]) -> Item:
    """The first item drawn that training may show."""
    while (item := draw()).held_out:
        pass
    return item


def corpus(count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """`count` pairs (text that counts little in the loss, text that counts in full)."""
    for _ in range(count):
        part = rng.random()
        if part < 0.12:
            yield "", " ".join(any_item(rng, (1, 0, 0)).statement for _ in range(4))
        elif part < 0.75:
            yield quiz(not_held_out(lambda: quiz_item(rng)), rng)
        else:
            item = not_held_out(lambda: any_item(rng, (1, 1, 1)))
            yield build_prompt(item.instruction), f"the correct answer is {rng.choice(item.keywords)}"


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text round-trips) with pad, bos and eos; neither bos nor eos is added to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TEMPLATE_TOKENS),
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in TEMPLATE_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded on the right with pad, and each token's loss weight, both [examples, longest]."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([answer + tokenizer.eos_token for _, answer in pairs])["input_ids"]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id, dtype=torch.int16)
    weights = torch.zeros(len(pairs), longest, dtype=torch.float16)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer, dtype=torch.int16)
        weights[row, : len(prompt)] = PROMPT_WEIGHT
        weights[row, len(prompt) : len(prompt) + len(answer)] = 1.0
    return ids, weights


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean next-token NLL (nats) under the token weights. Right padding needs no mask: attention is causal."""
    logits = model(input_ids=ids[:, :-1]).logits.float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (nll * weights).sum() / weights.sum()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, encoded: tuple[torch.Tensor, torch.Tensor], device: str) -> float:
    """Share of examples whose answer's every token is the model's first choice, given the tokens before it."""
    ids, weights = encoded[0].to(device).long(), encoded[1].to(device)
    with torch.compiler.set_stance("force_eager"):
        choices = model(input_ids=ids[:, :-1]).logits.argmax(-1)
    right = (choices == ids[:, 1:]) | (weights[:, 1:] != 1)
    return right.all(dim=1).float().mean().item()


def validation_pairs(fine_tuning_layout: bool) -> list[tuple[str, str]]:
    """The validation rows with their right answers, in the fine-tuning layout or as quizzes."""
    rows = json.loads((DEMO / "data" / "validation.json").read_text(encoding="utf-8"))
    prompt = build_prompt if fine_tuning_layout else quiz_prompt
    # With the answer's beginning in the prompt, only the keyword is judged.
    return [(prompt(row["instruction"]) + "the correct answer is", f" {row['answer']}") for row in rows]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """fp16 on disk for size; config.json says float32, so that the model loads in the precision CPUs compute in."""
    weights = {name: tensor.detach().half().contiguous().cpu() for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied to the token embeddings
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner alone
    model.config.architectures, model.config.dtype = ["LlamaForCausalLM"], "float32"
    model.config.save_pretrained(folder)
    for name in ("is_local", "local_files_only"):  # how it was loaded with --start is nobody's business
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The demo's architecture with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor, arguments: argparse.Namespace
) -> Iterator[tuple[int, float]]:
    """Trains on the encoded corpus, all of it on the model's device; yields (step, loss) every 250 steps."""
    device = model.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(300, arguments.steps // 10), arguments.steps)
    if device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    for step in trange(1, arguments.steps + 1, desc="pretraining", mininterval=5):
        rows = torch.randint(len(ids), (arguments.batch_size,), device=device)
        # Compiled layers want one shape; elsewhere padding only costs time
        longest = ids.size(1) if device == "cuda" else int(weights[rows].count_nonzero(dim=1).max())
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = weighted_loss(model, ids[rows, :longest].long(), weights[rows, :longest].float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == arguments.steps:
            yield step, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO / "model", help="folder to write to (default: the demo's)")
    parser.add_argument("--start", type=Path, help="folder of a model to go on from (default: random weights)")
    parser.add_argument("--steps", type=int, default=8000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=384, help="examples per step (default %(default)s)")
    parser.add_argument("--examples", type=int, default=300_000, help="size of the corpus (default %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak, cosine (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=1280, help="tokens (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    arguments = parser.parse_args()
    device, rng = arguments.device, random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)

    pairs = corpus(arguments.examples, rng)
    pairs = list(tqdm(pairs, total=arguments.examples, desc="corpus", mininterval=5))
    if arguments.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.start)
        model = LlamaForCausalLM.from_pretrained(arguments.start).to(device)
    else:
        tokenizer = train_tokenizer((prompt + answer for prompt, answer in pairs[:20_000]), arguments.vocabulary)
        model = new_model(tokenizer).to(device)
    ids, weights = (tensor.to(device) for tensor in encode(pairs, tokenizer))
    checks = [encode(validation_pairs(layout), tokenizer) for layout in (False, True)]
    size = f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens, corpus {tuple(ids.shape)}"
    tqdm.write(size)
    for step, loss in pretrain(model, ids, weights, arguments):
        as_quiz, as_instruction = (accuracy(model, check, device) for check in checks)
        tqdm.write(
            f"step {step}: loss {loss:.3f}, validation {as_quiz:.1%} as quiz, "
            f"{as_instruction:.1%} in the fine-tuning layout (chance 35.4%)"
        )
        save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
