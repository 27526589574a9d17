"""The log-probability of a token: one function for training, scoring and answering.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freehold.kernels import cpu, packed


def log_partition(logits: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) [N] of logits [N, V], in fp32 or finer."""
    if cpu.available(logits, logits.shape[-1]):
        # The very function that the kernel of training calls, so that both round in the same order.
        return packed.log_partition(logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1)


def token_logprobs(logits: Tensor, ids: Tensor, partition: Tensor | None = None) -> Tensor:
    """Return log p of one token a row [N], ids [N]; `partition` is what `log_partition` found, if it is known."""
    total = log_partition(logits) if partition is None else partition
    return logits.gather(1, ids[:, None]).squeeze(1).to(total.dtype) - total
