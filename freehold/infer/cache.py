"""The key/value cache: ring buffers of one window for sliding layers, growing buffers for global layers.

Shapes: B rows, T new tokens a row, S slots or keys, H key/value heads, D head width.

Rows are independent. A row's tokens arrive in order of position, from 0, without gaps; position -1 is padding
and may stand anywhere. So rows of different lengths (right-padded prompts) share a batch, a long prompt can
arrive in pieces, and the position of what lies in a slot follows from how far its row has come.
Slot 0 of every buffer is a bin for padding and for what a window has already left behind; it is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.core.errors import RequestError
from freehold.model.config import ModelConfig

FIRST_SLOTS = 256


@dataclass(frozen=True)
class _Step:
    """What all layers of one kind share in one forward pass."""

    slots: Tensor
    """[B,T] where each new key goes; 0 = the bin."""
    mask: Tensor | None
    """[B,1,T,S] bool, True = may look; None = every query may look at every key."""
    column: int | None
    """The one slot all rows write to, when they are equally long and bring one token each."""


class KVCache:
    """Keys and values of B rows, as attention asks for them: `update(layer, k, v, positions)`.

    Global layers grow up to `max_tokens`; a token beyond it raises RequestError. Layers must be called in
    ascending order in each forward pass, all with the same positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.window = config.sliding_window
        self.max_tokens = max_tokens
        self.sliding = [kind == "sliding_attention" for kind in config.layer_types or ()]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        """Tokens each row has seen."""
        self._shape = (config.num_key_value_heads, config.head_dim)
        self._dtype, self._device = dtype, device
        ring_slots = min(self.window, max_tokens)
        first = min(FIRST_SLOTS, max_tokens)
        self._ring_slots = ring_slots
        self._keys = [self._buffer(batch, ring_slots if sliding else first) for sliding in self.sliding]
        self._values = [self._buffer(batch, ring_slots if sliding else first) for sliding in self.sliding]
        self._rows = torch.arange(batch, device=device)[:, None]
        self._before = self.lengths
        self._longest = 0
        self._fresh = self._level = False
        self._steps: dict[bool, _Step] = {}
        self._last_layer = len(self.sliding)

    def update(self, layer_index: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep new keys and values [B,H,T,D] at `positions` [B,T]; return all keys, values and who may look.

        The mask is [B,1,T,S] bool (True = may look), or None when every query may look at every key.
        Padding queries look at something, so that they stay finite; nothing looks at them.
        """
        if layer_index <= self._last_layer:
            self._begin(positions)
        self._last_layer = layer_index
        sliding = self.sliding[layer_index]
        step = self._steps.get(sliding)
        if step is None:
            step = self._steps[sliding] = self._plan_sliding(positions) if sliding else self._plan_global(positions)
        keys, values = self._keys[layer_index], self._values[layer_index]
        if sliding:
            return self._update_sliding(keys, values, k, v, step)
        if keys.shape[2] <= self._longest:
            keys = self._keys[layer_index] = self._grown(keys)
            values = self._values[layer_index] = self._grown(values)
        self._write(keys, k, step)
        self._write(values, v, step)
        return keys[:, :, 1 : self._longest + 1], values[:, :, 1 : self._longest + 1], step.mask

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """Forget a finished row; the last row takes its place."""
        last = len(self.lengths) - 1
        for buffer in [self.lengths, *self._keys, *self._values]:
            buffer[row] = buffer[last]
        self.lengths, self._rows = self.lengths[:last], self._rows[:last]
        self._keys = [buffer[:last] for buffer in self._keys]
        self._values = [buffer[:last] for buffer in self._values]
        self._longest = int(self.lengths.max()) if last else 0
        self._last_layer = len(self.sliding)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(buffer.nbytes for buffer in [*self._keys, *self._values])

    def _begin(self, positions: Tensor) -> None:
        """Take note of a new forward pass: how long every row was before it and is after it."""
        self._before = self.lengths
        last = positions.amax(dim=1)
        self.lengths = torch.maximum(self.lengths, last + 1)
        self._fresh = self._longest == 0
        shortest, self._longest = (int(n) for n in self.lengths.aminmax())
        if self._longest > self.max_tokens:
            raise RequestError(
                "more tokens than the cache was made for", found=self._longest, expected=f"at most {self.max_tokens}"
            )
        # One token for every row, all equally long: no mask is needed as long as nothing lies outside a window.
        self._level = positions.shape[1] == 1 and shortest == self._longest and bool((last >= 0).all())
        self._steps = {}

    def _plan_global(self, positions: Tensor) -> _Step:
        if self._level:
            return _Step(positions + 1, None, self._longest)
        keys = torch.arange(self._longest, device=positions.device)
        mask = (keys <= positions[..., None]) | (positions < 0)[..., None]
        return _Step(positions + 1, mask[:, None], None)

    def _plan_sliding(self, positions: Tensor) -> _Step:
        slots_count, window = self._ring_slots, self.window
        new_tokens = positions.shape[1]
        # Of more new tokens than a window holds, only the last stay.
        stays = (positions >= 0) & (positions >= self.lengths[:, None] - slots_count)
        slots = torch.where(stays, positions % slots_count + 1, 0)
        if self._level:
            return _Step(slots, None, (self._longest - 1) % slots_count + 1)
        # One token: it is written first, then its row's ring is read. More: the old ring and the new keys are read.
        known = self.lengths if new_tokens == 1 else self._before
        slot = torch.arange(slots_count, device=positions.device)
        # The last position below `known` that lies in each slot; negative when none has come yet.
        held = known[:, None] - 1 - (known[:, None] - 1 - slot) % slots_count
        if new_tokens > 1:
            held = positions if self._fresh else torch.cat([held, positions], dim=1)
        query, key = positions[..., None], held[:, None, :]
        mask = (key >= 0) & (key <= query) & (key > query - window) | (query < 0)
        return _Step(slots, mask[:, None], None)

    def _update_sliding(
        self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, step: _Step
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if k.shape[2] == 1:
            self._write(keys, k, step)
            self._write(values, v, step)
            used = min(self._longest, self._ring_slots) if step.mask is None else self._ring_slots
            return keys[:, :, 1 : used + 1], values[:, :, 1 : used + 1], step.mask
        all_k, all_v = k, v
        if not self._fresh:
            all_k, all_v = torch.cat([keys[:, :, 1:], k], dim=2), torch.cat([values[:, :, 1:], v], dim=2)
        self._write(keys, k, step)
        self._write(values, v, step)
        return all_k, all_v, step.mask

    def _write(self, buffer: Tensor, new: Tensor, step: _Step) -> None:
        if step.column is not None:
            buffer[:, :, step.column] = new[:, :, 0]
        else:
            buffer[self._rows, :, step.slots] = new.transpose(1, 2)

    def _buffer(self, batch: int, slots: int) -> Tensor:
        heads, width = self._shape
        # Zeros, not whatever memory held: a masked key counts 0 times its value, and 0 times NaN is NaN.
        return torch.zeros(batch, heads, slots + 1, width, dtype=self._dtype, device=self._device)

    def _grown(self, buffer: Tensor) -> Tensor:
        slots = min(self.max_tokens, max(self._longest, 2 * (buffer.shape[2] - 1)))
        grown = self._buffer(buffer.shape[0], slots)
        grown[:, :, : buffer.shape[2]] = buffer
        return grown
