"""When a sink emerges: the same measures over checkpoints of one model, in the order in which it was trained.

    sinklens analyse emergence --models runs/lab/softmax-0
    sinklens analyse emergence --model EleutherAI/pythia-160m --models EleutherAI/pythia-160m@step{0,512,1000,4000}

Attention to the first token and the norm of its residual stream are said to appear together, in a short stretch of
training (Queipo-de-Llano et al., arXiv 2510.06477; Gu et al., arXiv 2410.10781, between steps 1,000 and 2,000). So the
two must rise and fall together over checkpoints, on every prompt; another token of the same prompt is the control.

Prompts are tokens of `--model`, whose tokenizer all checkpoints share; a folder that `sinklens train` wrote stands for
its checkpoints.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites
from sinklens.models.view import device_of, dtype_of

CLAIM = "Attention to the first token and the norm of its residual stream emerge together in training."
CAPTION = (
    "Over training: attention that a token receives (mean over heads and blocks), share of the heads in which it is "
    "more than the threshold, the largest norm of its residual stream over that of others, and the loss; means over "
    "prompts. The other token stands a quarter into the prompt."
)
FEWEST = 4
"""Checkpoints of which an order says anything."""


def run(
    study: sl.Study,
    *,
    models: Annotated[
        tuple[str, ...], "checkpoints in the order of training: folders, a run of `sinklens train`, or id@revision"
    ] = (),
    threshold: Annotated[float, sl.Between(0, 1), "attention that makes a head a sink head"] = 0.3,
) -> sl.Findings:
    names = expanded(models)
    if len(names) < FEWEST:
        raise sl.NotApplicableError(
            f"{len(names)} checkpoints were named, and their order says nothing below {FEWEST}: name more (models=)"
        )
    device, dtype = device_of(study.model), dtype_of(study.model)
    measures = []
    for name in names:
        model = sl.load_model(name, device=device, dtype=dtype)
        measures.append(measured(sl.Study(model, sl.prompts.from_tokens(model, study.batch.tokens)), threshold))
    curves = {name: np.stack([of_one[name].numpy() for of_one in measures]) for name in measures[0]}
    first, other = (together(curves[f"{who} attention"], curves[f"{who} norm"]) for who in ("first", "other"))
    share, control = study.mean(first), study.mean(other)
    part = sl.analysis.judge(
        "quantity",
        "together",
        CLAIM,
        statistic=f"rank correlation of attention and norm over {len(names)} checkpoints, mean over prompts",
        estimate=share,
        control="the same of another token of the prompt",
        control_estimate=control,
        rule="holds when the whole interval lies above one half and above the control's",
        conditions=[sl.analysis.above(share, 0.5), sl.analysis.above(share, control)],
    )
    steps = [step_of(name, number) for number, name in enumerate(names)]
    verdict = sl.analysis.verdict_of(CLAIM, [part])
    return sl.Findings(verdict, table(names, steps, curves), CAPTION, onsets(steps, curves))


Measures = dict[str, Float[Tensor, " prompt"]]
"""One checkpoint's, by name, with the token in front: ``first attention``."""


def measured(study: sl.Study, threshold: float) -> Measures:
    """Of every prompt: attention (Gu et al.'s alpha, mean over heads and blocks), share of heads above the threshold,
    and the largest norm of a block's residual stream over that of the other tokens; for the first token and for one a
    quarter into the prompt. And the loss.
    """
    blocks = tuple(range(study.shape.n_layers))
    tokens = {"first": 0, "other": study.batch.length // 4}
    places = list(tokens.values())
    targets = study.batch.tokens[:, 1:]
    readings = study.measure(
        [
            sl.Readout("alpha", sites.PATTERN, blocks, lambda a, _: _alpha(a)[..., places]),
            sl.Readout("norm", sites.RESID_POST, blocks, lambda x, _: x.float().norm(dim=-1)),
            sl.Readout(
                "loss", sites.LOGITS, (len(blocks),), lambda x, rows: _loss(x, targets[rows.prompts].to(x.device))
            ),
        ]
    )
    norms, measures = readings["norm"], {"loss": readings["loss"][0]}
    for (who, place), alpha in zip(tokens.items(), readings["alpha"].unbind(-1), strict=True):
        others = (norms.sum(-1) - norms[..., place]) / (norms.shape[-1] - 1)
        measures[f"{who} attention"] = alpha.mean((0, 2))
        measures[f"{who} sink heads"] = (alpha > threshold).float().mean((0, 2))
        measures[f"{who} norm"] = (norms[..., place] / others).amax(0)
    return measures


def _alpha(pattern: Float[Tensor, "row head query key"]) -> Float[Tensor, "row head key"]:
    return metrics.alpha(metrics.normalised_rows(pattern)[0])


def _loss(logits: Float[Tensor, "row pos d_vocab"], targets: Tensor) -> Float[Tensor, " row"]:
    chances = logits[:, :-1].float().log_softmax(-1)
    return -chances.gather(-1, targets.to(logits.device)[..., None]).squeeze(-1).mean(-1)


def together(
    attention: Float[np.ndarray, "checkpoint prompt"], norm: Float[np.ndarray, "checkpoint prompt"]
) -> Float[np.ndarray, " prompt"]:
    """Spearman's rank correlation over checkpoints, prompt by prompt; 0 where one of the two never changes."""
    ranks = [rankdata(values, axis=0) for values in (attention, norm)]
    a, b = (rank - rank.mean(0) for rank in ranks)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), size, out=np.zeros_like(size), where=size > 0)


def expanded(models: tuple[str, ...]) -> list[str]:
    """The checkpoints that are meant."""
    names: list[str] = []
    for name in models:
        of_run = sl.lab.checkpoints(Path(name))
        names += map(str, of_run.values()) if of_run else [name]
    return names


def step_of(name: str, number: int) -> int:
    """The step in a checkpoint's name (``step-000100``, ``step143000``); its number in the list where there is none."""
    digits = re.search(r"step[-_]?(\d+)/?$", name)
    return int(digits[1]) if digits else number


def table(names: list[str], steps: list[int], curves: dict[str, np.ndarray]) -> pd.DataFrame:
    """A row for every checkpoint and measure: mean over prompts."""
    rows = []
    for measure, values in curves.items():
        token, _, quantity = measure.partition(" ") if measure != "loss" else ("all", "", "loss")
        for name, step, value in zip(names, steps, values.mean(1), strict=True):
            rows.append({"checkpoint": name, "step": step, "token": token, "quantity": quantity, "value": float(value)})
    return pd.DataFrame(rows)


def onsets(steps: list[int], curves: dict[str, np.ndarray]) -> dict[str, float]:
    """The first step at which the first token has half of what it has at the last."""
    first_steps = {}
    for quantity in ("attention", "norm"):
        values = curves[f"first {quantity}"].mean(1)
        first_steps[f"step at which its {quantity} is half of the last"] = float(
            steps[int((values >= values[-1] / 2).argmax())]
        )
    return first_steps


def draw(findings: sl.Findings):
    titles = {"step": "step", "value": ""}
    figure = sl.viz.line(findings.table, "step", "value", series="token", facet="quantity", titles=titles)
    return figure.update_yaxes(matches=None, showticklabels=True)


ANALYSIS = sl.Analysis(
    name="emergence",
    title="When the sink emerges in training",
    claim=CLAIM,
    run=run,
    draw=draw,
    alone=True,
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
