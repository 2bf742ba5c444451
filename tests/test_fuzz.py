"""Random programs: no block is ever split, and most are as fine as they can be."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from random_programs import (
    ALONE,
    OPERATIONS,
    Verdict,
    check,
    dependence,
    entry_blocks,
    finest_partition,
    num_blocks,
    random_program,
    split_rows,
)

import pyronat

PROGRAMS, CHUNK = len(ALONE) + 90, 58
MIN_FINEST = 0.75
"""Least share of programs whose partition is the finest one."""
MIN_OPERATIONS = 48


@cache
def verdict(seed: int) -> Verdict:
    return check(random_program(seed, ALONE[seed] if seed < len(ALONE) else None))


@pytest.mark.parametrize("first", range(0, PROGRAMS, CHUNK))
def test_no_block_is_split(first: int) -> None:
    verdicts = [verdict(seed) for seed in range(first, min(first + CHUNK, PROGRAMS))]
    assert [v for v in verdicts if v.violation or v.error] == []


def test_share_of_finest_partitions() -> None:
    verdicts = [verdict(seed) for seed in range(PROGRAMS)]
    finest = sum(v.is_finest for v in verdicts)
    assert finest >= MIN_FINEST * PROGRAMS, [v for v in verdicts if not v.is_finest]
    # One block is trivially sound.
    assert sum(v.finest > 1 for v in verdicts) >= 0.4 * PROGRAMS


def test_many_operations_are_run() -> None:
    run = {name for seed in range(PROGRAMS) for name in verdict(seed).operations}
    assert run == set(OPERATIONS)
    assert len(run) >= MIN_OPERATIONS


# --- the check itself --------------------------------------------------------------------------


def test_programs_are_reproducible() -> None:
    for seed in range(10):
        first = random_program(seed)
        leaves = [(name, leaf.detach().clone()) for name, leaf in first.leaves()]
        coordinates = first.coordinates()
        second = random_program(seed)
        assert second.operations == first.operations and second.families == first.families
        assert [name for name, _ in leaves] == list(second.params)
        for (_, a), (_, b) in zip(leaves, second.leaves(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(first.args, second.args, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(coordinates, second.coordinates(), strict=True):
            assert torch.equal(a, b)


def test_a_wrong_partition_is_caught() -> None:
    """One block of the finest partition is split at random, and judged by draws of their own."""
    generator = torch.Generator().manual_seed(0)
    caught = tried = 0
    for seed in range(50):
        program = random_program(seed)
        found = torch.cat([dependence(program) for _ in range(6)])
        blocks = finest_partition(found)
        ids, sizes = blocks[blocks >= 0].unique(return_counts=True)
        if sizes.max() < 2:
            continue
        members = (blocks == ids[sizes.argmax()]).nonzero().reshape(-1)
        order = members[torch.randperm(len(members), generator=generator)]
        cut = int(torch.randint(1, len(members), (), generator=generator))
        wrong = blocks.index_fill(0, order[:cut], len(blocks))
        fresh = torch.cat([dependence(program) for _ in range(6)])
        tried += 1
        caught += bool(split_rows(fresh, wrong).any())
    assert tried > 25
    assert caught > 0.9 * tried


def test_a_missing_entry_is_caught() -> None:
    program = random_program(0, ["linear"])
    blocks = entry_blocks(pyronat.analyze(program.model, *program.args), program)
    found = dependence(program)
    assert not split_rows(found, blocks).any()
    used = found.any(0).nonzero()[0]
    assert split_rows(found, blocks.index_fill(0, used, -1)).any()


def test_finest_partition_by_hand() -> None:
    found = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    blocks = finest_partition(found)
    assert blocks[0] == blocks[1] == blocks[3] != blocks[2]
    assert blocks[4] == -1
    assert num_blocks(found, blocks) == 2
    assert not split_rows(found, blocks).any()
    assert split_rows(found, torch.tensor([0, 0, 1, 2, -1])).tolist() == [False, True, False]
    assert split_rows(found, torch.tensor([0, 0, -1, 0, -1])).tolist() == [False, False, True]
    # Coarser than finest is sound, if not fine.
    assert not split_rows(found, torch.zeros(5).long()).any()
