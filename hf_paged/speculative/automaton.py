"""SuffixAutomaton: every context of up to `max_depth` tokens that has occurred, what followed it and how often."""

from __future__ import annotations

from collections.abc import Iterable

ROOT = 0
"""The state of the empty context, where every text begins."""

_SHIFT = 32
_ONE = 1 << _SHIFT
_STATE = _ONE - 1


class SuffixAutomaton:
    """A suffix automaton (Blumer et al., 1985) of many texts that grow at the same time, cut off at `max_depth`.

    A state stands for the contexts that have occurred at the same places; `lengths` is that of the longest of them, and
    `links` leads to the state of the longest shorter context that has occurred elsewhere too. Whoever writes a text
    keeps the state that `advance` returned last: it is the longest suffix of the text, up to `max_depth` tokens, and so
    nobody ever searches. Contexts that agree in their last `max_depth` tokens are one, so a text that repeats what is
    known adds no states, chains of links are at most `max_depth` long, and a token costs the same wherever it comes.

    Counts are of edges, and come with what building does anyway: a token is counted in the longest context that it has
    followed before, and in all longer ones, where it is new (update exclusion, as in PPM). A short context thus counts
    in how many longer ones a token followed it, which is what one wants to know when no longer one is of help.

    Args:
        max_depth: tokens, at least 1.
    """

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        # A state is an index into all of these lists. Dicts of plain integers are nothing to the garbage collector.
        self._edges: list[dict[int, int]] = [{}]
        """token -> count << 32 | state."""
        self._likeliest: list[int] = [-1]
        """The token with the highest count, the latest of equals."""
        self._totals: list[int] = [0]
        """The sum of the counts."""
        self._links: list[int] = [-1]
        self._lengths: list[int] = [0]
        self._tables = self._edges, self._likeliest, self._totals, self._links, self._lengths

    @property
    def num_states(self) -> int:
        """At most two per token, and one."""
        return len(self._links)

    def advance(self, state: int, tokens: Iterable[int]) -> int:
        """The state of a text, given the one that it was in and the tokens that have been added to it since."""
        # One loop without calls: this is what a step of many sequences costs.
        edges, likeliest, totals, links, lengths = self._tables
        max_depth = self.max_depth
        for token in tokens:
            row = edges[state]
            new = -1
            if token not in row:
                length, shorter = lengths[state] + 1, links[state]
                if length > max_depth and lengths[shorter] == max_depth - 1 and token in edges[shorter]:
                    # Its last `max_depth` tokens have occurred together, after another token.
                    row[token] = self.advance(shorter, (token,))
                else:
                    new = len(links)
                    edges.append({})
                    likeliest.append(-1)
                    totals.append(0)
                    links.append(ROOT)
                    lengths.append(min(length, max_depth))
                    while state >= ROOT and token not in (row := edges[state]):
                        row[token] = _ONE | new
                        totals[state] += 1
                        if row.get(likeliest[state], 0) <= _ONE | _STATE:
                            likeliest[state] = token
                        state = links[state]
                    if state < ROOT:
                        state = new
                        continue
            # Here the token has followed `state` before, the longest context of the text of which that is true.
            edge = row[token] + _ONE
            row[token] = edge
            totals[state] += 1
            best = likeliest[state]
            if best != token and row.get(best, 0) <= edge | _STATE:
                likeliest[state] = token
            target = edge & _STATE
            length = lengths[state] + 1
            if lengths[target] > length and length <= max_depth:
                target = self._split(state, token, target, length)
            if new < 0:
                state = target
            else:
                links[new] = target
                state = new
        return state

    def draft(self, state: int, room: int, max_spec_factor: float, min_token_prob: float) -> list[int]:
        """What is likeliest to come after the longest suffix of a text that anything has come after.

        Args:
            state: the text's.
            room: tokens, at most.
            max_spec_factor: tokens per token of that suffix, at most.
            min_token_prob: the least estimated probability of a draft up to its last token.
        """
        edges, links = self._edges, self._links
        while not edges[state]:
            state = links[state]
            if state <= ROOT:
                return []
        room = min(room, int(self._lengths[state] * max_spec_factor))
        likeliest, totals = self._likeliest, self._totals
        probability = 1.0
        found: list[int] = []
        for _ in range(room):
            token = likeliest[state]
            if token < 0:
                break
            edge = edges[state][token]
            probability *= (edge >> _SHIFT) / totals[state]
            if probability < min_token_prob:
                break
            found.append(token)
            state = edge & _STATE
        return found

    def _split(self, state: int, token: int, target: int, length: int) -> int:
        """Parts the contexts of up to `length` tokens from the longer ones of `target`, now that they have occurred
        without them; those that `token` and a suffix of `state` make lead to the new state."""
        edges, likeliest, totals, links, lengths = self._tables
        new = len(links)
        edges.append(dict(edges[target]))
        likeliest.append(likeliest[target])
        totals.append(totals[target])
        links.append(links[target])
        lengths.append(length)
        links[target] = new
        while state >= ROOT:
            row = edges[state]
            edge = row[token]
            if edge & _STATE != target:
                break
            row[token] = edge + new - target
            state = links[state]
        return new
