"""RolloutHistory: what was generated for which prompt, until memory runs out."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable


class RolloutHistory:
    """The latest rollouts of many prompts, four bytes per token. Prompts not used for longest are dropped first.

    Args:
        max_prompts: prompts kept.
        max_tokens: tokens kept, prompts included.
        max_rollouts: rollouts kept per prompt.
    """

    def __init__(self, max_prompts: int, max_tokens: int, max_rollouts: int) -> None:
        self.max_prompts = max_prompts
        self.max_tokens = max_tokens
        self.max_rollouts = max_rollouts
        self.num_tokens = 0
        self._rollouts: OrderedDict[bytes, deque[array[int]]] = OrderedDict()
        """Least recently used prompts first, oldest rollouts first."""

    def __len__(self) -> int:
        return len(self._rollouts)

    @staticmethod
    def key(prompt_token_ids: Iterable[int]) -> bytes:
        """The name of a prompt."""
        return array("i", prompt_token_ids).tobytes()

    def add(self, key: bytes, rollout: Iterable[int]) -> None:
        """Keeps what was generated for a prompt."""
        rollouts = self._rollouts.get(key)
        if rollouts is None:
            rollouts = self._rollouts[key] = deque()
            self.num_tokens += len(key) // 4
        self._rollouts.move_to_end(key)
        rollouts.append(array("i", rollout))
        self.num_tokens += len(rollouts[-1])
        if len(rollouts) > self.max_rollouts:
            self.num_tokens -= len(rollouts.popleft())
        while len(self._rollouts) > self.max_prompts or self.num_tokens > self.max_tokens:
            dropped, theirs = self._rollouts.popitem(last=False)
            self.num_tokens -= len(dropped) // 4 + sum(map(len, theirs))

    def use(self, key: bytes) -> list[array[int]]:
        """The rollouts of a prompt, oldest first; none of an unknown one."""
        if key not in self._rollouts:
            return []
        self._rollouts.move_to_end(key)
        return list(self._rollouts[key])

    def clear(self) -> None:
        """Forgets everything."""
        self._rollouts.clear()
        self.num_tokens = 0
