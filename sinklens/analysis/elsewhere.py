"""The same rule elsewhere: does what a part says depend on the token, or on the length, that it was asked at?

What is measured at several tokens or lengths anyway can be judged at each for nothing. The part's own outcome stays
what its stated rule says; where it would be another elsewhere, the part says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sinklens.chain.rules import Condition, Part, judged
from sinklens.records.text import join


def elsewhere(part: Part, others: Mapping[str, Sequence[Condition]]) -> Part:
    """A part that says in its ``detail`` whether its rule says the same at other places.

    Args:
        part: the part.
        others: the conditions of its rule at each other place, by a name that can stand behind "at": ``32 tokens``.
    """
    if not others or part.outcome == "not measurable":
        return part
    places: dict[str, list[str]] = {}
    for place, conditions in others.items():
        places.setdefault(judged(conditions), []).append(place)
    same = places.pop(part.outcome, [])
    told = [f"{outcome} at {join(names)}" for outcome, names in places.items()]
    told += [f"the same at {join(same)}"] if same else []
    head = "it depends on where one asks: " if places else ""
    return replace(part, detail="; ".join([*([part.detail] if part.detail else []), f"{head}{', '.join(told)}"]))
