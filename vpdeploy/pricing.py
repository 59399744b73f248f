"""What networks of any widths cost on the target, before anything is trained; and masks that meet a measured budget."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vpdeploy import run_folder
from vpdeploy.candidates import Candidates, is_prompted, target_text
from vpdeploy.errors import BudgetError, RunFolderError, VpdeployError
from vpdeploy.measure.arms import image_shape
from vpdeploy.measure.cost_fit import fit_layers, fit_whole, non_negative
from vpdeploy.measure.engines import Setting, Subject, check_engine
from vpdeploy.measure.environment import machine
from vpdeploy.measure.inputs import random_images
from vpdeploy.measure.latency import QUICK, REPORTED, measure_latency
from vpdeploy.measure.layers import layer_times
from vpdeploy.measure.memory import measure_memory
from vpdeploy.measure.settings import setting_of
from vpdeploy.recipe.tables import Recipe
from vpdeploy.report.sheets import reach
from vpdeploy.scoring.select import STEPS, Selector, allowed_widths, build_selector, is_ratio, select
from vpdeploy.surgery.cost import Array, CostModel, cost_of, quantity_of
from vpdeploy.surgery.groups import example_input
from vpdeploy.surgery.shapes import Shapes, shapes_of
from vpdeploy.surgery.trace import look
from vpdeploy.values import ChannelGroup, ChannelGroups, Conditions, Latency, Price, Reach, Selection, Term
from vpdeploy.workbench import Workbench

MIXED = 6  # networks between the narrowest and the dense one from which times are fitted
MULTIPLES = (1, 2, 4, 8, 16, 32)
NEARLY_BEST = 0.95  # of the best multiple's speed: the smallest that has it leaves the most choice
MIB = 2**20
GLANCE = 0.02  # seconds of each of many networks, and a few rounds: the fit takes the mean of them
AIM = 0.985  # of a budget in time: what is measured once more should still be within
NEAR = 0.03  # and no further below is looked for
TRIES, MEMORY_TRIES = 8, 14
SAME = 5e-4  # of a limit: closer ones differ by less than memory can be told
MEASURED = ("latency_ratio", "latency_ms", "memory_mib")
MEMORY_RUNS = 3  # of which the largest counts: resident memory differs from process to process


# --- the price stage ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Network:
    """What widths are of: a recipe's groups, and what formulas tell of any widths."""

    recipe: Recipe
    groups: ChannelGroups
    shapes: Shapes
    cost: CostModel

    @staticmethod
    def of(work: Workbench, groups: ChannelGroups) -> _Network:
        backbone, prunable = work.built.backbone, groups.prunable
        seen = look(backbone, example_input(work.recipe.input.canvas, batch=1))
        return _Network(work.recipe, groups, shapes_of(seen, backbone, prunable), cost_of(seen, backbone, prunable))

    def narrowest(self, round_to: int) -> Array:
        return np.array([_allowed(group, self.recipe, round_to)[0] for group in self.groups.prunable], float)


def price(work: Workbench, groups: ChannelGroups) -> Price:
    """Export the network as it is, measure it at a few widths, and learn what any widths cost. Where that fails, and no budget
    asks for it, the other quantities are told alone.

    Raises: ModelError for a network that cannot be exported; EngineError for a target that is not here; BudgetError with the
    best reachable value.
    """
    began, recipe, network = time.perf_counter(), work.recipe, _Network.of(work, groups)
    setting = setting_of(recipe.target)
    check_engine(setting)
    with _candidates(work, groups) as candidates:
        target = _Target(candidates, setting, _image_shape(recipe))
        candidates.check(network.narrowest(1))
        round_to, alignment = _multiple(target, network)
        files = _file_terms(work, groups, candidates, network.shapes)
        made = Price(
            round_to=round_to,
            costs={"file_mib": files},
            dense={"file_mib": network.shapes.sum_of(files).at(network.cost.dense_widths)},
            limits={},
            alignment=alignment,
            table=(),
            target=target_text(recipe),
            conditions=None,
            machine=machine(),
        )
        try:
            made = _with_measured(made, target, network)
        except VpdeployError as e:
            if recipe.budget.reads_target:
                raise
            work.display.say(f"latency and memory of narrower networks cannot be measured: {e}")
        made = replace(made, table=_table(made, network))
        made = replace(made, table_seconds=round(time.perf_counter() - began, 2))
        work.display.say(reach_text(made))
        selector = _selector_at(made, network)
        if recipe.budget.measured:
            made = replace(made, limits=_limits_in_practice(selector, target, made, network))
    return replace(made, seconds=round(time.perf_counter() - began, 2))


def _multiple(target: _Target, network: _Network) -> tuple[int, dict[str, float]]:
    """The width multiple in use, and the speeds that it was chosen by."""
    given = network.recipe.budget.round_to
    if given != "auto":
        return given, {}
    alignment = _alignment(target, network)
    return next(int(k) for k, speed in alignment.items() if speed >= NEARLY_BEST), alignment


def _with_measured(made: Price, target: _Target, network: _Network) -> Price:
    """``made`` with what latency and memory cost."""
    widths = _mixed(network.groups.prunable, network.recipe, made.round_to)
    measured = _Measured.of(target, widths, memory="memory_mib" in network.recipe.budget.measured)
    costs = {**made.costs, "latency_ms": measured.latency_terms(network.shapes)}
    dense = {**made.dense, "latency_ms": measured.dense_ms}
    least = {"latency_ms": float(measured.ms[0])}
    if measured.memory is not None:
        costs["memory_mib"] = measured.memory_terms(network.shapes, costs["file_mib"])
        dense["memory_mib"], least["memory_mib"] = float(measured.memory[-1]), float(measured.memory[0])
    return replace(made, costs=costs, dense=dense, least=least, conditions=measured.conditions)


def selector_for(work: Workbench, groups: ChannelGroups, priced: Price) -> Selector:
    """The recipe's budget over the prunable groups, as ``priced`` on the target."""
    selector = _selector_at(priced, _Network.of(work, groups))
    for kind, limit in priced.limits.items():
        selector = selector.limited(kind, limit)
    return selector


def _selector_at(priced: Price, network: _Network) -> Selector:
    """Selection under the recipe's budget where its costs are as ``priced``."""
    table = network.recipe.budget
    if "memory_mib" in table.measured and "memory_mib" not in priced.costs:
        raise BudgetError("budget.memory_mib: memory is read from /proc, which is not here; expected Linux")
    measured = {name: network.shapes.sum_of(terms) for name, terms in priced.costs.items()}
    return build_selector(
        network.groups.prunable,
        replace(network.cost, measured=measured, dense=priced.dense),
        budget=table.kind,
        requested=table.requested,
        round_to=priced.round_to,
        max_removal=table.max_removal,
        limits=table.limits.given,
        steps=_steps(network.recipe),
        speed="latency_ms" if table.speed else None,
        stops=lambda kind, widths: _stops(kind, widths, priced, network),
    )


def settle(
    selector: Selector, scores: Mapping[str, Array], work: Workbench, groups: ChannelGroups, *, arm: str
) -> Selection:
    """The mask of ``scores`` that meets the budget as measured, and what was measured of it; without a measured budget the mask
    that the formula gives.

    scores: root -> [g].
    """
    if not work.recipe.budget.measured or not selector.roots:
        return select(selector, scores)
    with _candidates(work, groups, arm=arm) as candidates:
        candidates.check(selector.least_widths)
        target = _Target(candidates, setting_of(work.recipe.target), _image_shape(work.recipe))
        return _Settling(target, selector, scores, work.display.say).done()


def elsewhere(priced: Price) -> str | None:
    """In what this machine differs from the one that ``priced`` was measured on; None where it does not."""
    here = machine()
    other = [f"{key} {value}, here {here.get(key)}" for key, value in priced.machine.items() if here.get(key) != value]
    return "; ".join(other) or None


def reach_text(priced: Price) -> str:
    """The satisfiability table, for the console."""
    sheet = reach(priced)
    rows = [sheet.columns, *((cell.text for cell in row) for row in sheet.rows)]
    lines = (f"  {name:<16}" + "".join(f"{text:>14}" for text in texts) for name, *texts in rows)
    return "\n".join([f"what can be reached on {priced.target}:", *lines, f"  ({sheet.caption})"])


@contextmanager
def _candidates(work: Workbench, groups: ChannelGroups, *, arm: str = "pruned") -> Iterator[Candidates]:
    with tempfile.TemporaryDirectory() as folder:
        form = work.recipe.target.form or min(work.recipe.export.forms)
        yield Candidates(work, groups, Path(folder), form=form, prompted=is_prompted(work.recipe, arm))


def _image_shape(recipe: Recipe) -> tuple[int, ...]:
    return tuple(image_shape(recipe.target.form or min(recipe.export.forms), recipe))


def _allowed(group: ChannelGroup, recipe: Recipe, round_to: int) -> list[int]:
    return allowed_widths(
        group.width, unit=group.unit, round_to=round_to, max_removal=recipe.budget.max_removal, steps=_steps(recipe)
    )


def _steps(recipe: Recipe) -> int:
    """Where speed decides the multiple, narrow groups have it too."""
    return 1 if recipe.budget.round_to == "auto" else STEPS


def _mixed(groups: Sequence[ChannelGroup], recipe: Recipe, round_to: int) -> Array:
    """Widths of the networks from which costs are fitted: [networks, groups]. The first is the narrowest, the last the dense one;
    between them every group takes every level once, in an order of its own, so that inputs and outputs of a layer vary apart.
    """
    generator = np.random.default_rng(0)
    columns = []
    for group in groups:
        allowed = _allowed(group, recipe, round_to)
        levels = [allowed[int((i + 0.5) / MIXED * len(allowed))] for i in generator.permutation(MIXED)]
        columns.append([allowed[0], *levels, allowed[-1]])
    return np.array(columns, float).T.reshape(MIXED + 2, len(columns))


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where candidates run."""

    candidates: Candidates
    setting: Setting
    image_shape: tuple[int, ...]

    def images(self) -> Any:
        return random_images(self.candidates.form, self.image_shape, batch=self.setting.batch, seed=0)

    def times(self, subjects: Mapping[str, Subject], *, seconds: float = GLANCE) -> dict[str, float]:
        """Median milliseconds of each, in the same rounds."""
        return {name: row.p50_ms for name, row in self.timed(subjects, seconds=seconds).items()}

    def timed(self, subjects: Mapping[str, Subject], *, seconds: float = GLANCE) -> Mapping[str, Latency]:
        return measure_latency(
            subjects,
            self.images(),
            form=self.candidates.form,
            setting=self.setting,
            seconds=seconds,
            pace=QUICK if seconds == GLANCE else REPORTED,
        ).latencies

    def against_dense(self, widths: Array, *, seconds: float = 1.0) -> tuple[float, float]:
        """Median milliseconds at ``widths`` and, in the same rounds, of the dense arm."""
        found = self.times({"at": self.candidates.subject(widths), "dense": self.dense()}, seconds=seconds)
        return found["at"], found["dense"]

    def dense(self) -> Subject:
        return Subject(self.candidates.dense_without_prompt(), self.candidates.dense_module)

    def memory(self, widths: Array, *, runs: int = 1) -> float | None:
        """Peak resident MiB, the largest of ``runs`` processes."""
        path = self.candidates.subject(widths).file(self.setting)
        found = [
            measure_memory(
                path,
                form=self.candidates.form,
                image_shape=self.image_shape,
                batch=self.setting.batch,
                threads=self.setting.threads,
            )
            for _ in range(runs)
        ]
        return None if None in found else max(row.peak_rss_mib for row in found if row is not None)


@dataclass(frozen=True)
class _Measured:
    """What was measured of networks of ``widths`` [networks, groups], the narrowest first and the dense one last. ``layers``:
    milliseconds of each module, where the engine tells; ``memory`` [networks], of the narrowest and the dense one alone where
    no budget asks for it.
    """

    widths: Array
    ms: Array
    dense_ms: float
    conditions: Conditions
    layers: Sequence[Mapping[str, float]]
    memory: Array | None

    @staticmethod
    def of(target: _Target, widths: Array, *, memory: bool) -> _Measured:
        subjects = {str(i): target.candidates.subject(row) for i, row in enumerate(widths)}
        timed = target.timed({**subjects, "dense": target.dense()})
        times = {name: row.p50_ms for name, row in timed.items()}
        images = target.images()
        reads_files = target.setting.engine in ("onnxruntime-cpu", "openvino-cpu")
        layers = [
            layer_times(subject.file(target.setting), images, setting=target.setting)
            for subject in (subjects.values() if reads_files else ())
        ]
        chosen = widths if memory else widths[[0, -1]]
        found = [target.memory(row) for row in chosen] if target.setting.engine == "onnxruntime-cpu" else [None]
        return _Measured(
            widths,
            np.array([times[name] for name in subjects]),
            times["dense"],
            timed["dense"].conditions,
            layers,
            None if None in found else np.array(found, float),
        )

    def latency_terms(self, shapes: Shapes) -> tuple[Term, ...]:
        if self.layers:
            return fit_layers(self.layers, self.ms, self.widths, shapes)
        return fit_whole(self.ms, self.widths, shapes)

    def memory_terms(self, shapes: Shapes, file_terms: Sequence[Term]) -> tuple[Term, ...]:
        """So much for each byte of the file, and a constant: weights are most of what a process holds."""
        assert self.memory is not None
        rows = self.widths if len(self.memory) == len(self.widths) else self.widths[[0, -1]]
        file = shapes.sum_of(file_terms)
        mib = np.array([file.at(row) for row in rows])
        constant, per_mib = non_negative(np.stack([np.ones(len(mib)), mib], 1), self.memory)
        return (Term("", float(constant)), *(replace(term, amount=term.amount * float(per_mib)) for term in file_terms))


def _file_terms(work: Workbench, groups: ChannelGroups, candidates: Candidates, shapes: Shapes) -> tuple[Term, ...]:
    """MiB of the file that ships; where a budget speaks of files, of the largest form."""
    budget, forms = work.recipe.budget, [candidates.form]
    if "file_mib" in (budget.kind, *budget.limits.given):
        forms = [candidates.form, *(form for form in work.recipe.export.forms if form != candidates.form)]
    found = []
    for form in forms:
        with tempfile.TemporaryDirectory() as folder:
            made = (
                candidates
                if form == candidates.form
                else Candidates(work, groups, Path(folder), form=form, prompted=candidates.prompted)
            )
            size, terms = made.whole.stat().st_size, made.byte_terms(shapes)
        fixed = size - shapes.sum_of(terms).at(shapes.dense_widths)
        found.append((size, [Term("", fixed), *terms]))
    _, terms = max(found, key=lambda pair: pair[0])
    return tuple(replace(term, amount=term.amount / MIB) for term in terms)


# --- widths that are fast -------------------------------------------------------------------------------------------


def _alignment(target: _Target, network: _Network) -> dict[str, float]:
    """Width multiple -> MACs per millisecond relative to the best, of networks at about half the width whose widths are odd
    multiples of it: no better ones by chance. Kept between runs, for the machine, the engine and the layers.
    """
    rows = {
        k: np.array([_odd_multiple(group, network.recipe, k) for group in network.groups.prunable], float)
        for k in MULTIPLES
    }
    about = [machine(), network.recipe.target.model_dump(), target.image_shape, [row.tolist() for row in rows.values()]]
    about.append([network.cost.macs(row) for row in rows.values()])
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "alignment" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        speeds = json.loads(path.read_bytes())["speeds"]
        if list(speeds) == [str(k) for k in MULTIPLES] and all(0 < float(speed) <= 1 for speed in speeds.values()):
            return {k: float(speed) for k, speed in speeds.items()}
    times = target.times({str(k): target.candidates.subject(row) for k, row in rows.items()})
    rates = {str(k): network.cost.macs(row) / times[str(k)] for k, row in rows.items()}
    speeds = {k: round(rate / max(rates.values()), 4) for k, rate in rates.items()}
    with suppress(RunFolderError, OSError):  # a home that cannot be written to: it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path, {"speeds": speeds, "target": target_text(network.recipe), "machine": machine()})
    return speeds


def _odd_multiple(group: ChannelGroup, recipe: Recipe, round_to: int) -> int:
    """Of what a group may keep, the odd multiple of its step that is nearest to half its width."""
    allowed = _allowed(group, recipe, round_to)
    step = allowed[1] - allowed[0] if len(allowed) > 2 else 1
    odd = [width for width in allowed[:-1] if width // step % 2] or allowed
    return min(odd, key=lambda width: abs(width - group.width / 2))


def cache_folder() -> Path:
    """Where measurements are kept between runs: $XDG_CACHE_HOME/vpdeploy, or ~/.cache/vpdeploy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpdeploy"


# --- what can be reached --------------------------------------------------------------------------------------------


def _table(priced: Price, network: _Network) -> tuple[Reach, ...]:
    budget, cost = network.recipe.budget, network.cost
    amounts, narrowest = budget.limits.given, network.narrowest(priced.round_to)
    if not is_ratio(budget.kind):
        amounts[budget.kind] = budget.requested
    asked = {"channel_ratio": "channels", "macs_ratio": "macs", "params_ratio": "params", "latency_ratio": "latency_ms"}
    formulas = {
        "channels": cost.channels,
        "macs": cost.macs,
        "params": cost.params,
        "file_mib": network.shapes.sum_of(priced.costs["file_mib"]).at,
    }
    rows = {name: (formula(narrowest), formula(cost.dense_widths)) for name, formula in formulas.items()}
    rows |= {name: (least, priced.dense[name]) for name, least in priced.least.items()}
    of_ratio = asked.get(budget.kind)
    return tuple(
        Reach(name, least, budget.requested * dense if name == of_ratio else amounts.get(name), dense)
        for name, (least, dense) in rows.items()
    )


def _stops(kind: str, widths: Array, priced: Price, network: _Network) -> str:
    """What the cost is made of where widths can get no narrower, largest first."""
    terms = priced.costs.get(quantity_of(kind))
    if terms is None:
        return ""
    by_module: dict[str, list[Term]] = {}
    for term in terms:
        by_module.setdefault(term.module, []).append(term)
    parts = {module: network.shapes.sum_of(of_it).at(widths) for module, of_it in by_module.items()}
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    nothing = {
        "latency_ms": "what is no layer (sums, pools, layouts)",
        "latency_ratio": "what is no layer (sums, pools, layouts)",
        "file_mib": "the graph, its metadata and the prompt",
        "memory_mib": "the runtime itself",
    }[kind]
    told = ", ".join(f"{module or nothing} {value / total:.0%}" for module, value in largest)
    held = [group.root for group in network.groups.groups if group.status == "excluded"]
    more = f"; {len(held)} groups are excluded, {held[0]} among them: `vpdeploy inspect` says why" if held else ""
    return f"; there it is made of {told}{more}"


# --- budgets that only measuring can meet ---------------------------------------------------------------------------


def _limits_in_practice(selector: Selector, target: _Target, priced: Price, network: _Network) -> dict[str, float]:
    """What the sums may be so that masks meet the budget as measured, from masks of random scores: a search then learns under a
    limit that is near the one that it will have to meet.

    Raises: BudgetError when the narrowest network, as measured, still costs too much.
    """
    for bound in selector.bounds:
        name = quantity_of(bound.kind)
        if bound.kind in MEASURED and priced.least[name] > bound.limit:
            key = f"budget.{bound.kind}" if bound is selector.budget else f"budget.limits.{bound.kind}"
            best = priced.least[name] / (priced.dense[name] if is_ratio(bound.kind) else 1.0)
            raise BudgetError(
                f"{key}: got {bound.requested:g}; the best reachable is {best:.4g}, measured on {priced.target}, with round_to = "
                f"{priced.round_to} and max_removal = {network.recipe.budget.max_removal:g}"
                f"{_stops(bound.kind, selector.least_widths, priced, network)}; ask for that or more, lower budget.round_to, or "
                "raise budget.max_removal"
            )
    generator = np.random.default_rng(0)
    scores = {
        root: generator.random(int(width)) for root, width in zip(selector.roots, selector.dense_widths, strict=True)
    }
    settling = _Settling(target, selector, scores, lambda line: None)
    with suppress(BudgetError):  # the narrowest network meets it, as was seen above: what is lacking is a quiet machine
        settling.done(tries=TRIES)
    return settling.limits or {kind: bracket.limit for kind, bracket in settling.brackets.items()}


@dataclass
class _Bracket:
    """Where the limit of one measured quantity has to be: above ``met``, below ``missed``. ``exact``: as near as can be told;
    otherwise it is enough to come near.
    """

    requested: float
    limit: float
    exact: bool
    met: float | None = None
    missed: float | None = None

    def is_near(self, found: float) -> bool:
        if self.exact:
            return self.met is not None and self.missed is not None and self.missed - self.met < SAME * self.met
        return (1 - NEAR) * self.requested <= found <= self.requested

    def move(self, found: float) -> None:
        """The next limit: in proportion, and between what was met and what was not."""
        if found > self.requested:
            self.missed = min(self.limit, self.missed or self.limit)
        else:
            self.met = max(self.limit, self.met or 0.0)
        if self.met is not None and self.missed is not None and self.met >= self.missed:  # noise: the newer one counts
            self.met, self.missed = (None, self.limit) if found > self.requested else (self.limit, None)
        wanted = self.limit * self.requested / found * (1.0 if self.exact else AIM)
        if self.met is None or self.missed is None:
            self.limit = wanted * (1.0 if not self.exact else 1.01 if self.missed is None else 0.99)
        else:
            gap, share = self.missed - self.met, 0.5 if self.exact else 0.2
            self.limit = min(max(wanted, self.met + share * gap), self.missed - share * gap)


class _Settling:
    """The search for the limits under which the mask of some scores meets its budget as measured."""

    def __init__(self, target: _Target, selector: Selector, scores: Mapping[str, Array], say: Callable[[str], None]):
        self.target, self.selector, self.scores, self.say = target, selector, scores, say
        self.brackets = {
            bound.kind: _Bracket(bound.requested, bound.limit, bound.kind == "memory_mib")
            for bound in selector.bounds
            if bound.kind in MEASURED
        }
        self.limits: dict[str, float] = {}  # of the largest mask that met everything

    def done(self, *, tries: int | None = None) -> Selection:
        """The largest mask found that meets everything.

        Raises: BudgetError when none did.
        """
        best: tuple[Selection, dict[str, float]] | None = None
        tries = tries or (MEMORY_TRIES if "memory_mib" in self.brackets else TRIES)
        for _ in range(tries):
            selection = self._selection()
            found = self._measure(_widths_of(selection))
            self.say(
                f"measured: {', '.join(f'{k} {v:.4g} of {self.brackets[k].requested:g}' for k, v in found.items())}"
            )
            over = [kind for kind, bracket in self.brackets.items() if found[kind] > bracket.requested]
            if not over and (best is None or _size(selection) >= _size(best[0])):
                best, self.limits = (selection, found), {kind: b.limit for kind, b in self.brackets.items()}
            near = all(bracket.is_near(found[kind]) for kind, bracket in self.brackets.items())
            if not over and (near or self._is_free(selection)):
                break
            for kind in over or self.brackets:
                self.brackets[kind].move(found[kind])
            if best is not None and all(b.exact and b.is_near(0.0) for b in self.brackets.values()):
                break
        if best is None:
            told = ", ".join(f"{kind} {bracket.requested:g}" for kind, bracket in self.brackets.items())
            raise BudgetError(
                f"budget: no mask met {told} in {tries} measurements, though what was measured before said so; ask for a little "
                "more, or stop what else runs on this machine"
            )
        selection, found = best
        limits = {kind: (asked, found.get(kind, reached)) for kind, (asked, reached) in selection.limits.items()}
        return replace(selection, reached=found.get(selection.budget, selection.reached), limits=limits)

    def _selection(self) -> Selection:
        selector = self.selector
        for kind, bracket in self.brackets.items():
            selector = selector.limited(kind, bracket.limit)
        return select(selector, self.scores)

    def _is_free(self, selection: Selection) -> bool:
        """Whether the mask would be the same without any measured limit."""
        selector = self.selector
        for kind in self.brackets:
            selector = selector.limited(kind, math.inf)
        return select(selector, self.scores).mask == selection.mask

    def _measure(self, widths: Array) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.brackets.keys() - {"memory_mib"}:
            ms, dense = self.target.against_dense(widths)
            found = {"latency_ms": ms, "latency_ratio": ms / dense}
        if "memory_mib" in self.brackets:
            memory = self.target.memory(widths, runs=MEMORY_RUNS)
            assert memory is not None, "there was /proc when it was priced"
            found["memory_mib"] = memory
        return {kind: found[kind] for kind in self.brackets}


def _widths_of(selection: Selection) -> Array:
    return np.array([sum(keep) for keep in selection.mask.keep.values()], float)


def _size(selection: Selection) -> float:
    return float(_widths_of(selection).sum())
