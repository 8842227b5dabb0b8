"""The guard where processes train together (gloo): FSDP2's shards, replicas of DDP.

A case is a function of ``rank_cases``, ``rank_windows`` or ``rank_states``. It runs on every rank
of one spawn, one case after the other, and returns what must be equal on all of them.
"""

import datetime
import functools
import json
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed

from fastguard.guard import distributed as sharded

from . import rank_states
from .rank_cases import (
    a_gradient_that_one_rank_lacks_is_counted,
    a_report_counts_on_all_ranks_and_has_places_of_this_one,
    a_scaler_backs_off_on_all_ranks,
    a_window_leaves_out_what_was_bad_on_one_rank,
    adagc_has_a_coefficient_for_each_parameter,
    ddp_replicas_stay_equal,
    fsdp_goes_as_one_process_does,
    gradients_that_are_sums_yet_to_be_made_are_made,
    one_all_reduce_and_no_dispatch_of_dtensors,
    replicas_count_once,
    shards_go_back_together,
    states_go_through_torchs_checkpoints,
    what_is_not_for_shards_is_refused,
    without_a_group_ddp_replicas_would_part,
)
from .rank_masters import (
    masters_go_through_torchs_checkpoints,
    masters_of_shards_step_as_float32_copies,
)
from .rank_states import (
    guards_and_moments_are_loaded,
    guards_and_moments_are_saved,
    meshes_of_a_part_of_the_ranks_decide_apart,
    replicas_of_shards_count_once,
)
from .rank_windows import (
    a_bad_micro_batch_of_one_rank_is_left_out_there_alone,
    a_search_for_a_loss_scale_is_one_on_all_ranks,
    a_window_of_replicas_is_the_mean_over_all_ranks,
    a_window_that_is_bad_everywhere_is_skipped_everywhere,
    a_window_without_a_group_is_refused_under_no_sync,
)
from .ranks import ROOT

CASES = {
    2: [
        fsdp_goes_as_one_process_does,
        masters_of_shards_step_as_float32_copies,
        masters_go_through_torchs_checkpoints,
        replicas_count_once,
        adagc_has_a_coefficient_for_each_parameter,
        a_report_counts_on_all_ranks_and_has_places_of_this_one,
        one_all_reduce_and_no_dispatch_of_dtensors,
        a_gradient_that_one_rank_lacks_is_counted,
        a_window_leaves_out_what_was_bad_on_one_rank,
        a_scaler_backs_off_on_all_ranks,
        gradients_that_are_sums_yet_to_be_made_are_made,
        states_go_through_torchs_checkpoints,
        shards_go_back_together,
        guards_and_moments_are_saved,
        what_is_not_for_shards_is_refused,
        ddp_replicas_stay_equal,
        without_a_group_ddp_replicas_would_part,
        a_window_of_replicas_is_the_mean_over_all_ranks,
        a_bad_micro_batch_of_one_rank_is_left_out_there_alone,
        a_window_that_is_bad_everywhere_is_skipped_everywhere,
        a_window_without_a_group_is_refused_under_no_sync,
        a_search_for_a_loss_scale_is_one_on_all_ranks,
    ],
    1: [guards_and_moments_are_loaded],
    4: [
        guards_and_moments_are_loaded,
        replicas_of_shards_count_once,
        meshes_of_a_part_of_the_ranks_decide_apart,
    ],
}


def test_tensors_are_added_up_in_buckets_of_one_dtype(monkeypatch):
    monkeypatch.setattr(sharded, "_BUCKET_ELEMENTS", 5)
    sizes = [3, 2, 4, 1, 9, 1]
    dtypes = [torch.float32] * 3 + [torch.float64] * 3
    tensors = [torch.zeros(n, dtype=t) for n, t in zip(sizes, dtypes, strict=True)]
    assert [list(map(len, b)) for b in sharded._buckets(tensors)] == [
        [3, 2],
        [4],
        [1, 9],
        [1],
    ]
    assert list(sharded._buckets([])) == []


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """By number of ranks: of each rank what every case returned, up to the first that failed."""
    together = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda size: spawn(size, together))


def spawn(size, folder):
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.guard.test_distributed"]
    store = folder / f"store_{size}"
    ranks = [
        subprocess.Popen(
            [*command, str(store), str(rank), str(size)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / f"errors_{size}_{rank}").open("w"),
            text=True,
        )
        for rank in range(size)
    ]
    alarm = threading.Timer(240, lambda: [rank.kill() for rank in ranks])
    alarm.start()
    try:
        lines = [rank.stdout.readline() for rank in ranks]
    finally:
        alarm.cancel()
        for rank in ranks:
            rank.kill()
            rank.communicate()
    for i, line in enumerate(lines):
        assert line, f"rank {i} ended:\n{(folder / f'errors_{size}_{i}').read_text()}"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "size, case",
    [
        pytest.param(size, case.__name__, marks=[pytest.mark.slow] * (size > 2))
        for size, cases in CASES.items()
        for case in cases
    ],
)
def test_on_ranks(size, case, answers):
    answers(2)  # saves what the others load
    failed = {rank: found["failed"] for rank, found in enumerate(answers(size))}
    here = {rank: text for rank, text in failed.items() if text and text[0] == case}
    assert not here, "\n".join(f"rank {rank}:\n{text[1]}" for rank, text in here.items())
    first, *others = [found["passed"].get(case, "not reached") for found in answers(size)]
    assert first != "not reached" and others == [first] * (size - 1)


def main(store, rank, size):
    rank_states.shared = Path(store).parent
    torch.set_num_threads(1)
    store = distributed.FileStore(store, int(size))
    distributed.init_process_group(
        "gloo",
        store=store,
        rank=int(rank),
        world_size=int(size),
        timeout=datetime.timedelta(seconds=20),
    )
    passed, failed = {}, None
    for case in CASES[int(size)]:
        try:
            passed[case.__name__] = case()
        except BaseException:
            failed = case.__name__, traceback.format_exc()
            break
    print(json.dumps({"passed": passed, "failed": failed}), flush=True)
    # No rank ends by itself: gloo's threads crash now and then, some while their interpreter shuts
    # down, some when another rank goes first.
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
