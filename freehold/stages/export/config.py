"""The settings of the export stage."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from freehold.core.config import Config
from freehold.ledger.policy import Use

FileType = Literal["F32", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M"]


class Generation(Config):
    """How the exported model likes to be sampled; goes to `generation_config.json`. Trinity Preview's values."""

    temperature: float = Field(default=0.8, ge=0, description="0 means greedy.")
    top_p: float = Field(default=0.8, gt=0, le=1, description="Share of probability kept.")
    top_k: int = Field(default=50, ge=0, description="Tokens kept; 0 keeps all.")


MAX_KL: dict[str, float] = {
    "HF": 1e-8, "F32": 1e-8, "BF16": 0.05, "Q8_0": 0.05, "Q6_K": 0.1, "Q5_K_M": 0.1, "Q4_K_M": 0.2, "Q4_0": 0.3,
    "Q3_K_M": 0.5,
}  # fmt: skip
"""Mean KL allowed by default. HF and F32 compute in fp32 as we do: what is left there is rounding of sums."""
EXACT = ("HF", "F32")
Positive = Annotated[float, Field(gt=0)]


class Proof(Config):
    """How the exports are compared with the model itself, and what they must reach.

    KL is that from our model (the exported weights, computed in fp32) to the candidate, in nats per position.
    """

    max_kl: dict[str, Positive] = Field(
        default_factory=dict,
        description=f"Mean KL allowed, by file type (and HF); a type not named here: {MAX_KL}.",
    )
    gguf_positions: int = Field(
        default=48, ge=8, description="Next-token distributions asked of llama.cpp for each file."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Of our model and transformers in the proof; auto: CUDA where there is one."
    )
    threads: int = Field(
        default=1, ge=1, description="Threads of our model, transformers and llama.cpp; more wait on a busy machine."
    )

    @pydantic.field_validator("max_kl")
    @classmethod
    def _known(cls, limits: dict[str, float]) -> dict[str, float]:
        if unknown := limits.keys() - MAX_KL.keys():
            raise ValueError(f"no such type: {min(unknown)}; known: {', '.join(MAX_KL)}")
        return limits

    def limit(self, kind: str) -> float:
        """Return the mean KL allowed to a file type, or to `HF`."""
        return {**MAX_KL, **self.max_kl}[kind]


class Calibration(Config):
    """The importance matrix that quantized files are made with: from held-out text and sample conversations."""

    tokens: int = Field(default=0, ge=0, description="At most this much text; 0 = no importance matrix.")
    candidates: int = Field(
        default=1, ge=1, le=16,
        description="Times `tokens` of text to choose from: what reaches seldom used experts is taken first.",
    )  # fmt: skip
    floor_tokens: int = Field(
        default=16, ge=0, description="The median expert of every layer must see this many, or the export fails."
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
        description="What the exported files must be free for, in addition to the uses of gather's policy: every row "
        "the checkpoint learned from is judged again.",
    )
    licence: str = Field(default="", description="SPDX expression of the weights, stated next to the GGUF files.")
    calibration: Calibration = Field(default_factory=Calibration, description="Importance matrix for quantized files.")
    generation: Generation = Field(default_factory=Generation, description="Goes to generation_config.json.")
    proof: Proof = Field(default_factory=Proof, description="What every export must reach.")


def plan(config: ExportConfig) -> list[str]:
    """Say what an export of this config writes and when it fails."""
    files = ", ".join(f"{config.name}-{kind}.gguf" for kind in config.types) or "no GGUF file"
    lines = [f"{config.checkpoint} as Hugging Face folder ({config.dtype}) and {files}"]
    lines.append(
        f"fails unless transformers{' and llama.cpp (F32)' if 'F32' in config.types else ''} agree with our model: "
        f"mean KL <= {config.proof.limit('HF'):g}, same best token, same token ids"
    )
    if config.calibration.tokens:
        lines.append(f"importance matrix from at most {config.calibration.tokens:,} tokens of held-out text")
    if "F32" not in config.types:
        lines.append("without F32 the GGUF conversion is proven only as exactly as the other types compute")
    return lines
