"""Who gets which request."""

from __future__ import annotations

import random

import pytest

from hf_paged.distributed.routing import Router


def make_router(replicas: int = 2, num_pages: int = 64, max_num_seqs: int = 8) -> Router:
    return Router(replicas, page_size=4, num_pages=num_pages, max_num_seqs=max_num_seqs)


def add(
    router: Router, name: str, prompt: list[int], samples: int = 1, max_tokens: int = 10, priority: int = 0
) -> None:
    router.add(name, (priority, len(router._requests)), prompt, samples, max_tokens)


def take_all(router: Router) -> dict[str, int]:
    """Who got what."""
    found = {}
    while (taken := router.take()) is not None:
        assert taken[0] not in found
        found[taken[0]] = taken[1]
    return found


def test_where_the_least_is_left_to_do() -> None:
    router = make_router()
    for place, length in enumerate([100, 10, 20, 20]):
        add(router, str(place), [place] * length)
    assert take_all(router) == {"0": 0, "1": 1, "2": 1, "3": 1}
    router.done("0")
    add(router, "next", [7] * 3)
    assert take_all(router) == {"next": 0}


def test_a_common_beginning_stays_together_until_others_have_less_to_do() -> None:
    router = make_router(max_num_seqs=64)
    add(router, "other", [9] * 100)
    for place in range(12):
        add(router, str(place), [8] * 40 + [place] * 4, max_tokens=5)
    found = take_all(router)
    together = [found[str(place)] for place in range(12)]
    # 110 tokens are left to do on the first replica; on the second the beginning, once, and 9 a request. To take the
    # beginning over costs the first one 40 more.
    assert together == [1] * 12
    assert router._replicas[1].tokens == 40 + 12 * 9
    for place in range(12, 16):
        add(router, str(place), [8] * 40 + [place] * 4, max_tokens=5)
    found = take_all(router)
    assert [found[str(place)] for place in range(12, 16)] == [1, 0, 1, 0]


def test_a_prompt_goes_where_its_beginning_was_computed() -> None:
    router = make_router()
    add(router, "one", [1] * 40)
    add(router, "other", [2] * 40)
    assert take_all(router) == {"one": 0, "other": 1}
    router.done("one")
    router.done("other")
    add(router, "again", [2] * 40 + [5])
    assert take_all(router) == {"again": 1}
    router.done("again")
    router.forget_prefixes()
    add(router, "forgotten", [2] * 40 + [5])
    assert take_all(router) == {"forgotten": 0}


def test_beginnings_beyond_what_fits_are_forgotten() -> None:
    router = make_router(1, num_pages=12)
    for place in range(3):
        add(router, str(place), [place] * 40)
        assert router._replicas[0].tokens == 50, "none of it is known"
        router.done(str(place))
    assert len(router._replicas[0].prefixes) == 12
    add(router, "end of the last", [2] * 40)
    assert router._replicas[0].tokens == 10
    router.done("end of the last")
    add(router, "first", [0] * 40)
    assert router._replicas[0].tokens == 50


def test_no_more_than_there_is_room_for() -> None:
    """6 samples beside each other; a request is whole. Priority goes first, then arrival."""
    router = make_router(max_num_seqs=4)
    for place in range(6):
        add(router, str(place), [place], samples=3)
    add(router, "urgent", [9] * 30, samples=3, priority=-1)
    found = take_all(router)
    assert "urgent" in found and len(found) == 4
    assert router.num_waiting == 3 and router.take() is None
    router.done("5")  # aborted
    router.done("urgent", [10, 10, 10])
    assert len(take_all(router)) == 1 and router.num_waiting == 1


def test_who_has_nothing_takes_what_waits_for_others() -> None:
    router = make_router(max_num_seqs=2)
    add(router, "long", [1] * 500)
    for place in range(10):
        add(router, str(place), [place + 5] * 4)
    first = take_all(router)
    assert first["long"] == 0 and set(first.values()) == {0, 1}, "the first one has nothing else waiting, and takes"
    for name in [name for name in first if name != "long"]:
        router.done(name, [10])
    while router.num_waiting:
        found = take_all(router)
        assert found
        for name in found:
            router.done(name, [10])
    router.done("long")
    assert all(replica.tokens == 0 for replica in router._replicas.values())


def test_what_waits_for_a_lost_one_goes_elsewhere() -> None:
    router = make_router(max_num_seqs=1)
    for place in range(8):
        add(router, str(place), [place])
    given = take_all(router)
    lost = [name for name, number in given.items() if number == 0]
    router.lose(0)
    for name in lost:
        router.done(name)
        add(router, name, [3])
    assert router.num_waiting == 8 - len(given) + len(lost)
    for name in given.keys() - set(lost):
        router.done(name)
    found = set()
    while taken := take_all(router):
        assert set(taken.values()) == {1}
        found |= taken.keys()
        for name in taken:
            router.done(name)
    assert len(found) == 8 - len(given) + len(lost)


def test_lengths_are_learnt() -> None:
    router = make_router()
    add(router, "a", [1], max_tokens=10_000)
    assert router._replicas[0].tokens == 1 + 256
    router.done("a", [20])
    add(router, "b", [1], samples=2, max_tokens=10_000)
    assert router._replicas[0].tokens == 1 + 2 * 20


@pytest.mark.parametrize("seed", range(20))
def test_what_was_given_comes_back(seed: int) -> None:
    """Random arrivals, ends and losses: counts are of what is there, and nobody waits while there is room."""
    rng = random.Random(seed)
    router = make_router(3, max_num_seqs=5)
    there: dict[str, tuple[int, int]] = {}
    waiting: dict[str, int] = {}
    alive = {0, 1, 2}
    for number in range(300):
        if rng.random() < 0.01 and len(alive) > 1:
            lost = rng.choice(sorted(alive))
            alive.remove(lost)
            router.lose(lost)
            for name in [name for name, (replica, _) in there.items() if replica == lost]:
                router.done(name)
                waiting[name] = there.pop(name)[1]
                add(router, name, [5] * 20, waiting[name], 40)
        elif there and rng.random() < 0.5:
            name = rng.choice(sorted(there))
            del there[name]
            router.done(name, [rng.randrange(50)])
        elif waiting and rng.random() < 0.2:
            name = rng.choice(sorted(waiting))
            del waiting[name]
            router.done(name)
        else:
            waiting[str(number)] = rng.randrange(1, 4)
            add(router, str(number), [rng.randrange(3)] * rng.randrange(1, 60), waiting[str(number)], 40)
        for name, replica in take_all(router).items():
            assert replica in alive
            there[name] = replica, waiting.pop(name)
        held = {replica: sum(n for place, n in there.values() if place == replica) for replica in alive}
        assert held == {replica: router._replicas[replica].samples for replica in alive}
        assert not waiting or all(count >= 5 for count in held.values())
        assert router.num_waiting == len(waiting)
    for name in [*there, *waiting]:
        router.done(name)
    assert all(replica.tokens == 0 == replica.num_waiting for replica in router._replicas.values())


def test_requests_with_an_adapter_meet_until_others_have_much_less_to_do() -> None:
    router = make_router(max_num_seqs=64)

    def add_adapted(name: str, adapter: int) -> int:
        router.add(name, (0, len(router._requests)), [7] * 3, 1, 17, adapter)
        return take_all(router)[name]

    assert [add_adapted(f"a{n}", 1) for n in range(4)] == [0] * 4
    assert [add_adapted(f"b{n}", 2) for n in range(4)] == [1] * 4
    assert add_adapted("c", 1) == 0
    found = [add_adapted(f"more {n}", 1) for n in range(20)]
    assert found[0] == 0 and 1 in found, "the adapter comes to the other one too, when that has much less to do"
    for name in list(router._requests):
        router.done(name)
    assert not any(replica.adapters for replica in router._replicas.values())


def test_adapters_have_no_beginning_in_common() -> None:
    router = make_router()
    pages = [router._pages([1] * 12, adapter) for adapter in (0, 1, 2)]
    assert len({page for each in pages for page in each}) == 9
