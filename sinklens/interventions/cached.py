"""Where a forward pass begins under a key-value cache, so that positions count from the prompt's first token.

``model.generate`` runs the prompt, and then every new token in a pass of its own, in which it lies at index 0. How many
tokens lie before a pass is how many keys its attention pattern has more than queries. Pitfalls: a hook in front of the
attention comes by before that is known, so that it goes by what was run before, and the pattern checks it; and what a
cache holds of a run without the hooks was not edited. Where either does not come out, the pass is refused. (The
cache of TransformerLens 3.9's ``HookedTransformer.generate`` is itself wrong for learned positions, such as GPT-2's.)
"""

from __future__ import annotations

from dataclasses import dataclass

from sinklens.errors import InputError

_WITHOUT = "leave the cache off (use_past_kv_cache=False)"


@dataclass(eq=False)
class Span:
    """The positions that the pass under way runs, as one hook in one block sees them."""

    what: str
    """The hook, for messages."""
    end: int = 0
    """Positions of the sequence under way that have been run with the hook so far."""
    keys: int | None = None
    """How many keys the pattern had, where it comes by before the hook."""
    assumed: tuple[int, int] | None = None
    """Where the hook took the pass to begin, and what length it found, until the pattern comes by."""

    def begins(self, length: int) -> int:
        """The position of the first of ``length`` tokens that are run; a pass may ask several times.

        Raises:
            InputError: one token alone, where no attention pattern says what lies before it.
        """
        if self.keys is not None:
            return self.keys - length
        if self.assumed is not None and length == 1 < self.assumed[1]:
            raise InputError(
                f"{self.what} cannot tell which position a single token has, since the model's attention computes no "
                f"pattern: {_WITHOUT}"
            )
        if self.assumed is None or self.assumed[1] != length:
            # More than one token are a new prompt, and one goes on where the last pass has ended.
            self.assumed = (self.end if length == 1 else 0, length)
        return self.assumed[0]

    def see(self, queries: int, keys: int) -> None:
        """Note what size a pattern has.

        Raises:
            InputError: it goes on from keys of a run without the hook, or not where the hook took it to begin.
        """
        first, before, assumed = keys - queries, self.end, self.assumed
        self.end, self.assumed = keys, None
        if first not in (0, before):
            raise InputError(
                f"{self.what} counts positions from the first token, but this pass goes on from a cache of {first} "
                f"positions, and {before} were run with it (or the cache keeps a sliding window alone): run the prompt "
                f"with the same hooks, or {_WITHOUT}"
            )
        if assumed is None:
            self.keys = keys
        elif assumed[0] + assumed[1] != keys:
            raise InputError(
                f"{self.what} took this pass to begin at position {assumed[0]}, but it begins at {first}: make the "
                f"hooks anew for it, or {_WITHOUT}"
            )
