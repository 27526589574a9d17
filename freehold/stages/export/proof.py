"""Proves that the exported folder and files are the model: opened by their own runtimes, compared with ours.

Each proof returns a record for `parity.json` with what failed in it; nothing is raised here but what makes a
comparison impossible. Weights are compared tensor by tensor (a rarely chosen expert may not speak in any sample),
the computation by KL, best token and routing, the text side by token ids and rendered conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freehold.core.artifact import package_versions
from freehold.infer.llama_eval import routing
from freehold.model.config import ModelConfig
from freehold.stages.export import samples
from freehold.stages.export.config import EXACT, Proof
from freehold.stages.export.gguf_writer import differing_tensors
from freehold.stages.export.llama import ExactLlama
from freehold.stages.export.reference import Agreement, Passage, log_probabilities, watch_routing
from freehold.tokenizer import chat
from freehold.tokenizer.bpe import Tokenizer

Record = dict[str, Any]
TEXTS = samples.KINDS | samples.SCRIPTS


def prove_hf(
    folder: Path,
    state: dict[str, Tensor],
    passages: list[Passage],
    tokenizer: Tokenizer,
    limits: Proof,
    device: torch.device | str = "cpu",
) -> Record:
    """Open the folder with transformers and compare weights, distributions, routing, token ids and template."""
    import transformers

    agreement, routed, same_routes = Agreement.empty(), 0, 0
    with _quiet_transformers():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
        model, info = loaded
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    failures = [f"transformers reports {what}: {sorted(map(str, info[what]))[:3]}" for what in info if info[what]]
    failures += _differing_weights(model.state_dict(), state)
    model.to(device)
    with torch.inference_mode():
        for passage in passages:
            with watch_routing(model) as seen:
                logits = model(torch.tensor([passage.ids], device=device), use_cache=False).logits[0].float()
            agreement.add(log_probabilities(passage.logits), log_probabilities(logits))
            chosen = torch.stack([c.sort(dim=-1).values for _, _, c in seen]).cpu()
            routed += chosen[..., 0].numel()
            same_routes += int((chosen == passage.chosen).all(-1).sum())
    failures += _gate(agreement, limits.limit("HF"), exact=True)
    if same_routes != routed:
        failures.append(f"{routed - same_routes} of {routed} (token, layer) pairs chose other experts")
    failures += _compare(
        "token ids",
        ((n, tokenizer.encode(text), theirs.encode(text, add_special_tokens=False)) for n, text in TEXTS.items()),
    )

    begun = [*tokenizer.prefix, *tokenizer.encode("a b")], theirs("a b")["input_ids"]
    failures += _compare("ids of a prompt", (("plain", *begun),))

    def rendered(messages: Any, tools: Any) -> Any:
        return theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)

    failures += _compare_conversations(tokenizer, rendered)
    return {
        "runtime": f"transformers {transformers.__version__}, fp32",
        "tensors_equal": len(state),
        **agreement.record(),
        "routing_agreement": round(same_routes / max(routed, 1), 6),
        "texts_tokenized": len(TEXTS),
        "conversations_rendered": len(samples.CONVERSATIONS),
        "failures": failures,
        "passed": not failures,
        "_exact_mean_kl": agreement.mean_kl,
    }


def prove_gguf(
    path: Path,
    hf_folder: Path,
    file_type: str,
    config: ModelConfig,
    passages: list[Passage],
    tokenizer: Tokenizer,
    limits: Proof,
    log: Path,
) -> Record:
    """Read a GGUF file back, open it with llama.cpp and compare weights, distributions, token ids and template."""
    errors: dict[str, float] = {}
    failures = _first(list(differing_tensors(path, hf_folder, config, file_type, errors)))
    agreement, said = Agreement.empty(), _Surprise()
    with ExactLlama(path, max(len(p.ids) for p in passages) + 16, log, limits.threads) as llama:
        for passage, length in probes(passages, limits.gguf_positions):
            candidate = llama.log_probabilities(passage.ids[:length], config.vocab_size)
            reference = log_probabilities(passage.logits[length - 1])
            agreement.add(reference, candidate)
            said.add(passage.ids[length:], reference, candidate)
        failures += _compare("token ids", ((n, tokenizer.encode(t), llama.tokenize(t)) for n, t in TEXTS.items()))
        begun = [*tokenizer.prefix, *tokenizer.encode("a b")], llama.tokenize("a b", specials=True)
        failures += _compare("ids of a prompt", (("plain", *begun),))
        failures += _compare_conversations(
            tokenizer, lambda m, tools: llama.tokenize(llama.render(m, tools), specials=True)
        )
    failures += _gate(agreement, limits.limit(file_type), exact=file_type in EXACT)
    routes = routing_agreement(path, passages)
    if file_type in EXACT and routes["routing_agreement"] != 1:
        failures.append(f"llama.cpp chose other experts: agreement {routes['routing_agreement']:.4%}")
    return {
        "runtime": f"llama.cpp in xllamacpp {package_versions()['xllamacpp']}, fp32 cache, no flash attention",
        "bytes": path.stat().st_size,
        **agreement.record(),
        **said.record(),
        **routes,
        "plain_text_begins_with": list(tokenizer.prefix),
        "texts_tokenized": len(TEXTS),
        "conversations_rendered": len(samples.CONVERSATIONS),
        "failures": failures,
        "passed": not failures,
        "_exact_mean_kl": agreement.mean_kl,
        "_errors": errors,
    }


def routing_agreement(path: Path, passages: list[Passage]) -> dict[str, Any]:
    """Return the share of (token, layer) pairs for which llama.cpp chose the same experts, of all and by layer."""
    found = routing(path, [passage.ids for passage in passages])  # [MoE layers, T of all, k]
    wanted = np.concatenate([passage.chosen.numpy() for passage in passages], axis=1)
    same = (found == wanted).all(-1).mean(-1) if found.shape == wanted.shape else np.zeros(len(wanted))
    by_layer = [round(float(share), 4) for share in same]
    return {"routing_agreement": round(float(same.mean()), 6), "routing_agreement_by_layer": by_layer}


@dataclass
class _Surprise:
    """Negative log-probabilities of the tokens that followed, by our model and by a candidate."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def add(self, following: list[int], reference: np.ndarray, candidate: np.ndarray) -> None:
        """Count the token that follows, where there is one."""
        if following:
            self.ours.append(float(-reference[following[0]]))
            self.theirs.append(float(-candidate[following[0]]))

    def record(self) -> dict[str, float]:
        """Return both perplexities; ours is that of the model in fp32 with the weights of the BF16 file."""
        if not self.ours:
            return {}
        ours, theirs = (float(np.exp(np.mean(values))) for values in (self.ours, self.theirs))
        return {"perplexity": float(f"{theirs:.4g}"), "perplexity_of_the_model": float(f"{ours:.4g}")}


def probes(passages: list[Passage], count: int) -> list[tuple[Passage, int]]:
    """Choose (passage, prefix length) pairs: half at the ends of the longest two, where the window has passed,
    the rest over the ends of all others. Lengths of one passage follow each other, so each costs one token."""
    by_length = sorted(passages, key=lambda p: -len(p.ids))
    result = []
    for group, share in ((by_length[:2], count // 2), (by_length[2:], count - count // 2)):
        for index, passage in enumerate(group):
            # Evenly; a group larger than its share skips its last (shortest) members.
            wanted = share // len(group) + (index < share % len(group))
            first = max(1, len(passage.ids) - wanted + 1)
            result += [(passage, length) for length in range(first, len(passage.ids) + 1) if wanted]
    return result


def experts_reached(passages: list[Passage], config: ModelConfig) -> float:
    """Return the share of all routed experts that at least one token of the passages chose."""
    layers = len(passages[0].chosen)
    reached = sum(torch.cat([p.chosen[layer].flatten() for p in passages]).unique().numel() for layer in range(layers))
    return round(reached / (layers * config.num_experts), 4)


def _differing_weights(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> list[str]:
    """Compare what transformers holds after loading with what was to be exported, bit by bit."""
    lines = [f"transformers has no {name}" for name in ours if name not in theirs]
    lines += [f"transformers has {name}, we have not" for name in theirs if name not in ours]
    common = [name for name in ours if name in theirs]
    lines += [f"{n} differs in transformers" for n in common if not torch.equal(theirs[n].float(), ours[n])]
    return _first(lines)


def _gate(agreement: Agreement, limit: float, *, exact: bool) -> list[str]:
    lines = []
    if not agreement.mean_kl <= limit:
        lines.append(f"mean KL {agreement.mean_kl:.3g} over {len(agreement.kl)} positions, at most {limit:g} allowed")
    if exact and not all(agreement.best):
        lines.append(f"another best token at {agreement.best.count(False)} of {len(agreement.best)} positions")
    return lines


def _compare(what: str, triples: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return a line for each (name, ours, theirs) that is not equal, with the place of the first difference."""
    lines = []
    for name, ours, theirs in triples:
        if list(ours) != list(theirs):
            pairs = enumerate(zip(ours, theirs, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            around = slice(max(place - 2, 0), place + 6)
            lines.append(f"{what} of '{name}' differ at {place}: {ours[around]!r} here, {theirs[around]!r} there")
    return _first(lines)


def _compare_conversations(tokenizer: Tokenizer, rendered: Callable[[Any, Any], Any]) -> list[str]:
    """Compare each sample conversation, as ids ready for an answer, with the ids of a runtime."""
    return _compare(
        "rendered ids",
        (
            (name, chat.render_ids(tokenizer, messages, tools=tools, generation=True)[0], rendered(messages, tools))
            for name, (messages, tools) in samples.CONVERSATIONS.items()
        ),
    )


def _first(lines: list[str], count: int = 5) -> list[str]:
    return lines[:count] + ([f"and {len(lines) - count} more of this kind"] if len(lines) > count else [])


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and no advice while loading; what was set before is set again."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
