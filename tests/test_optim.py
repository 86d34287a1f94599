"""Row-sparse Adam: what it must share with Adam, and where it must differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitstep.stages.optim import RowSparseAdam


def _tables() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(6, generator=generator)) for _ in range(3)]


def _gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(6, generator=generator) for _ in range(3)]


def test_it_is_adam_when_every_row_is_visited() -> None:
    ours, theirs = _tables(), _tables()
    sparse, dense = RowSparseAdam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for step in range(5):
        for tables, optimizer in ((ours, sparse), (theirs, dense)):
            for table, gradient in zip(tables, _gradients(step), strict=True):
                table.grad = gradient
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_each_row_moves_as_if_it_were_alone() -> None:
    """Rows visited in turn end where Adam puts each of them from its own gradients only; dense Adam drifts on."""
    table, row_alone = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    sparse, alone = RowSparseAdam([table], lr=0.1), torch.optim.Adam([row_alone], lr=0.1)
    for step in range(6):
        gradient = torch.zeros(2)
        gradient[step % 2] = 1.0 + step
        before = table.detach().clone()
        table.grad = gradient
        sparse.step()
        assert table[1 - step % 2] == before[1 - step % 2]
        if step % 2 == 0:
            row_alone.grad = gradient[:1].clone()
            alone.step()
    torch.testing.assert_close(table[:1], row_alone)


def test_state_survives_saving() -> None:
    def run(interrupted: bool) -> Tensor:
        tables = _tables()
        optimizer = RowSparseAdam(tables, lr=0.1)
        for step in range(4):
            if interrupted and step == 2:
                saved = optimizer.state_dict()
                optimizer = RowSparseAdam(tables, lr=0.1)
                optimizer.load_state_dict(saved)
            for table, gradient in zip(tables, _gradients(step), strict=True):
                table.grad = gradient * (torch.arange(6) % 2 == step % 2)
            optimizer.step()
        return torch.stack([table.detach() for table in tables])

    assert torch.equal(run(False), run(True))
