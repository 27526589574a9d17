"""Freehold's adapter to the conformance suite: the real training loop, nothing replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from balance_adapter import Forward, Routed, Rows, Setup, poison
from torch import Tensor

from freehold.core.log import Log
from freehold.data.packing import Batch
from freehold.model.afmoe import Afmoe
from freehold.model.config import ModelConfig
from freehold.optim.balance import NoBalance
from freehold.optim.config import NoBalanceConfig, OptimConfig, PhaseConfig, SignConfig, SmebuConfig
from freehold.optim.schedule import Schedule
from freehold.trainer.config import TrainerConfig
from freehold.trainer.job import Job
from freehold.trainer.loop import Trainer
from freehold.trainer.validate import HeldOut, bits_per_byte


class FreeholdAdapter:
    """One Trainer; steps, validation and gradients are its own."""

    rules: ClassVar[tuple[str, ...]] = ("smebu", "sign")
    losses: ClassVar[tuple[str, ...]] = ("sequence_loss", "z_loss", "router_z_loss")

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        model = ModelConfig(
            vocab_size=setup.vocabulary, hidden_size=setup.width, intermediate_size=2 * setup.width,
            moe_intermediate_size=setup.expert_width, num_hidden_layers=setup.layers,
            num_dense_layers=setup.dense_layers, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            num_experts=setup.experts, num_experts_per_tok=setup.top_k, route_scale=setup.route_scale,
            sliding_window=8, max_position_embeddings=64,
        )  # fmt: skip
        losses = {"sequence_loss": setup.sequence_loss, "router_z_loss": setup.router_z_loss}
        balance = {
            "smebu": SmebuConfig(rate=setup.rate, **losses),
            "sign": SignConfig(rate=setup.rate, **losses),
            "": NoBalanceConfig(**losses),
        }[setup.rule]
        job = Job(
            folder=Path(),
            model=model,
            trainer=TrainerConfig(dtype="float32", threads=1, z_loss=setup.z_loss, recompute=setup.recompute),
            optim=OptimConfig(
                muon_lr=setup.muon_lr,
                muon_weight_decay=setup.weight_decay,
                weight_decay=setup.weight_decay,
                clip_norm=1e9,
            ),
            balance=balance,
            schedule=Schedule({"stable": PhaseConfig(steps=1000)}),
            order=None,  # type: ignore[arg-type]  # rows are handed in
            micro_sequences=0,
            stage="pretrain",
            parent="",
        )
        with mock.patch("freehold.trainer.state.Afmoe", without_memory if setup.meta else Afmoe):
            self.trainer = Trainer(job, Log(quiet=True), seed=setup.seed)
        self.moe = {int(name.split(".")[2]): layer for name, layer in self.trainer.state.moe_layers.items()}

    @property
    def moe_layers(self) -> list[int]:
        return sorted(self.moe)

    def step(self, rows: Rows) -> None:
        self.report(rows)

    def report(self, rows: Rows) -> dict[str, Any]:
        """Run a step and return what the loop writes to metrics.jsonl."""
        rows_at_once = len(rows.ids) // self.setup.micro_batches
        passes = self.trainer.forward_backward
        passes.job = dataclasses.replace(passes.job, micro_sequences=rows_at_once)
        return self.trainer.train_step(Batch(*(tensor.numpy() for tensor in rows)))

    def evaluate(self, rows: Rows) -> None:
        bits_per_byte(self.trainer.model, {"text": HeldOut(Batch(*(tensor.numpy() for tensor in rows)), 1)})

    def gradients(self, rows: Rows) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def look(factor: float, scale: float) -> None:
            found.update({n: m.grad * scale for n, m in self.trainer.state.masters.items() if m.grad is not None})

        with (
            mock.patch.object(self.trainer.state.optimizers, "step", look),
            mock.patch.object(self.trainer.update, "balance", NoBalance()),
        ):
            self.step(rows)
        return self._named(found)

    def apply(self, gradients: Mapping[str, Tensor]) -> None:
        views = self._named({n: torch.zeros_like(m) for n, m in self.trainer.state.masters.items()}, owners := {})
        for name, gradient in gradients.items():
            views[name].copy_(gradient)
        for name in gradients:
            owner, whole = owners[name]
            self.trainer.state.masters[owner].grad = whole
        self.trainer.state.optimizers.step(1.0)
        for master in self.trainer.state.masters.values():
            master.grad = None
        self.trainer.state.publish()

    @torch.no_grad()
    def forward(self, rows: Rows) -> Forward:
        model, layers = self.trainer.model.eval(), {}
        shape = rows.ids.shape

        def keep(layer: int) -> Any:
            def hook(_: Any, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
                logits, weights, chosen = outputs
                layers[layer] = Routed(*(x.unflatten(0, shape) for x in (inputs[0], logits, chosen, weights)))

            return hook

        routers = {int(name.split(".")[2]): moe.router for name, moe in model.moe_layers().items()}
        hooks = [router.register_forward_hook(keep(layer)) for layer, router in routers.items()]
        hidden = model.hidden(rows.ids, document_ids=rows.documents)
        for hook in hooks:
            hook.remove()
        return Forward(hidden, layers)

    def weights(self) -> dict[str, Tensor]:
        return self._named({n: m.detach().clone() for n, m in self.trainer.state.masters.items()})

    def counts(self, layer: int) -> Tensor:
        return self.moe[layer].load_counts.clone()

    def bias(self, layer: int) -> Tensor:
        return self.moe[layer].expert_bias.clone()

    def set_bias(self, layer: int, values: Tensor) -> None:
        self.moe[layer].expert_bias.copy_(values)

    def _named(self, tensors: Mapping[str, Tensor], owners: dict[str, tuple[str, Tensor]] | None = None) -> Any:
        """Return views of the suite's names into tensors of ours; `owners` gets the tensor each view belongs to."""
        views: dict[str, Tensor] = {}

        def give(name: str, owner: str, view: Any) -> None:
            if owner in tensors:
                views[name] = view(tensors[owner])
                if owners is not None:
                    owners[name] = (owner, tensors[owner])

        give("head", "lm_head.weight", lambda w: w)
        for layer in self.moe_layers:
            mlp = f"model.layers.{layer}.mlp"
            give(f"router.{layer}", f"{mlp}.router.gate.weight", lambda w: w)
            for e in range(self.setup.experts):
                give(f"gate.{layer}.{e}", f"{mlp}.experts.gate_up_proj", lambda w, e=e: w[e].chunk(2)[0])
                give(f"up.{layer}.{e}", f"{mlp}.experts.gate_up_proj", lambda w, e=e: w[e].chunk(2)[1])
                give(f"down.{layer}.{e}", f"{mlp}.experts.down_proj", lambda w, e=e: w[e])
        return views


def without_memory(config: ModelConfig) -> Afmoe:
    """Build the model on the meta device, then give it memory that holds nothing of use."""
    with torch.device("meta"):
        model = Afmoe(config)
    model = model.to_empty(device="cpu")
    poison(model)
    return model
