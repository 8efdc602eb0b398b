"""RolloutHistory: what is kept, and what goes first."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from hf_paged.speculative.history import RolloutHistory

PROMPTS = [[1], [2, 2], [3, 3, 3], [4]]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 6)), max_size=40),
    st.integers(0, 3),
    st.integers(0, 20),
    st.integers(1, 3),
)
def test_the_least_recently_used_prompts_go_first(
    actions: list[tuple[bool, int, int]], max_prompts: int, max_tokens: int, max_rollouts: int
) -> None:
    history = RolloutHistory(max_prompts, max_tokens, max_rollouts)
    naive: OrderedDict[int, list[list[int]]] = OrderedDict()
    for count, (adds, which, length) in enumerate(actions):
        key = history.key(PROMPTS[which])
        if adds:
            rollout = [count] * length
            history.add(key, rollout)
            naive[which] = [*naive.pop(which, []), rollout][-max_rollouts:]
            while len(naive) > max_prompts or _size(naive) > max_tokens:
                naive.popitem(last=False)
        else:
            found = [list(rollout) for rollout in history.use(key)]
            assert found == naive.get(which, [])
            if which in naive:
                naive.move_to_end(which)
        assert len(history) == len(naive) <= max_prompts
        assert history.num_tokens == _size(naive) <= max_tokens


def _size(naive: OrderedDict[int, list[list[int]]]) -> int:
    return sum(len(PROMPTS[which]) + sum(map(len, rollouts)) for which, rollouts in naive.items())


def test_clear_forgets_everything() -> None:
    history = RolloutHistory(2, 100, 2)
    history.add(history.key([1]), [2, 3])
    history.clear()
    assert len(history) == history.num_tokens == 0
    assert history.use(history.key([1])) == []
