"""Settings of the server; imports without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from freehold.core.config import Config
from freehold.guard.config import GuardConfig

KEY_VARIABLE = "FREEHOLD_API_KEY"
"""Environment variable: when set, requests must carry `Authorization: Bearer <its value>`."""


class ServeConfig(Config):
    """The server, and the one question the walk asks it."""

    path: Path | None = Field(
        None, description="Checkpoint, run folder, HF folder or .gguf file; default in a run: its aligned checkpoint."
    )
    tokenizer: Path | None = Field(
        None, description="Folder of the tokenizer for a .gguf file; default: its own folder, or ../hf."
    )
    backend: Literal["auto", "vllm"] = Field(
        "auto",
        description="What computes; auto = our engine, llama.cpp for a .gguf file; vllm = a server at `endpoint`.",
    )
    endpoint: str = Field(
        "http://127.0.0.1:8001/v1", description="Of vLLM: its OpenAI-compatible address; PATH is the folder it serves."
    )
    command: str | None = Field(
        None, description="Of vLLM: the command that starts it, and is ended with us; default: it runs already."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 = every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 = any free one. A run takes a free one.")
    model_name: str | None = Field(None, description="Name clients ask for; default: the folder's or file's name.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number format to compute in.")
    adapters: dict[str, Path] = Field(
        default_factory=dict,
        description="Adapters to serve next to the model, by name: clients ask for `model: NAME:ADAPTER`.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where it computes; auto = CUDA if there is some, and says so. A .gguf file: llama.cpp's own.",
    )
    max_model_len: int | None = Field(
        None, gt=0, description="Longest context in tokens, prompt and answer together; default: the model's."
    )
    cache_mib: int | None = Field(
        None, gt=0, description="Memory for keys and values; default: 64 full contexts, at most half of what is free."
    )
    cache_type: Literal["auto", "int8"] = Field(
        "auto", description="Numbers of keys and values; auto = dtype, int8 = 8 bits: half of the memory of bfloat16."
    )
    prefix_cache: bool = Field(
        True, description="Keep keys and values of prompts for later ones that begin the same; changes no answer."
    )
    max_running: int | None = Field(
        None, gt=0, description="Requests answered at the same time; default: as many as the memory allows, at most 64."
    )
    max_queue: int = Field(256, gt=0, description="Requests that may wait; one more is answered with status 429.")
    queue_timeout_s: float = Field(
        120, gt=0, description="Seconds a request may wait before it begins; then status 429 says when to try again."
    )
    dialect: Literal["auto", "hermes", "xml"] = Field(
        "auto", description="How tool calls are read; auto = as recorded with the model's chat template."
    )
    calls_in_reasoning: bool | None = Field(
        None, description="Whether a tool call while the model thinks counts; default: as recorded, else yes."
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description='Web pages that may ask from a browser, as http://localhost:3000; "*" = any. Empty: none.',
    )
    guard: GuardConfig = Field(
        default_factory=GuardConfig,
        description="Policies on prompts, tool results and answers: docs/guardrails.md.",
    )
    question: str = Field("What is the capital of France?", description="What the walk asks, over HTTP.")


def plan(config: ServeConfig) -> list[str]:
    """Return what --dry-run says."""
    model = config.path or "this run's aligned checkpoint"
    return [f"serves {model} once, asks {config.question!r}, keeps the answer in answer.json"]
