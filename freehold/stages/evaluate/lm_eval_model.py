"""The harness's model class over our engine. It encodes pairs by itself, as it does for every other runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from freehold.stages.evaluate.answers import answer, check_fits
from freehold.tokenizer.chat import render

if TYPE_CHECKING:
    from freehold.api import Loaded

DEFAULT_ANSWER_TOKENS = 256
"""The harness's own default."""


def model_of(loaded: Loaded) -> TemplateLM:
    """Return a model that lm-evaluation-harness can ask."""
    return _Ours(loaded)


class _Ours(TemplateLM):  # type: ignore[misc]
    backend = "causal"

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.loaded, self.tokens = loaded, loaded.tokenizer
        self.begin = self.tokens.decode([self.tokens.bos], skip_specials=False)

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.sha256

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render(chat_history, generation=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode as the exported tokenizer does: with one begin token, unless the text has it."""
        ids = self.tokens.encode(string, specials=True)
        begins = add_special_tokens is not False and not string.startswith(self.begin)
        return [self.tokens.bos, *ids] if begins else ids

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        most = self.loaded.config.max_position_embeddings
        for number, (_, context, tail) in enumerate(requests):
            check_fits(len(context) + len(tail), most, f"request {number}")
        scored = self.loaded.engine.score_top([[*context, *tail] for _, context, tail in requests], 1)
        found = []
        for one, (_, _, tail) in zip(scored, requests, strict=True):
            size = len(tail)
            best = [top[0][0] for top in one.top_logprobs[-size:]] if size else []
            found.append((sum(one.logprobs[-size:]) if size else 0.0, best == list(tail)))
        return found

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Score whole texts in windows that fit the context, after one begin token (`add_bos_token=False` there).

        Its HF class adds a second one where the tokenizer adds one by itself.
        """
        found = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            most = self.loaded.config.max_position_embeddings - 1
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=most, context_len=1)
            windows = [make_disjoint_window(window) for window in rolling]
            values = self._loglikelihood_tokens([(None, context, tail) for context, tail in windows])
            found.append(sum(value for value, _ in values))
        return found

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        texts = []
        for number, request in enumerate(requests):
            prompt, settings = request.args
            until = settings.get("until") or []
            ends = [until] if isinstance(until, str) else until
            most = int(settings.get("max_gen_toks", DEFAULT_ANSWER_TOKENS))
            where = f"{request.task_name}, item {number}"
            texts.append(answer(self.loaded, self.tok_encode(prompt), ends, most, where))
        return texts
