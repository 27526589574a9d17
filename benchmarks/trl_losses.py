"""Our preference losses and gradients next to TRL's, on the same weights and the same token ids.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install -e . trl accelerate
    /tmp/trl/bin/python benchmarks/trl_losses.py

A tiny model is written in Hugging Face form; transformers' AFMoE computes TRL's loss, ours our own. Prints the largest
difference of loss and gradients, each as a share of the largest value, and exits with 1 when one is above 1e-5.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from freehold.checkpoint.hf import save_hf
from freehold.core.log import Log
from freehold.data.packing import Example
from freehold.data.pairs import Answers, PairOrder
from freehold.losses.preference import Preference
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.stages.align.rows import reference_logprobs
from freehold.tokenizer.bpe import train

LIMIT = 1e-5
ROWS = 4
BETA, CROSS_ENTROPY = 0.3, 0.5
SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_dense_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
    "num_experts_per_tok": 2, "sliding_window": 16, "max_position_embeddings": 64,
}  # fmt: skip


def model(seed: int) -> Afmoe:
    """Return a small model far from uniform."""
    made = Afmoe(ModelConfig(**SHAPE))
    made.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.lm_head.weight.mul_(4)
    return made


def pairs() -> list[Answers]:
    """Return pairs of answers of uneven lengths to uneven prompts."""
    g = torch.Generator().manual_seed(5)
    found = []
    for number in range(ROWS):
        prompt = torch.randint(40, 320, (3 + number,), generator=g).tolist()
        ids = [[*prompt, *torch.randint(40, 320, (4 + 2 * n + number,), generator=g).tolist()] for n in range(2)]
        made = [Example(str(number), "s", one, [i >= len(prompt) for i in range(len(one))]) for one in ids]
        found.append(Answers(str(number), "s", tuple(made), (1, -1)))
    return found


def padded(answers: list[Answers]) -> dict[str, torch.Tensor]:
    """Return the pairs as TRL's collator gives them: better answers, then worse ones, padded on the right."""
    examples = [one.examples[side] for side in (0, 1) for one in answers]
    longest = max(len(e.ids) for e in examples)

    def rows(values: list[list[int]], pad: int) -> torch.Tensor:
        return torch.tensor([[*one, *[pad] * (longest - len(one))] for one in values])

    return {
        "input_ids": rows([list(e.ids) for e in examples], 12),
        "attention_mask": rows([[1] * len(e.ids) for e in examples], 0),
        "completion_mask": rows([[int(m) for m in e.loss_mask] for e in examples], 0),
    }


def theirs(folder: Path, kind: str, beta: float, cross_entropy: float, answers: list[Answers], sums: list[Any]) -> Any:
    """Return TRL's loss and gradients by name."""
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = DPOConfig(
        output_dir=str(folder / "out"), beta=beta, loss_type=[kind, "sft"], loss_weights=[1.0, cross_entropy],
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=ROWS,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * ROWS)
    trainer = DPOTrainer(policy, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    trainer.model.train()
    better, worse = (torch.tensor([one[side] for one in sums]) for side in (0, 1))
    inputs = {**padded(answers), "ref_chosen_logps": better, "ref_rejected_logps": worse}
    loss = trainer._compute_loss(trainer.model, inputs, False)
    loss.backward()
    # Transformers stacks the experts as we do, and names them as we do.
    return float(loss.detach()), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def prepared() -> PairOrder:
    """Return the pairs with their reference."""
    order = PairOrder(pairs(), context_tokens=64, sequences=ROWS, steps=1, seed=0, pad=12)
    order.reference = reference_logprobs(model(1).requires_grad_(False), order)
    return order


def ours(kind: str, policy: Afmoe, order: PairOrder) -> tuple[float, dict[str, Any]]:
    """Return our loss and gradients by name."""
    loss = Preference(kind, beta=BETA, cross_entropy=CROSS_ENTROPY)  # type: ignore[arg-type]
    batch = order.arrange([[one] for one in order.answers])
    names = ("targets", "sequence", "sign", "reference", "margins")
    columns = {name: torch.from_numpy(getattr(batch, name)) for name in names}
    policy.zero_grad()
    policy.train()
    ids, documents = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.document_ids)
    hidden = policy.hidden(ids, document_ids=documents)
    scales = {name: 1 / count for name, count in loss.counts(batch).items()}
    total = loss(hidden, policy.lm_head.weight, columns, scales).total
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def compared(ours: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]]) -> dict[str, Any]:
    """Return how far a loss and its gradients are from TRL's, gradients as a share of the largest."""
    (total, own), (value, gradients) = ours, theirs
    shared = [n for n in own if n in gradients and own[n].shape == gradients[n].shape]
    largest = max(float(gradients[n].abs().max()) for n in shared)
    worst = max(float((own[n] - gradients[n]).abs().max()) for n in shared)
    return {
        "loss": total, "trl": value, "difference": abs(total - value) / abs(value),
        "gradient_difference": worst / largest, "gradients_compared": len(shared), "of": len(own),
    }  # fmt: skip


def agree(found: dict[str, dict[str, Any]]) -> bool:
    """Return whether all rows are within the limit."""
    return all(row["difference"] <= LIMIT and row["gradient_difference"] <= LIMIT for row in found.values())


def main() -> int:
    """Compare, print one JSON object, and return the exit code."""
    order = prepared()
    answers = order.answers
    sums = [[float(values.sum()) for values in order.reference[one.id]] for one in answers]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = model(2)
        save_hf(folder, policy.config, policy.state_dict(), torch.float32)
        train(["the cat sat on the mat and the dog saw it"] * 9, 290, Log(quiet=True)).save(folder)
        for kind, trl_kind in (("dpo", "sigmoid"), ("ipo", "ipo")):
            there = theirs(folder, trl_kind, BETA, CROSS_ENTROPY, answers, sums)
            found[kind] = compared(ours(kind, policy, order), there)
    print(json.dumps(found, indent=1))
    return 0 if agree(found) else 1


if __name__ == "__main__":
    sys.exit(main())
