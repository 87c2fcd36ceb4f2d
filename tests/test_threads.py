# SPDX-License-Identifier: Apache-2.0
"""Work on several threads: in order, at most so many, and without traces."""

import os
import threading
import time

import pytest
import torch

from transformers_mcmoe import threads
from transformers_mcmoe.threads import at_once, each, workers


@pytest.fixture
def four(monkeypatch):
    """Four threads, and cores for them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_items_are_worked_on_at_once_and_come_in_order(four):
    meet = threading.Barrier(2)

    def work(n):
        meet.wait(timeout=60)  # needs another at work
        return n, torch.get_num_threads(), threading.get_ident()

    found = list(each(work, range(6), 2))
    assert [n for n, _, _ in found] == list(range(6))
    assert {share for _, share, _ in found} == {2}, "four threads are shared by two"
    assert threading.get_ident() not in {thread for _, _, thread in found}
    assert torch.get_num_threads() == 4


def test_one_at_a_time_stays_in_the_callers_thread(four):
    found = each(lambda n: (threading.get_ident(), torch.get_num_threads()), range(6), 1)
    assert list(found) == [(threading.get_ident(), 4)] * 6


@pytest.mark.parametrize("items", [0, 1, 2, 9])
@pytest.mark.parametrize(("most", "share"), [(2, 2), (3, 2), (4, 1), (100, 1)])
def test_an_items_threads_do_not_depend_on_how_many_items_there_are(four, items, most, share):
    assert list(each(lambda n: torch.get_num_threads(), range(items), most)) == [share] * items


@pytest.mark.parametrize(
    ("threads", "most", "found"),
    [(15, 8, (7, 2)), (8, 5, (4, 2)), (64, 8, (8, 8)), (2, 8, (2, 1)), (1, 8, (1, 1)), (8, 1, (1, 8))],
)
def test_no_thread_is_idle_but_what_does_not_divide(monkeypatch, threads, most, found):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert workers(most) == found


def test_bound_threads_work_one_after_the_other(four, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert workers(8) == (1, 4)
    assert list(each(lambda n: threading.get_ident(), range(3), 8)) == [threading.get_ident()] * 3


def test_an_error_comes_through_and_ends_it(four):
    begun = []

    def work(n):
        begun.append(n)
        time.sleep(0.01)
        raise ValueError(f"item {n}")

    with pytest.raises(ValueError, match="item 0"):
        list(each(work, range(1000), 2))
    assert len(begun) < 100
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("grad", [False, True])
def test_threads_have_the_callers_gradient_mode(four, grad):
    with torch.set_grad_enabled(grad):
        assert list(each(lambda n: torch.is_grad_enabled(), range(4), 4)) == [grad] * 4


def test_tensors_of_inference_mode_can_be_changed(four):
    with torch.inference_mode():
        x = torch.zeros(4)
        list(each(lambda n: x[n].add_(n), range(4), 4))
    assert x.tolist() == [0, 1, 2, 3]


def test_threads_that_begin_later_have_all(four):
    list(each(lambda n: n, range(4), 4))
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [4]


def test_how_many_at_once(monkeypatch):
    monkeypatch.setattr(threads, "COPIES", 1000)
    cpu = torch.device("cpu")
    assert [at_once(n, cpu) for n in (100, 400, 1000, 5000)] == [10, 2, 1, 1]
    assert at_once(100, torch.device("cuda")) == 1
