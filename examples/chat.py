"""What the examples share: a chat model on the device there is, its loss, its answers, its logits, a training loop.

Rows are as TRL takes them: `{"prompt": [messages], "completion": [messages]}`; only completions count in a loss.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Chat = dict[str, list[dict[str, str]]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVAL_BATCH = 16
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a chat model; the script ends where it has no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        sys.exit(f"{path} has no chat template; this example needs a chat model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(path: str, dtype: torch.dtype | None = None, four_bit: bool = False) -> PreTrainedModel:
    """The model in evaluation mode, in `dtype` or in bfloat16 where the machine computes in it; or in 4 bits."""
    quantisation = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16) if four_bit else None
    dtype = dtype or (torch.bfloat16 if four_bit or _has_bfloat16() else torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map=DEVICE, quantization_config=quantisation
    ).eval()


def _has_bfloat16() -> bool:
    if DEVICE == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def trainer_settings(device: torch.device) -> dict[str, Any]:
    """What the examples set alike in the config of a trainer, here or on a GPU."""
    return {
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
        "bf16": False,  # no autocast: the base computes in the type it was loaded in, the adapter in float32
        "gradient_checkpointing": False,  # True saves memory with a large model, and costs time
    }


def train(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Chat], lr: float, batch_size: int = 4
) -> list[float]:
    """Trains what learns with AdamW, each row once; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for batch in batches(rows, "Training", batch_size):
        chats, targets = with_targets(tokenizer, batch)
        loss = cross_entropy(model(**chats.to(model.device)).logits.flatten(0, 1).float(), targets.to(model.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.inference_mode()
def mean_loss(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Chat], bar: str = "Loss"
) -> float:
    """The mean loss per token of the expected answers."""
    loss_sum = tokens = 0.0
    for batch in batches(rows, bar):
        chats, targets = with_targets(tokenizer, batch)
        predictions = model(**chats.to(model.device)).logits.flatten(0, 1).float()
        loss_sum += cross_entropy(predictions, targets.to(model.device), reduction="sum").item()
        tokens += (targets != -100).sum().item()
    return loss_sum / tokens


@torch.inference_mode()
def answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Chat],
    bar: str = "Answers",
    adapter_names: Sequence[str] | None = None,
) -> list[str]:
    """What the model answers (greedily) to the prompts; `adapter_names` says which adapter answers each."""
    longest = max(len(tokenizer(row["completion"][0]["content"])["input_ids"]) for row in rows)
    found: list[str] = []
    for batch in batches(rows, bar):
        prompts = tokenize(tokenizer, batch, with_answers=False, padding_side="left").to(model.device)
        own = {} if adapter_names is None else {"adapter_names": adapter_names[len(found) : len(found) + len(batch)]}
        output = model.generate(**prompts, **own, do_sample=False, max_new_tokens=longest + 8)
        texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip() for text in texts]
    return found


@torch.inference_mode()
def logits(model: torch.nn.Module, batch: BatchEncoding) -> torch.Tensor:
    """The model's logits in evaluation mode, (rows, tokens, vocabulary) in float32 on the CPU."""
    return model.eval()(**batch.to(model.device)).logits.float().cpu()


def with_targets(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Chat]) -> tuple[BatchEncoding, torch.Tensor]:
    """The chats with their answers, and at each place the token that comes next; -100 where it is not of an answer."""
    chats = tokenize(tokenizer, rows, with_answers=True)
    prompt_lengths = tokenize(tokenizer, rows, with_answers=False)["attention_mask"].sum(dim=1)
    positions = torch.arange(chats["input_ids"].shape[1])
    in_answer = (positions >= prompt_lengths[:, None]) & chats["attention_mask"].bool()
    following = chats["input_ids"].masked_fill(~in_answer, -100).roll(-1, dims=1)
    following[:, -1] = -100
    return chats, following.flatten()


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Chat], with_answers: bool, padding_side: str = "right"
) -> BatchEncoding:
    """The chats with their answers, or up to where the answer starts."""
    texts = [
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        if with_answers
        else tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    return tokenizer(texts, padding=True, padding_side=padding_side, add_special_tokens=False, return_tensors="pt")


def batches(rows: Sequence[Chat], bar: str, size: int = EVAL_BATCH) -> Iterator[Sequence[Chat]]:
    """`rows` in pieces, with a progress bar on a terminal."""
    for start in tqdm(range(0, len(rows), size), desc=bar, unit="batch", disable=None):
        yield rows[start : start + size]


def expect(holds: bool, otherwise: str) -> None:
    """Ends the script where a promise does not hold."""
    if not holds:
        sys.exit(f"Unexpected: {otherwise}")
