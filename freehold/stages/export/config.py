"""What the export stage can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from freehold.core.config import Config
from freehold.ledger.policy import Use

FileType = Literal["F32", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M"]


class Generation(Config):
    """How the exported model likes to be sampled; goes to `generation_config.json`. Trinity Preview's values."""

    temperature: float = Field(default=0.8, ge=0, description="0 means greedy.")
    top_p: float = Field(default=0.8, gt=0, le=1, description="Share of probability kept.")
    top_k: int = Field(default=50, ge=0, description="Tokens kept; 0 keeps all.")


class Proof(Config):
    """How the exports are compared with the model itself, and what they must reach.

    KL is that from our model (the exported weights, computed in fp32) to the candidate, in nats per position.
    """

    max_kl_exact: float = Field(
        default=1e-8, gt=0, description="Mean KL allowed where both compute in fp32: HF and F32."
    )
    max_kl_bf16: float = Field(
        default=0.05, gt=0, description="Mean KL allowed to the BF16 file (activations in bf16)."
    )
    max_kl_q8_0: float = Field(default=0.05, gt=0, description="Mean KL allowed to the Q8_0 file.")
    max_kl_q6_k: float = Field(default=0.1, gt=0, description="Mean KL allowed to the Q6_K file.")
    max_kl_q5_k_m: float = Field(default=0.1, gt=0, description="Mean KL allowed to the Q5_K_M file.")
    max_kl_q4_k_m: float = Field(default=0.2, gt=0, description="Mean KL allowed to the Q4_K_M file.")
    max_kl_q4_0: float = Field(default=0.3, gt=0, description="Mean KL allowed to the Q4_0 file.")
    max_kl_q3_k_m: float = Field(default=0.5, gt=0, description="Mean KL allowed to the Q3_K_M file.")
    gguf_positions: int = Field(
        default=48, ge=8, description="Next-token distributions asked of llama.cpp for each file."
    )
    threads: int = Field(
        default=1, ge=1, description="Threads of our model, transformers and llama.cpp; more wait on a busy machine."
    )


class ExportConfig(Config):
    """Export: the model in Hugging Face form and as GGUF, both proven against our own, or refused."""

    checkpoint: str = Field(default="align/preview", description="`<stage>/<checkpoint>` to export.")
    name: str = Field(
        default="Freehold", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Of the model and its files."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Of the matrices in every export; gains and expert biases stay fp32."
    )
    types: tuple[FileType, ...] = Field(
        default=("F32", "BF16", "Q8_0"),
        description="GGUF files to write. F32 holds the same (rounded) weights in fp32 and is the one proven exactly.",
    )
    uses: tuple[Use, ...] = Field(
        default=(),
        description="What the exported files must be free for, besides the uses of gather's policy: every row the "
        "checkpoint learned from is judged again.",
    )
    generation: Generation = Field(default_factory=Generation, description="Goes to generation_config.json.")
    proof: Proof = Field(default_factory=Proof, description="What every export must reach.")


def plan(config: ExportConfig) -> list[str]:
    """Say what an export of this config writes and when it fails."""
    files = ", ".join(f"{config.name}-{kind}.gguf" for kind in config.types) or "no GGUF file"
    lines = [f"{config.checkpoint} as Hugging Face folder ({config.dtype}) and {files}"]
    lines.append(
        f"fails unless transformers{' and llama.cpp (F32)' if 'F32' in config.types else ''} agree with our model: "
        f"mean KL <= {config.proof.max_kl_exact:g}, same best token, same token ids"
    )
    if "F32" not in config.types:
        lines.append("without F32 the GGUF conversion is proven only as exactly as the other types compute")
    return lines
