"""Our policy losses and gradients next to TRL's, on the same weights, the same token ids and the same advantages.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install -e . trl accelerate
    /tmp/trl/bin/python benchmarks/trl_policy.py

Prints the largest difference of loss and gradients for each loss type, and exits with 1 when one is above 1e-5.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl_losses

from freehold.checkpoint.hf import save_hf
from freehold.core.log import Log
from freehold.core.marks import IGNORE, PADDING
from freehold.data.rollouts import PolicyBatch
from freehold.losses.policy import PolicyLoss
from freehold.losses.targets import token_logprobs
from freehold.model.afmoe import Afmoe
from freehold.tokenizer.bpe import train

PROMPT, LONGEST, ROWS = 6, 12, 8
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": ({"kind": "clip"}, {"loss_type": "dapo"}),
    "cispo, far": ({"kind": "cispo", "cap": 5.0}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "dr_grpo": ({"kind": "clip", "normalise": "constant"}, {"loss_type": "dr_grpo"}),
    "grpo": ({"kind": "clip", "normalise": "sequences"}, {"loss_type": "grpo"}),
    "cispo": ({"kind": "cispo", "cap": 1.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "gspo": (
        {"kind": "gspo", "normalise": "sequences", "low": 3e-4, "high": 4e-4},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
}
"""Name -> what ours and TRL's are configured with."""


def data() -> dict[str, torch.Tensor]:
    """Return prompts and answers of uneven lengths, padded on the right, and advantages."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([3 + n % (LONGEST - 2) for n in range(ROWS)])
    return {
        "prompt": torch.randint(40, 320, (ROWS, PROMPT), generator=g),
        "answer": torch.randint(40, 320, (ROWS, LONGEST), generator=g),
        "mask": torch.arange(LONGEST)[None] < lengths[:, None],
        "advantage": torch.randn(ROWS, generator=g),
    }


def batch(given: dict[str, torch.Tensor], behaviour: torch.Tensor, reference: torch.Tensor) -> PolicyBatch:
    """Return the data as our rows, one answer each."""
    ids = torch.cat([given["prompt"], given["answer"]], 1)
    mask = torch.cat([torch.zeros(ROWS, PROMPT, dtype=torch.bool), given["mask"]], 1)
    real = torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.bool), given["mask"]], 1)
    inputs, targets = ids[:, :-1].numpy(), torch.where(mask, ids, IGNORE)[:, 1:].numpy()
    wide = np.zeros(inputs.shape, np.float32)
    columns = {"behaviour": wide.copy(), "reference": wide.copy()}
    for name, values in (("behaviour", behaviour), ("reference", reference)):
        columns[name][:, PROMPT - 1 :] = values.numpy()
    return PolicyBatch(
        inputs, targets, np.where(real[:, :-1].numpy(), 0, PADDING).astype(np.int32), columns["behaviour"],
        np.broadcast_to(given["advantage"].numpy()[:, None], inputs.shape).copy(), columns["reference"],
        np.zeros(inputs.shape, np.int32),
    )  # fmt: skip


def ours(policy: Afmoe, loss: PolicyLoss, rows: PolicyBatch) -> tuple[float, dict[str, Any]]:
    """Return our loss and gradients by name."""
    columns = {name: torch.from_numpy(getattr(rows, name)) for name in rows.__dataclass_fields__}
    policy.zero_grad()
    policy.train()
    hidden = policy.hidden(columns["input_ids"], document_ids=columns["document_ids"])
    scales = {name: 1 / count for name, count in loss.counts(rows).items()}
    total = loss(hidden, policy.lm_head.weight, columns, scales).total
    total.backward()
    return float(total.detach()), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


def theirs(
    folder: Path, given: dict[str, torch.Tensor], old: torch.Tensor, ref: torch.Tensor, more: dict[str, Any]
) -> Any:
    """Return TRL's loss and gradients by name."""
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0} | more
    config = GRPOConfig(
        output_dir=str(folder / "out"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=ROWS, num_generations=ROWS, max_completion_length=LONGEST,
        gradient_accumulation_steps=1, steps_per_generation=1, router_aux_loss_coef=0.0, **settings,
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": "a"}] * ROWS)
    trainer = GRPOTrainer(
        policy, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config, train_dataset=dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.aux_loss_enabled = False
    trainer.model.train()
    inputs = {
        "prompt_ids": given["prompt"],
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": given["answer"],
        "completion_mask": given["mask"].long(),
        "advantages": given["advantage"],
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": given["mask"].sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def main() -> int:
    """Compare, print one JSON object, and return the exit code."""
    given, policy, found = data(), trl_losses.model(2), {}
    g = torch.Generator().manual_seed(4)
    ids = torch.cat([given["prompt"], given["answer"]], 1)
    with torch.no_grad():
        hidden = policy.hidden(ids[:, :-1])[:, PROMPT - 1 :]
        now = token_logprobs(hidden.flatten(0, 1), policy.lm_head.weight, given["answer"].flatten()).view(ROWS, LONGEST)
    old = now + 0.3 * torch.randn(now.shape, generator=g)
    ref = now + 0.3 * torch.randn(now.shape, generator=g)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_hf(folder, policy.config, policy.state_dict(), torch.float32)
        train(["the cat sat on the mat and the dog saw it"] * 9, 290, Log(quiet=True)).save(folder)
        for label, (mine, more) in CASES.items():
            there = theirs(folder, given, old, ref, more)
            here = ours(policy, PolicyLoss(**{"constant_tokens": LONGEST} | mine), batch(given, old, ref))
            found[label] = trl_losses.compared(here, there)
    print(json.dumps(found, indent=1))
    return 0 if trl_losses.agree(found) else 1


if __name__ == "__main__":
    sys.exit(main())
