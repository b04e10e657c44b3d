"""What a stage is, and what it may know.

A :class:`Stage` is made of functions of a :class:`Setting`, and a Setting makes readouts of a Stage: they define each
other. Stages are written against the Setting, so that a stage says only *where* and *what*; which run is patched and
where the source comes from follows from the pair and the direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from jaxtyping import Float
from torch import Generator, Tensor

from sinklens.edits.base import Edit
from sinklens.edits.general import OfSource
from sinklens.engine.capture import capture_runs
from sinklens.engine.store import ActivationStore, Want
from sinklens.errors import InputError, NotApplicableError
from sinklens.formation import Formation
from sinklens.formation.result import READOUT_BLOCKS
from sinklens.models.identities import identities
from sinklens.models.view import BlockWeights, Model, ModelShape
from sinklens.pairs.ablations import EditContext, EditLike, make_edit, read_edit
from sinklens.pairs.choice import DIRECTIONS, Direction, PairChoice
from sinklens.pairs.pair import SinkPair, make_pair
from sinklens.patches import Patch, Source, Where
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
from sinklens.readouts.build import vector_readout
from sinklens.records.registry import check_kind, enter
from sinklens.sites import LN1_NORMALIZED, RESID_POST, HookSite, K, Q, Z
from sinklens.study import Study

Vectors: TypeAlias = dict[int, Float[Tensor, "prompt unit *rest"]]
"""By block, the activation at one position of every prompt."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What a stage may know."""

    study: Study
    """The model, the prompts, and what was found in them."""
    pair: SinkPair
    """The runs with and without the sink."""
    readout_layers: tuple[int, ...]
    """Blocks just after formation in which the metric is measured."""
    _stores: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, study: Study, choice: PairChoice, readout_blocks: int = READOUT_BLOCKS) -> Setting:
        """The runs that were chosen, on a study's prompts.

        Raises:
            InputError: a choice that does not fit the prompts (see :func:`sinklens.make_pair`).
            NotApplicableError: the formation block is the last.
        """
        pair = make_pair(choice, study.model, study.batch, study.formation, seed=study.seed, max_rows=study.max_rows)
        return cls(study, pair, study.after_formation(readout_blocks))

    @property
    def model(self) -> Model:
        """The model."""
        return self.study.model

    @property
    def batch(self) -> PromptBatch:
        """The prompts."""
        return self.study.batch

    @property
    def formation(self) -> Formation:
        """Formation block, super neurons, outlier dimensions, sink positions."""
        return self.study.formation

    @property
    def neurons(self) -> tuple[int, ...]:
        """The super neurons.

        Raises:
            NotApplicableError: none are known, as in models without a dense MLP.
        """
        return self.study.neurons

    @property
    def shape(self) -> ModelShape:
        """The sizes of the model."""
        return self.study.shape

    @property
    def weights(self) -> BlockWeights:
        """The weights of the formation block."""
        return self.study.weights(self.formation.layer)

    @property
    def max_rows(self) -> int:
        """Rows for one forward pass."""
        return self.study.max_rows

    @property
    def up_to_formation(self) -> tuple[int, ...]:
        """All blocks up to the formation block, itself included."""
        return self.study.up_to_formation

    @property
    def through_readout(self) -> tuple[int, ...]:
        """The blocks after the formation block, up to the last one in which the metric is measured."""
        return tuple(range(self.formation.layer + 1, max(self.readout_layers) + 1))

    def patch(
        self,
        direction: Direction,
        site: HookSite,
        layers: Sequence[int],
        edit: Edit,
        *,
        units: Sequence[int] | None = None,
        positions: Where | None = None,
    ) -> Patch:
        """A patch at the target (or at other ``positions``), from the run and source that the direction implies."""
        run, source = self.pair.ends(direction)
        if positions is not None and source.positions is None:
            source = Source(source.run, positions)
        return Patch(
            site=site,
            layers=tuple(layers),
            positions=self.pair.target if positions is None else positions,
            edit=edit,
            units=None if units is None else tuple(units),
            run=run,
            source=source if edit.uses_source else None,
            # With the mechanism taken away the source may well be what is there already: that is an effect of 0.
            allow_unchanged=isinstance(edit, OfSource),
        )

    def edit(
        self, direction: Direction, edit: EditLike, site: HookSite, layers: Sequence[int], *, seed: int | None = None
    ) -> Edit:
        """An edit by its name (:data:`sinklens.pairs.EDITS`), made for a site in some blocks of this pair.

        Args:
            direction: which of the two runs is patched.
            edit: the edit, or its name.
            site: where it will be applied.
            layers: in which blocks.
            seed: fixes every draw; the study's by default.

        Raises:
            InputError: an unknown name or direction.
        """
        if direction not in DIRECTIONS:
            raise InputError(f"direction {direction!r} must be {' or '.join(DIRECTIONS)}")
        context = EditContext(
            model=self.model,
            batch=self.batch,
            pair=self.pair,
            site=site,
            layers=tuple(layers),
            seed=self.study.seed if seed is None else seed,
            max_rows=self.max_rows,
            direction=direction,
        )
        return make_edit(read_edit(edit), context)

    def removal(self, direction: Direction, edit: Edit, within: Sequence[int] | None = None) -> Edit:
        """An edit that takes the mechanism away, for either direction.

        Noise: ``edit`` on the run that has the sink. Denoise: the activation of that run with the mechanism taken
        away, put into the run without (``within``: the units that are edited while all are transplanted).
        """
        if direction == "noise":
            return edit
        return OfSource(edit.name, edit, None if within is None else tuple(within))

    def readout(
        self,
        stage: Stage,
        function: Callable[[Tensor, int], Tensor],
        *,
        layers: Sequence[int] | None = None,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> Readout:
        """A stage's readout: ``function(vector [row, unit, ...], block)`` of its activation at the target.

        Averaged over ``layers`` (the stage's own by default), unless ``combine`` makes one number of them otherwise.
        """
        layers = stage.layers(self) if layers is None else layers
        return vector_readout(stage.name, stage.site, layers, self.pair.target, self.batch.n, function, combine)

    def activations(self, run: str, site: HookSite, layers: Sequence[int]) -> ActivationStore:
        """A run's activations at all positions in some blocks, captured once and kept.

        Use ``.tensor(run, site, layer)`` (``[prompt, pos, unit, ...]``) or ``.at(run, site, layer, positions)``.
        """
        key = (run, site, tuple(layers))
        if key not in self._stores:
            self.keep(run, [(site, layers)])
        return self._stores[key]

    def keep(self, run: str, asked: Iterable[tuple[HookSite, Sequence[int]]]) -> None:
        """Capture what is going to be asked of a run (:meth:`activations`, :meth:`at`) at several sites in one pass."""
        # One pass serves whatever the stages of the chain ask of a run: it is the pass that costs, not the keeping.
        together = dict.fromkeys((run, site, tuple(blocks)) for site, blocks in (*self._asked_most(), *asked))
        wants = dict.fromkeys(Want(run, site, block) for _, site, blocks in together for block in blocks)
        runs = {run: self.pair.runs[run]}
        store = capture_runs(self.model, self.batch.tokens, runs, list(wants), max_rows=self.max_rows)
        self._stores.update({key: store for key in together if key not in self._stores})

    def _asked_most(self) -> list[tuple[HookSite, tuple[int, ...]]]:
        """Sites and blocks that the stages of the chain read, as far as the model has them."""
        measured = identities(self.model)
        fired = measured.fired
        asked = [
            (Z, self.up_to_formation),
            (RESID_POST, (self.formation.layer,)),
            *((site, self.through_readout) for site in (LN1_NORMALIZED, Q, K)),
        ]

        def is_there(site: HookSite, blocks: tuple[int, ...]) -> bool:
            try:
                measured.check_layout(site.template, blocks)
            except NotApplicableError:  # it has other axes here: what needs it says so
                return False
            return all(site.at(block) in fired for block in blocks)

        return [(site, blocks) for site, blocks in asked if is_there(site, blocks)]

    def at(self, source: Source, site: HookSite, layers: Sequence[int]) -> Vectors:
        """A run's activations at one position of every prompt: the source's, or the target where it names none."""
        index = source.where(self.pair.target).single(self.batch.n)
        store = self.activations(source.run, site, layers)
        return {layer: store.at(source.run, site, layer, index).float() for layer in layers}

    def spread(
        self, source: Source, site: HookSite, layers: Sequence[int], positions: Where | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Mean and standard deviation over prompts, per unit and dimension, at one position of every prompt.

        Raises:
            InputError: with fewer than two prompts.
        """
        if self.batch.n < 2:
            raise InputError(f"a variance over prompts needs at least 2 prompts, there is {self.batch.n}")
        found = self.at(replace(source, positions=source.positions or positions), site, layers)
        return {layer: (x.mean(0), x.std(0)) for layer, x in found.items()}

    def ordinary_moments(self, site: HookSite, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Per block, the mean activation at ordinary positions and the mean squared deviation from it (a scalar)."""
        found = {}
        for layer in layers:
            x = self.ordinary(site, layer, layers).flatten(1)
            found[layer] = (x.mean(0), (x - x.mean(0)).pow(2).mean())
        return found

    def ordinary(self, site: HookSite, layer: int, layers: Sequence[int]) -> Float[Tensor, "place unit *rest"]:
        """Activations of the run without the sink at all ordinary positions of all prompts."""
        run = self.pair.without.run
        tensor = self.activations(run, site, layers).tensor(run, site, layer)
        return tensor[self.pair.ordinary.bool().to(tensor.device)].float()


Build = Callable[[Setting, "Stage", Direction, Generator], Patch]


@dataclass(frozen=True)
class Prediction:
    """What a claim says the effects of an edit are; NaN where it does not say."""

    denoise: float
    """Effect in the run without the sink: 1 when the edit restores all of it."""
    noise: float
    """Effect in the run with the sink: 1 when the edit takes all of it away."""

    def of(self, direction: Direction) -> float:
        """The effect in one direction."""
        return self.denoise if direction == "denoise" else self.noise


ISOLATED = Prediction(denoise=1.0, noise=1.0)
"""Effects that the claim predicts when only the mechanism is carried over."""
REMOVED = Prediction(denoise=0.0, noise=1.0)
"""And when only the mechanism is taken away."""
NOTHING = Prediction(denoise=0.0, noise=0.0)
"""Control of an isolating edit: what is carried over is beside the point."""
SPARED = Prediction(denoise=1.0, noise=0.0)
"""Control of a removing edit: what is taken away is beside the point."""


ExperimentKind = Literal["transplant", "mechanism"]
"""A transplant asks whether the stage carries the effect; a mechanism edit, whether by what the claim names."""


def experiment_kind(edit: str) -> ExperimentKind:
    """The kind of an experiment by the name of its edit, which is what tables have of it."""
    return "transplant" if edit == "transplant" else "mechanism"


@dataclass(frozen=True)
class Need:
    """An identity that must hold in some blocks."""

    identity: str
    """Its name (:data:`sinklens.models.identities.IDENTITIES`)."""
    layers: Callable[[Setting], tuple[int, ...]] | None = None
    """In which blocks; ``None``: the stage's own."""


def at_formation(identity: str) -> Need:
    """An identity that must hold in the formation block."""
    return Need(identity, lambda setting: (setting.formation.layer,))


@dataclass(frozen=True)
class Experiment:
    """One edit of a stage, or a control of one."""

    edit: str
    """Name of the edit; ``transplant`` is the one that exchanges the stage's activation."""
    build: Build
    """``(setting, stage, direction, generator) -> Patch``."""
    predicted: Prediction
    """The effects if the claim holds; the two numbers (denoise, noise) will do."""
    control: str = ""
    """What it is a control by; empty for the effect itself."""
    drawn: bool = False
    """Whether it has a random draw, and is repeated over several."""
    needs: tuple[Need, ...] = ()
    """What must hold in the model; what its edit needs is known without."""

    def __post_init__(self) -> None:
        if not isinstance(self.predicted, Prediction):
            object.__setattr__(self, "predicted", _prediction(self.edit, self.predicted))

    @property
    def kind(self) -> ExperimentKind:
        """Transplant or mechanism."""
        return experiment_kind(self.edit)


def _prediction(edit: str, numbers: Any) -> Prediction:
    try:
        denoise, noise = map(float, numbers)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"experiment {edit!r}: predicted is {numbers!r}, and must be a Prediction or two numbers, the effects when "
            "denoising and when noising"
        ) from error
    return Prediction(denoise, noise)


@dataclass(frozen=True, repr=False)
class Stage:
    """One link of the chain."""

    name: str
    """Short name."""
    claim: str
    """The claim, in one sentence."""
    site: HookSite
    """Where the effect passes."""
    layers: Callable[[Setting], tuple[int, ...]]
    """In which blocks."""
    experiments: tuple[Experiment, ...]
    """Transplant, mechanism edits and controls."""
    readout: Callable[[Setting, Stage], Readout]
    """How far the stage has gone, as one number for every prompt."""
    units: Callable[[Setting], tuple[int, ...] | None] = lambda _setting: None
    """Which units of the site; ``None``: all."""
    needs: tuple[Need, ...] = ()
    """What must hold in the model for any of its experiments."""

    def __post_init__(self) -> None:
        wrong = next((each for each in self.experiments if not isinstance(each, Experiment)), None)
        if wrong is not None:
            raise InputError(
                f"the experiments of stage {self.name!r} must be such as Experiment(name, edited(edit), predicted), "
                f"not of type {type(wrong).__name__}"
            )
        for name in ("layers", "readout", "units"):
            if not callable(getattr(self, name)):
                raise InputError(
                    f"{name} of stage {self.name!r} must be a function of a Setting, such as in QK_LOCKING"
                )

    def __repr__(self) -> str:
        return f"Stage({self.name!r})"  # it is a default of functions, whose help would be a page of it

    def check(self, setting: Setting, experiment: Experiment) -> None:
        """Make sure that the model has what the stage and one of its experiments need.

        Raises:
            NotApplicableError: it does not.
        """
        measured, own = identities(setting.model), self.layers(setting)
        for need in (*self.needs, *experiment.needs):
            measured.require(need.identity, own if need.layers is None else need.layers(setting))
        measured.check_computed(self.site.template, own)


STAGES: dict[str, Stage] = {}
"""Stages by name, for the command line; :func:`sinklens.run_chain` takes stages themselves and needs no registry."""

KIND = "a stage"
"""What the registry calls them."""


def stages_of(given: Stage | str | Sequence[Stage | str]) -> tuple[Stage, ...]:
    """Stages themselves, or the names of some.

    Raises:
        InputError: there is none, an unknown name, or something else.
    """
    listed = [given] if isinstance(given, Stage | str) or not isinstance(given, Iterable) else list(given)
    if not listed:
        raise InputError("give at least one stage")
    found = []
    for item in listed:
        stage = STAGES.get(item) if isinstance(item, str) else item
        if not isinstance(stage, Stage):
            what = repr(item) if isinstance(item, str) else f"of type {type(item).__name__}"
            raise InputError(f"a stage must be a Stage or the name of one ({', '.join(STAGES)}), not {what}")
        found.append(stage)
    return tuple(found)


def register(stage: Stage) -> Stage:
    """Make ``stage`` known by its name.

    Raises:
        ValueError: the name is taken (see :mod:`sinklens.records.registry`).
    """
    check_kind(KIND, stage, Stage)
    return enter(STAGES, KIND, stage.name, stage)
