"""Cases of two ranks that accumulate micro-batches, or search for a loss scale."""

import contextlib
import math

import pytest
import torch
from torch import distributed, nn

import fastguard
from fastguard import GradGuard, Verdict


class Given(nn.Module):
    """All elements of a gradient are the given number. ``sometimes`` has a gradient if ``also``."""

    def __init__(self):
        super().__init__()
        self.always = nn.Parameter(torch.zeros(2))
        self.sometimes = nn.Parameter(torch.zeros(3))
        self.never = nn.Parameter(torch.ones(1))

    def forward(self, x, also):
        total = (self.always * x).sum()
        return total + (self.sometimes * x).sum() if also else total


def windows_of_replicas(gradients, weights, synced, make=torch.optim.SGD, scaler=None, views=False):
    """Two windows of the same micro-batches; returns module, optimizer and the last report."""
    rank = distributed.get_rank()
    net = nn.parallel.DistributedDataParallel(
        Given(), find_unused_parameters=True, gradient_as_bucket_view=views
    )
    optimizer = make(net.parameters(), lr=1.0, weight_decay=0.5)
    guard = GradGuard(net, max_norm=math.inf, process_group=distributed.group.WORLD)
    bad = []
    for _ in range(2):
        optimizer.zero_grad(set_to_none=not views)
        for i, (value, weight) in enumerate(zip(gradients[rank], weights[rank], strict=True)):
            with contextlib.nullcontext() if i in synced else net.no_sync():
                loss = net(torch.tensor(value), also=rank == 1)
                (loss if scaler is None else scaler.scale(loss)).backward()
            bad.append(guard.accumulate(scaler=scaler, weight=weight).skipped)
        report = guard.step(optimizer, scaler=scaler).result()
    assert bad == [not math.isfinite(value) for value in gradients[rank]] * 2
    return net.module, optimizer, report


def a_window_of_replicas_is_the_mean_over_all_ranks():
    """Gradients 1 and 3 on two ranks give one step of -2 on both, with and without DDP's mean."""
    found = []
    for synced in ((), (0,), (0, 1)):
        for views in (False, True):
            ones = [[1.0, 1.0]] * 2
            given = [[1.0, 1.0], [3.0, 3.0]]
            net, _, report = windows_of_replicas(given, ones, synced, views=views)
            # First -2, then -2 + 0.5 * 2. A parameter that no rank reaches is not decayed either.
            assert net.always.tolist() == [-3.0] * 2 and net.never.tolist() == [1.0]
            assert net.sometimes.tolist() == [-1.5 - 1.5 + 0.75] * 3
            assert report.total_norm == pytest.approx(math.sqrt(2 * 2**2 + 3 * 1.5**2))
            found.append(report.total_norm.hex())
    assert found == found[:1] * 6
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    report = windows_of_replicas(given, ones, (), scaler=scaler)[-1]
    assert report.total_norm.hex() == found[0]
    assert scaler.get_scale() == 2.0**12  # there was no Inf, and no rank was told of one
    return found


def a_bad_micro_batch_of_one_rank_is_left_out_there_alone():
    """The weights are 1, 2 and 1 on one rank, and 1, 1 and 2 on the other."""
    found = []
    for bad, make in ((math.nan, torch.optim.SGD), (math.inf, fastguard.AdamW)):
        for synced in ((), (2,)):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            gradients = [[1.0, bad, 5.0], [3.0, 7.0, 11.0]]
            weights = [[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]
            net, optimizer, report = windows_of_replicas(gradients, weights, synced, make, scaler)
            mean = (1 + 5 + 3 + 7 + 11) / 6
            assert report.total_norm == pytest.approx(
                math.sqrt(2 * mean**2 + 3 * ((3 + 7 + 11) / 6) ** 2)
            )
            if make is fastguard.AdamW:
                moment = optimizer.state[net.always]["exp_avg"]
                torch.testing.assert_close(moment, torch.full((2,), 0.19 * mean))
            else:
                assert net.always.tolist() == [-mean - mean + 0.5 * mean] * 2
            assert len(report.skipped_micro_batches) == (distributed.get_rank() == 0)
            assert scaler.get_scale() == 2.0**8  # both ranks were told of it, in both windows
            found.append([net.always.tolist(), net.sometimes.tolist(), report.total_norm.hex()])
    return found


def a_window_that_is_bad_everywhere_is_skipped_everywhere():
    nan, ones = math.nan, [[1.0, 1.0]] * 2
    net, *_, report = windows_of_replicas([[nan, nan], [nan, math.inf]], ones, ())
    assert report.verdict is Verdict.SKIP_NONFINITE and report.all_micro_batches_skipped
    assert net.always.tolist() == [0.0] * 2
    net, *_, report = windows_of_replicas([[nan, nan], [nan, 4.0]], ones, ())
    assert net.always.tolist() == [-4.0 - 4.0 + 2.0] * 2
    return report.total_norm.hex()


def a_window_without_a_group_is_refused_under_no_sync():
    net = nn.parallel.DistributedDataParallel(Given(), find_unused_parameters=True)
    guard = GradGuard(net)
    with net.no_sync():
        net(torch.tensor(1.0), True).backward()
        with pytest.raises(ValueError, match=r"those of this rank alone.*process_group=torch"):
            guard.accumulate()
    with pytest.raises(ValueError, match=r"under DistributedDataParallel.no_sync\(\)"):
        guard.accumulate()
    assert net.module.always.grad.tolist() == [1.0, 1.0] and guard._window is None
    net.zero_grad()
    net(torch.tensor(1.0), True).backward()
    assert not guard.accumulate().skipped


def a_search_for_a_loss_scale_is_one_on_all_ranks():
    """No rank may run out of patience before the others."""
    inf, nan, rank = math.inf, math.nan, distributed.get_rank()
    weight = nn.Parameter(torch.zeros(2))
    optimizer, scaler = fastguard.AdamW([weight]), torch.amp.GradScaler("cpu", 2.0**20)
    guard = GradGuard([weight], process_group=distributed.group.WORLD)
    windows = [  # of each rank gradients and losses; whether all overflowed
        (([inf, inf], [None, 1.0]), ([inf, inf], [None, None]), True),
        (([inf, inf], [None, None]), ([inf, nan], [None, None]), False),
        (([inf, inf], [None, None]), ([inf, inf], [None, inf]), False),
        (([inf, inf], [None, None]), ([inf, 4.0], [None, None]), False),
        (([inf], [None]), ([1.0], [None]), True),  # without a window
        (([inf], [None]), ([1.0], [1.0]), True),
        (([inf], [None]), ([1.0], [inf]), False),
    ]
    found = []
    for *of_ranks, search in windows:
        values, losses = of_ranks[rank]
        for value, loss in zip(values, losses, strict=True):
            scaler.scale(torch.ones(()))
            weight.grad = torch.full((2,), value * scaler.get_scale())
            if len(values) > 1:
                micro_batch = guard.accumulate(scaler=scaler, loss=loss)
                assert micro_batch.scale_search == (value == inf and loss in (None, 1.0))
        loss = None if len(values) > 1 else loss
        report = guard.step(optimizer, scaler=scaler, loss=loss)
        assert report.scale_search == search
        found.append((report.skipped, report.scale_search, report.loss_scale))
    assert [skipped for skipped, *_ in found] == [True, True, True, False, True, True, True]
    return found
