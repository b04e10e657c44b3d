"""How far the estimates of a screened sweep can be trusted: by a random sample of its cells, which were run exactly.

The strongest were run, too, but say nothing here: they were chosen by the estimates that are to be judged.
"""

from __future__ import annotations

import pandas as pd

from sinklens.attribution.screening import rank_correlations


def judge(verified: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The table of :meth:`sinklens.SweepResult.judged`, of the rows that were run exactly."""
    keys = ["readout", "patch", "kind"]
    sample = pd.DataFrame(verified[verified.sampled], columns=[*keys, "estimate", "effect"])
    sample = pd.DataFrame(sample.groupby(keys, observed=True, sort=False, as_index=False).mean()).dropna()
    rows = []
    for readout, mine in sample.groupby("readout", observed=True, sort=False):
        row = {"readout": readout, "n": len(mine)}
        for name, found in rank_correlations(mine.estimate.to_numpy(), mine.effect.to_numpy(), seed).items():
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append({**row, "largest_missed": mine.effect[mine.kind == "sample"].abs().max()})
    return pd.DataFrame(rows)
