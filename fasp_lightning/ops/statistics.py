"""Streaming second moments of a consumer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.basis import turned
from fasp_lightning.ops.devices import sums_halves
from fasp_lightning.ops.moments import Moments
from fasp_lightning.ops.symmetric import mirror

DOUBLE_LIMIT = 8192
"""Widest consumer whose gram is kept in float64; beyond it n² doubles cost more memory than they are worth."""

FLUSH_TOKENS = 8192
"""Tokens that are summed in float32 before they go to the float64 sum: short enough to round to ~1e-6."""

PANELS = 6
"""Column panels of the symmetric update: (PANELS + 1) / (2 · PANELS) = 58 % of the full product's work."""

PANEL_WIDTH = 128
"""Narrowest panel: below it, the calls cost more than the saved half of the product."""


class GramStatistics:
    """Gram matrix, column sums and token count of the inputs X of one consumer, batch after batch.

    Only the lower triangle is computed (X Xᵀ is symmetric); :meth:`gram` mirrors it. The statistics are sums
    over tokens, so those of several processes add up. A token of weight w counts in all of them as w tokens would.

    Args:
        columns: Their number n, one an input of the consumer.
        device: Where the sums live.

    Attributes:
        sums: (n,) Σ x.
        tokens: Σ weight over the rows seen; their number where none has a weight.
        rows: Number of rows seen, whatever they weigh.
    """

    def __init__(self, columns: int, device: torch.device | str) -> None:
        self.columns = columns
        dtype = torch.float64 if columns <= DOUBLE_LIMIT else torch.float32
        self._total = torch.zeros(columns, columns, dtype=dtype, device=device)
        self._partial: Tensor | None = None  # a float32 sum that is not in the float64 one yet
        self._pending = 0
        self.sums = torch.zeros(columns, dtype=torch.float64, device=device)
        self.tokens = 0.0
        self.rows = 0

    def update(self, inputs: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add the rows of one batch.

        Args:
            inputs: (tokens, n) consumer inputs, any floating dtype. Products of 16-bit values are exact in the
                float32 in which they are summed up within the batch.
            weight: How much each row counts: G grows by weight · X Xᵀ, the sums by weight · Σ x. Or (tokens,), a
                weight of its own for each.
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.columns:
            raise FaspError(f"inputs must be (tokens, {self.columns}), got {tuple(inputs.shape)}")
        self.rows += inputs.shape[0]
        self._pending += inputs.shape[0]
        wide = torch.float64 if inputs.device.type == "cpu" else torch.float32
        left = inputs = _summable(inputs)
        if isinstance(weight, Tensor):
            self.tokens += float(weight.sum(dtype=wide))
            self.sums += weight.to(wide) @ inputs.to(wide)
            left, weight = inputs.float() * weight.float().unsqueeze(1), 1.0
            inputs = inputs.float()
        else:
            self.tokens += weight * inputs.shape[0]
            self.sums += weight * inputs.sum(0, dtype=wide)
        total = self._total
        if total.dtype == torch.float64:
            if self._partial is None:
                self._partial = torch.zeros_like(total, dtype=torch.float32)
            total = self._partial
        step = max(PANEL_WIDTH, -(-self.columns // PANELS))
        for start in range(0, self.columns, step):
            end = min(start + step, self.columns)
            # rows start..end of the lower triangle: everything left of, and including, the diagonal block
            _add_product(total[start:end, :end], left[:, start:end].T, inputs[:, :end], weight)
        if self._pending >= FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._partial is not None:
            self._total += self._partial
        self._partial, self._pending = None, 0  # what it took up goes to the solve

    def join(self, add: Callable[[Tensor], None]) -> None:
        """Sum the statistics of several processes.

        Args:
            add: Sums a tensor over them, in place.
        """
        counts = torch.tensor([self.tokens, self.rows], dtype=torch.float64)
        for total in (self.lower, self.sums, counts):
            add(total)
        self.tokens, self.rows = float(counts[0]), int(counts[1])

    def add(self, other: GramStatistics) -> None:
        """Take in what another one, of as many columns, has seen."""
        for total, more in ((self.lower, other.lower), (self.sums, other.sums)):
            total += more
        self.tokens += other.tokens
        self.rows += other.rows

    def turned(self, blocks: Sequence[Tensor]) -> GramStatistics:
        """Those of the inputs B X, B block-diagonal.

        Args:
            blocks: Of B, see :func:`~fasp_lightning.ops.basis.turned`.
        """
        other = GramStatistics(self.columns, self.sums.device)
        other.lower.copy_(turned(turned(self.gram(), blocks, 0), blocks, 1))
        other.sums = turned(self.sums, blocks, 0)
        other.tokens, other.rows = self.tokens, self.rows
        return other

    @property
    def lower(self) -> Tensor:
        """(n, n) sum so far; the tensor itself, so that sums of several processes can be added in place."""
        self._flush()
        return self._total

    def gram(self) -> Tensor:
        """G = X Xᵀ, (n, n), float64 up to ``DOUBLE_LIMIT`` columns and float32 beyond.

        It is the sum itself, mirrored in place: later rows enter it.
        """
        return mirror(self.lower)

    def moments(self, centred: bool = False) -> Moments:
        """The gram, or that of the centred inputs."""
        return Moments(self.gram(), self.mean() if centred else None, self.tokens)

    def mean(self) -> Tensor:
        """Column means μ, (n,) float64."""
        return self.sums / (self.tokens or 1)

    def norms(self) -> Tensor:
        """Column norms ‖X_j‖₂, (n,) float64; not centred."""
        return self.lower.diagonal().double().clamp_min(0).sqrt()

    def is_finite(self) -> bool:
        """Whether no NaN or infinite input was seen: either one would show in its column's squared norm."""
        return bool(torch.isfinite(self.lower.diagonal()).all())


def _summable(inputs: Tensor) -> Tensor:
    """16-bit inputs stay as they are where the matmul itself sums in float32, and are upcast elsewhere."""
    halves = inputs.dtype in (torch.float16, torch.bfloat16)
    if halves and not sums_halves(inputs.device.type, inputs.dtype):
        return inputs.float()
    return inputs


def _add_product(total: Tensor, left: Tensor, right: Tensor, weight: float) -> None:
    """total += weight · left right. The product is weighted, not the operands: they would be rounded once more."""
    if left.dtype in (torch.float16, torch.bfloat16):
        # 16-bit operands, float32 sums and result
        total.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=weight)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=weight)
