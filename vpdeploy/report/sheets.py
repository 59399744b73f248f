"""The report's tables as plain text cells, the same for the console, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vpdeploy.report.headline import describe, factor_at, headline, latency_at, main_arm, memory_at
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
from vpdeploy.values import Certificate, EpochRecord, Report

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


def _sheet(
    caption: str, columns: tuple[str, ...], rows: Iterator[tuple[Cell | str, ...]], words: tuple[int, ...] = (0,)
) -> Sheet:
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
    return _sheet(caption, columns, rows())


def latencies(report: Report) -> Sheet:
    """Every distribution that was measured, with its factor."""

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for row in report.arms["dense"].latency:
            for name, arm in report.arms.items():
                found, faster = latency_at(arm, row.conditions), factor_at(report, name, row.conditions)
                if found is not None:
                    times = (found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms)
                    yield (
                        found.engine if found.precision == "fp32" else f"{found.engine}, {found.precision}",
                        found.form,
                        name,
                        str(found.batch),
                        str(found.threads),
                        *(significant(value) for value in times),
                        significant(found.images_per_second),
                        Cell(factor(faster.factor), factor_range(faster.interval)) if faster else NOTHING,
                        Cell(str(len(found.samples_ms)), "" if found.steady else "unsteady"),
                    )

    caption = (
        "Milliseconds a batch, arms interleaved round by round. Single stream: batch 1, p90; offline: the largest batch, "
        "images per second. Unsteady: the medians of the first and the last half of the rounds differ by more than 15 %."
    )
    times = ("p50", "p90", "p95", "p99")
    columns = ("engine", "form", "arm", "batch", "threads", *times, "images/s", "faster", "rounds")
    return _sheet(caption, columns, rows(), words=(0, 1, 2))


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
    return _sheet(caption, columns, rows() if before and after else iter(()), words=(0,))


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
    return _sheet(caption, columns, rows(), words=(0, 1))


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
    return _sheet(f"{images} Preprocessing MACs are of the uint8 form's resize, outside MACs.", columns, rows())


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

    return _sheet(caption, ("stage", "epoch", "loss", "val top-1", "seconds", "images/s"), rows())


def last_epochs(history: tuple[EpochRecord, ...]) -> tuple[EpochRecord, ...]:
    """The last records of each stage, in the order in which the stages ran."""
    stages = dict.fromkeys(record.stage for record in history)
    return tuple(r for stage in stages for r in [r for r in history if r.stage == stage][-LAST_EPOCHS:])


def proofs(certificate: Certificate) -> Sheet:
    """What was proved of one cut."""

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        budget = certificate.budget.replace("_", " ")
        agreement = f"{certificate.images} real images, float64"
        yield f"{budget} (what remains)", f"{certificate.reached:.4f}", f"at most {certificate.requested:g} requested"
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

    return _sheet("Relative differences of the logits.", ("claim", "value", "how"), rows(), words=(0, 2))


def widths(certificate: Certificate) -> Sheet:
    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for group in certificate.groups:
            share = f"{100 * group.kept / group.width:.0f} %"
            yield group.root, group.status, str(group.width), str(group.kept), share

    caption = "Channels of each group, dense and kept; a group bears the name of one of its writers."
    return _sheet(caption, ("group", "status", "dense", "kept", "share"), rows(), words=(0, 1))


def excluded(certificate: Certificate) -> Sheet:
    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for group in certificate.groups:
            if group.status != "exact":
                difference = NOTHING if group.difference is None else tiny(group.difference)
                yield group.root, group.status, group.reason or NOTHING, str(group.width), difference

    caption = "Groups that are not exact, and by how much masking differs from removal."
    return _sheet(caption, ("group", "status", "reason", "width", "difference"), rows(), words=(0, 1, 2))


def uncounted(report: Report) -> Sheet:
    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for name, arm in report.arms.items():
            for operation, times in arm.macs_uncounted.items():
                yield name, operation, str(times)

    return _sheet(
        "Operations that may hide products and stand outside MACs.", ("arm", "operation", "times"), rows(), words=(0, 1)
    )


def environment(report: Report) -> Sheet:
    return _sheet("Where the numbers were measured.", ("what", "value"), _flat("", report.environment), words=(0, 1))


def _flat(prefix: str, value: Any) -> Iterator[tuple[Cell | str, ...]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        items = value if isinstance(value, list | tuple) else [value]
        yield prefix, ", ".join("none" if item is None else str(item) for item in items)
