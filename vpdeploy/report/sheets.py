"""The report's tables as plain text cells, the same for the console, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vpdeploy.report.headline import describe, engine_of, factor_at, headline, latency_at, main_arm, memory_at
from vpdeploy.report.numbers import (
    NOTHING,
    amount,
    factor,
    factor_range,
    mebibytes,
    percent,
    percent_range,
    points,
    points_range,
    significant,
    tiny,
)
from vpdeploy.values import Certificate, EpochRecord, Price, Report

LAST_EPOCHS = 3


@dataclass(frozen=True)
class Cell:
    """A figure and what stands small beside it: an interval or a factor."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """One table. ``words`` are the columns that hold words; the others hold figures."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: tuple[int, ...] = (0,)


def sheet_of(
    caption: str, columns: tuple[str, ...], rows: Iterator[tuple[Cell | str, ...]], words: tuple[int, ...] = (0,)
) -> Sheet:
    """A table of cells and plain texts."""
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
    return Sheet(caption, columns, cells, words)


def comparison(report: Report) -> Sheet:
    """One row an arm, dense first."""
    at = headline(report)
    where = describe(at) if at else "not measured"
    form = at.form if at else next(iter(report.arms["dense"].file_bytes), "float")
    columns = (
        "arm",
        "top-1",
        "n",
        "against dense, points",
        "MACs",
        "params",
        "file, MiB",
        "p50, ms",
        "faster",
        "peak, MiB",
    )

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for name, arm in report.arms.items():
            factors, difference = report.factors.get(name), report.accuracy_difference.get(name)
            latency, faster, memory = latency_at(arm, at), factor_at(report, name, at), memory_at(arm, at)
            size = arm.file_bytes.get(form)
            yield (
                name,
                Cell(percent(arm.accuracy_top1, arm.n), percent_range(arm.accuracy_top1_interval, arm.n)),
                str(arm.n),
                Cell(points(difference.difference, arm.n), points_range(difference.interval, arm.n))
                if difference
                else NOTHING,
                Cell(amount(arm.macs), factor(factors.macs) if factors else ""),
                Cell(amount(arm.params), factor(factors.params) if factors else ""),
                Cell(
                    mebibytes(size), factor(factors.file_bytes[form]) if factors and form in factors.file_bytes else ""
                )
                if size
                else NOTHING,
                significant(latency.p50_ms) if latency else NOTHING,
                Cell(factor(faster.factor), factor_range(faster.interval)) if faster else NOTHING,
                significant(memory.peak_rss_mib) if memory else NOTHING,
            )

    caption = (
        f"Intervals at 95 %. Latency: {where}. File: {form} form. Factors are dense over arm: above 1 is better. "
        "MACs: convolution, linear and attention products of the backbone at batch 1, counted by fvcore with handles "
        "of our own."
    )
    return sheet_of(caption, columns, rows())


QUANTITIES = {
    "channels": "channels",
    "macs": "MACs",
    "params": "parameters",
    "file_mib": "file, MiB",
    "latency_ms": "latency, ms",
    "memory_mib": "memory, MiB",
}


def reach(price: Price, came: Mapping[str, float] | None = None) -> Sheet:
    """What could be reached before anything was trained, and what it ``came`` to: quantity -> amount."""

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for row in price.table:
            figures = (row.smallest, row.requested, row.dense, *((came.get(row.quantity),) if came else ()))
            yield QUANTITIES[row.quantity], *(_quantity(row.quantity, figure) for figure in figures)

    asked = any(row.quantity == "file_mib" and row.requested is not None for row in price.table)
    caption = (
        f"Latency and memory, of one process, on {price.target}; the file in {'its larger' if asked else 'that'} form. "
    )
    caption += f"Widths are multiples of {price.round_to}; of a part of it in groups that are too narrow"
    if price.alignment:
        speeds = ", ".join(f"{multiple}: {speed:.2f}" for multiple, speed in price.alignment.items())
        caption += f"; MACs per millisecond of widths that are multiples of {speeds}, of the best"
    if price.whole:
        caption += f". No smaller multiple that budget.max_removal allows: {', '.join(price.whole)}, which stay whole"
    if came:
        caption += ". The latency reached is that share of the dense one here which was measured at the end; "
        caption += "under a budget in milliseconds it is as measured"
    caption += "."
    return sheet_of(caption, ("quantity", "smallest", "requested", "dense", *(("reached",) if came else ())), rows())


def _quantity(name: str, figure: float | None) -> str:
    if figure is None:
        return NOTHING
    return amount(round(figure)) if name in ("channels", "macs", "params") else significant(figure)


def scenarios(report: Report) -> Sheet:
    """Single stream and offline in MLPerf's sense: milliseconds of one image at p90; images per second of the largest batch."""
    dense = report.arms["dense"].latency

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for first in dense:
            alike = [
                row.conditions
                for row in dense
                if row.conditions._replace(batch=0) == first.conditions._replace(batch=0)
            ]
            one, most = alike[0]._replace(batch=1), max(alike, key=lambda at: at.batch)
            if first.conditions != alike[0]:
                continue
            for name, arm in report.arms.items():
                single, offline = latency_at(arm, one), latency_at(arm, most)
                yield (
                    engine_of(first.conditions),
                    "end to end" if first.form == "uint8" else "backbone alone",
                    name,
                    str(first.threads),
                    significant(single.p90_ms) if single else NOTHING,
                    Cell(significant(offline.images_per_second), f"batch {most.batch}") if offline else NOTHING,
                )

    caption = (
        "The scenarios of MLPerf inference. End to end: the uint8 form, with the resize of an image of bench.image_size; "
        "backbone alone: the float form, with canvas and prompt."
    )
    columns = ("engine", "what", "arm", "threads", "single stream, p90 ms", "offline, images/s")
    return sheet_of(caption, columns, rows(), words=(0, 1, 2))


def latencies(report: Report) -> Sheet:
    """Every distribution that was measured, with its factor."""

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for row in report.arms["dense"].latency:
            for name, arm in report.arms.items():
                found, faster = latency_at(arm, row.conditions), factor_at(report, name, row.conditions)
                if found is not None:
                    times = (found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms)
                    yield (
                        engine_of(found.conditions),
                        found.form,
                        name,
                        str(found.batch),
                        str(found.threads),
                        *(significant(value) for value in times),
                        significant(found.images_per_second),
                        Cell(factor(faster.factor), factor_range(faster.interval)) if faster else NOTHING,
                        factor(report.factors[name].macs) if name in report.factors else NOTHING,
                        Cell(str(len(found.samples_ms)), "" if found.steady else "unsteady"),
                    )

    caption = (
        "Milliseconds a batch, arms interleaved round by round, files opened anew for each fifth of the rounds (once where the "
        "engine compiles). MACs: the factor that a formula would promise. Unsteady: the medians of the first and the last half "
        "of the rounds differ by more than 15 %."
    )
    times = ("p50", "p90", "p95", "p99")
    columns = ("engine", "form", "arm", "batch", "threads", *times, "images/s", "faster", "MACs", "rounds")
    return sheet_of(caption, columns, rows(), words=(0, 1, 2))


def layers(report: Report) -> Sheet:
    """The main arm beside dense, layer by layer: where the time went, and where it did not follow the products."""
    arm = main_arm(report)
    pruned = {row.module: row for row in report.arms[arm].layers} if arm else {}
    dense = [row for row in report.arms["dense"].layers if row.module in pruned]
    before, after = (sum(row.ms for row in rows) for rows in (report.arms["dense"].layers, pruned.values()))

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for row in dense:
            left = pruned[row.module]
            yield (
                row.module or "all the rest",
                NOTHING
                if not row.width
                else str(row.width)
                if row.width == left.width
                else f"{row.width} → {left.width}",
                Cell(amount(left.macs), factor(row.macs / left.macs) if left.macs else ""),
                significant(row.ms),
                Cell(significant(left.ms), factor(row.ms / left.ms) if left.ms else ""),
                f"{100 * row.ms / before:.1f} %",
                f"{100 * left.ms / after:.1f} %",
            )

    caption = (
        "By ONNX Runtime's own profile on the CPU, medians of one image and the fewest threads: its clock counts in microseconds "
        "and costs time itself, so that shares tell more than sums. What is fused with a layer counts with it."
    )
    columns = ("layer", "outputs", "MACs", "dense, ms", f"{arm}, ms", "share of dense", f"share of {arm}")
    return sheet_of(caption, columns, rows() if before and after else iter(()), words=(0,))


def memories(report: Report) -> Sheet:
    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for name, arm in report.arms.items():
            for row in arm.memory:
                peak, before = significant(row.peak_rss_mib), significant(row.before_rss_mib)
                begun = (significant(ms) for ms in (row.load_ms, row.first_run_ms))
                yield row.form, name, str(row.batch), str(row.threads), peak, before, *begun

    caption = (
        "A fresh process that runs the file with ONNX Runtime on the CPU: its peak resident set (VmHWM), its value before the "
        "session was made, how long that took, and the first run."
    )
    columns = ("form", "arm", "batch", "threads", "peak, MiB", "before, MiB", "load, ms", "first run, ms")
    return sheet_of(caption, columns, rows(), words=(0, 1))


def accuracies(report: Report) -> Sheet:
    """The artifact's accuracy beside torch's, and what the test split says of each arm."""

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for name, arm in report.arms.items():
            difference = report.accuracy_difference.get(name)
            yield (
                name,
                Cell(percent(arm.accuracy_top1, arm.n), percent_range(arm.accuracy_top1_interval, arm.n)),
                percent(arm.accuracy_top1_torch, arm.n),
                percent(difference.changed, arm.n) if difference else NOTHING,
                amount(arm.macs_preprocessing),
            )

    columns = ("arm", "top-1 of the file", "top-1 in torch", "predictions changed", "preprocessing MACs")
    images = "Whole test split, less the skipped images named below." if report.skipped_images else "Whole test split."
    return sheet_of(f"{images} Preprocessing MACs are of the uint8 form's resize, outside MACs.", columns, rows())


def epochs(records: tuple[EpochRecord, ...], *, caption: str) -> Sheet:
    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for record in records:
            yield (
                record.stage,
                f"{record.epoch} / {record.epochs}",
                significant(record.loss),
                f"{100 * record.accuracy_val:.1f} %",
                significant(record.seconds),
                f"{record.images_per_second:.0f}",
            )

    return sheet_of(caption, ("stage", "epoch", "loss", "val top-1", "seconds", "images/s"), rows())


def last_epochs(history: tuple[EpochRecord, ...]) -> tuple[EpochRecord, ...]:
    """The last records of each stage, in the order in which the stages ran."""
    stages = dict.fromkeys(record.stage for record in history)
    return tuple(r for stage in stages for r in [r for r in history if r.stage == stage][-LAST_EPOCHS:])


def proofs(certificate: Certificate) -> Sheet:
    """What was proved of one cut."""

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        budget = certificate.budget.replace("_", " ")
        agreement = f"{certificate.images} real images, float64"
        how = f", measured on {certificate.measured_on}" if certificate.measured_on else ""
        remains = " (what remains)" if certificate.budget.endswith("_ratio") else ""
        yield f"{budget}{remains}", f"{certificate.reached:.4g}", f"at most {certificate.requested:g} requested{how}"
        for kind, (requested, reached) in certificate.limits.items():
            yield f"{kind.replace('_', ' ')} (limit)", f"{reached:.4g}", f"at most {requested:g} requested{how}"
        yield "masked against pruned, relative", tiny(certificate.masked_vs_pruned), agreement
        yield "the same, random input", tiny(certificate.masked_vs_pruned_random), "random images, float64"
        yield "masked against dense, relative", significant(certificate.mask_effect), "what the agreement is about"
        if certificate.but_for_norms is not None:
            why = "approximate groups were cut; with norms that take no statistics masking and removal agree"
            yield "but for the norms' statistics", tiny(certificate.but_for_norms), why
        if certificate.replacements:
            kinds = ", ".join(sorted({kind.removeprefix("heads:") for kind in certificate.replacements.values()}))
            count = str(len(certificate.replacements))
            yield "attention in equal modules, for whole heads", count, kinds
        for parity in certificate.torch_vs_onnx:
            batches = ", ".join(map(str, parity.batches))
            proof = f"{parity.images} images, batches {batches}; logits vary by {significant(parity.logit_spread)}"
            name = f"torch against ONNX, {parity.form} form, relative"
            yield name, tiny(parity.relative_error), f"{proof}; top-1 agrees on {100 * parity.top1_agreement:g} %"

    return sheet_of("Relative differences of the logits.", ("claim", "value", "how"), rows(), words=(0, 2))


def widths(certificate: Certificate) -> Sheet:
    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for group in certificate.groups:
            share = f"{100 * group.kept / group.width:.0f} %"
            yield group.root, group.status, str(group.width), str(group.kept), share

    caption = "Channels of each group, dense and kept; a group bears the name of one of its writers."
    return sheet_of(caption, ("group", "status", "dense", "kept", "share"), rows(), words=(0, 1))


def excluded(certificate: Certificate) -> Sheet:
    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for group in certificate.groups:
            if group.status != "exact":
                difference = NOTHING if group.difference is None else tiny(group.difference)
                yield group.root, group.status, group.reason or NOTHING, str(group.width), difference

    caption = "Groups that are not exact, and by how much masking differs from removal."
    return sheet_of(caption, ("group", "status", "reason", "width", "difference"), rows(), words=(0, 1, 2))


def uncounted(report: Report) -> Sheet:
    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for name, arm in report.arms.items():
            for operation, times in arm.macs_uncounted.items():
                yield name, operation, str(times)

    return sheet_of(
        "Operations that may hide products and stand outside MACs.", ("arm", "operation", "times"), rows(), words=(0, 1)
    )


def environment(report: Report) -> Sheet:
    return sheet_of("Where the numbers were measured.", ("what", "value"), _flat("", report.environment), words=(0, 1))


def _flat(prefix: str, value: Any) -> Iterator[tuple[Cell | str, ...]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        items = value if isinstance(value, list | tuple) else [value]
        yield prefix, ", ".join("none" if item is None else str(item) for item in items)
