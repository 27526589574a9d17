"""What a proof asks of llama.cpp: probabilities, token ids and rendered conversations, in its exact arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from freehold.infer.llama import Llama


class ExactLlama(Llama):
    """A GGUF file opened by llama.cpp for a proof; errors as in `Llama`."""

    def __init__(self, path: Path, context_tokens: int, log: Path, threads: int = 1) -> None:
        super().__init__(path, context_tokens, threads=threads, exact=True, log=log)
        self._letter = self.tokenize("a")[0]

    def log_probabilities(self, ids: list[int], vocab_size: int) -> np.ndarray:
        """Return the normalised log-probabilities (float64 [V]) of the token after `ids`; -inf where there is none."""
        # Probabilities are those before sampling. What is drawn must be plain text all the same: a token that ends
        # the answer, or half a character, comes without them.
        drawn = {"logit_bias": [[self._letter, 1e4]], "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        answer = self.ask("/completion", {"prompt": ids, "n_predict": 1, "n_probs": vocab_size, **drawn})
        result = np.full(vocab_size, -np.inf)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result - np.logaddexp.reduce(result)

    def tokenize(self, text: str, *, specials: bool = False) -> list[int]:
        """Return llama.cpp's ids of a text; with `specials` as of a prompt: special tokens are known, BOS is added."""
        body = {"content": text, "add_special": specials, "parse_special": specials}
        return [int(i) for i in self.ask("/tokenize", body)["tokens"]]

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """Return a conversation as the file's own chat template renders it, ready for an answer, without the BOS."""
        body: dict[str, Any] = {"messages": messages} | ({"tools": tools} if tools else {})
        return str(self.ask("/apply-template", body)["prompt"])
