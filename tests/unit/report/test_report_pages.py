"""Pages say what the report holds, whatever the names in it, and need no torch."""

import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from vpdeploy.errors import VpdeployError
from vpdeploy.measure.latency import summarise
from vpdeploy.report.bounds import bounds
from vpdeploy.report.compare import About, check_consistency, compare, figure_problems
from vpdeploy.report.numbers import amount, percent, points, significant, tiny
from vpdeploy.report.render import fenced, markdown_text, render
from vpdeploy.report.sheets import last_epochs
from vpdeploy.report.table import comparison_table, runs_table, times_table
from vpdeploy.report.verdict import prompt_effect, verdicts
from vpdeploy.values import (
    AccuracyDifference,
    Certificate,
    Conditions,
    EpochRecord,
    Factors,
    GroupRecord,
    Latency,
    LatencyFactor,
    Measurement,
    Memory,
    Parity,
    Report,
)

N = 10_000
HOSTILE = '<script>alert("1")</script> a|b `c` *d* [e](f) $x_1$ ☃'


def _latencies(p50: float, seed: int) -> tuple[Latency, ...]:
    rows = []
    for form, extra in (("float", 0.0), ("uint8", 2.4)):
        for batch in (1, 8):
            for threads in (1, 2):
                middle = (p50 + extra) * batch**0.9 / threads**0.7
                samples = np.random.default_rng(seed + batch).gamma(60, middle / 60, 301).round(4)
                at = Conditions("onnxruntime-cpu", "cpu", "fp32", form, threads, batch)
                rows.append(summarise(samples, at))
    return tuple(rows)


def _measurement(accuracy: float, *, macs: int, params: int, p50: float, seed: int) -> Measurement:
    return Measurement(
        accuracy_top1=accuracy,
        accuracy_top1_interval=(accuracy - 0.0055, accuracy + 0.0052),
        accuracy_top1_torch=accuracy + 0.0001,
        n=N,
        macs=macs,
        macs_uncounted={},
        macs_preprocessing=1_234_567,
        params=params,
        file_bytes={"float": 4 * params + 30_000, "uint8": 4 * params + 40_000},
        latency=_latencies(p50, seed),
        memory=(Memory("float", 1, 1, 61.25 + params / 2**18, 41.5, 12.5, 3.75),),
    )


def _factors(dense: Measurement, arm: Measurement) -> Factors:
    rows = []
    for a, b in zip(dense.latency, arm.latency, strict=True):
        value = a.p50_ms / b.p50_ms
        interval = (0.97 * value, 1.03 * value)
        rows.append(LatencyFactor(*a.conditions, value, interval))
    sizes = {form: dense.file_bytes[form] / arm.file_bytes[form] for form in dense.file_bytes}
    return Factors(dense.macs / arm.macs, dense.params / arm.params, sizes, tuple(rows))


def _certificate(groups: int, reason: str) -> Certificate:
    records = [
        GroupRecord(
            f"layer{1 + i * 3 // groups}.{i}.conv1",
            16 << (i * 3 // groups),
            (6 + i % 9) << (i * 3 // groups),
            "exact",
            "",
            3e-16,
        )
        for i in range(groups - 1)
    ]
    records.append(GroupRecord("head.gate", 64, 64, "excluded", reason, 0.72))
    parities = tuple(Parity(form, 43, (1, 3, 8), 3.1e-7, 1.0, 0.83) for form in ("float", "uint8"))
    return Certificate(4.2e-15, 32, 3.1e-15, None, 0.31, "macs_ratio", 0.5, 0.4873, tuple(records), {}, parities)


def _history(arms) -> tuple[EpochRecord, ...]:
    stages = [
        ("fit", 5, 0.35),
        *((f"search:{a}", 4, 0.8) for a in arms if "pruned" in a),
        *((f"tune:{a}", 20, 0.84) for a in arms),
    ]
    return tuple(
        EpochRecord(stage, e, epochs, 1.8 / e, start + (0.92 - start) * (1 - 0.7**e), 12.5, 2345.6)
        for stage, epochs, start in stages
        for e in range(1, epochs + 1)
    )


def example_report(
    *, groups: int = 57, title: str = "cifar10-resnet56", reason: str = "sigmoid gate at head.gate: f(0) is not 0"
) -> Report:
    arms = {
        "dense": _measurement(0.9362, macs=125_485_706, params=853_018, p50=4.1, seed=1),
        "dense+prompt": _measurement(0.9375, macs=125_485_706, params=853_018, p50=4.11, seed=2),
        "pruned": _measurement(0.9281, macs=61_151_000, params=431_200, p50=2.5, seed=3),
        "pruned-prompt": _measurement(0.9262, macs=60_990_000, params=428_900, p50=2.45, seed=4),
    }
    changes = {"dense+prompt": (-0.0018, 0.0044), "pruned": (-0.0131, -0.0031), "pruned-prompt": (-0.015, -0.005)}
    return compare(
        arms,
        factors={name: _factors(arms["dense"], arm) for name, arm in arms.items() if name != "dense"},
        accuracy_difference={
            name: AccuracyDifference(arms[name].accuracy_top1 - arms["dense"].accuracy_top1, bounds, 0.041, N)
            for name, bounds in changes.items()
        },
        prompt_difference={
            "dense+prompt": AccuracyDifference(0.9375 - 0.9362, (-0.0018, 0.0044), 0.041, N),
            "pruned": AccuracyDifference(0.9281 - 0.9262, (0.0004, 0.0035), 0.052, N),
        },
        certificates={"pruned": _certificate(groups, reason), "pruned-prompt": _certificate(groups, reason)},
        history=_history(arms),
        about=About(
            title=title,
            recipe='seed = 7\n\n[model]\nname = "cifar_resnet56"\n',
            command="vpdeploy run recipes/cifar10-resnet56.toml",
            environment={"machine": {"cpu": "AMD EPYC", "gpu": None}, "providers": ["CPUExecutionProvider"]},
        ),
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return example_report(groups=9)


@pytest.fixture(scope="module")
def pages(report):
    return render(report, prompt=np.linspace(-0.3, 0.2, 3 * 16 * 16).reshape(3, 16, 16))


# --- the report recomputes from its own fields ---------------------------------------------------------------


def test_a_sound_report_passes(report):
    check_consistency(report)


def test_a_factor_that_does_not_follow_is_named(report):
    wrong = replace(report.factors["pruned"], macs=2.5)
    with pytest.raises(VpdeployError, match=r"factors\.pruned\.macs: got 2\.5; dense over pruned is 2\.05.*"):
        check_consistency(replace(report, factors={**report.factors, "pruned": wrong}))


def test_every_contradiction_is_told_at_once(report):
    factors = report.factors["pruned"]
    first = replace(factors.latency_p50[0], factor=9.0)
    wrong = replace(factors, params=1.0, file_bytes={"float": 3.0}, latency_p50=(first,))
    difference = replace(report.accuracy_difference["pruned"], difference=0.5, n=3)
    broken = replace(
        report,
        factors={**report.factors, "pruned": wrong},
        accuracy_difference={**report.accuracy_difference, "pruned": difference},
    )
    with pytest.raises(VpdeployError) as error:
        check_consistency(broken)
    message = str(error.value)
    assert "run `vpdeploy bench` again" in message
    for part in (
        "pruned.params",
        "file_bytes.float",
        "latency_p50[onnxruntime-cpu, float, 1 threads, batch 1]",
        "pruned.n",
        "interval",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"macs": 0}, "arms.pruned.macs: got 0; expected more than 0"),
        ({"params": -1}, "arms.pruned.params: got -1; expected more than 0"),
        ({"file_bytes": {"float": 0}}, "arms.pruned.file_bytes.float: got 0; expected more than 0"),
    ],
)
def test_amounts_are_above_nothing(report, change, told):
    wrong = replace(report.arms["pruned"], **change)
    assert list(figure_problems("pruned", report.arms["pruned"])) == []
    assert list(figure_problems("pruned", wrong)) == [told]
    with pytest.raises(VpdeployError, match=re.escape(told)):
        check_consistency(replace(report, arms={**report.arms, "pruned": wrong}))


@pytest.mark.parametrize("figure", ["p50_ms", "p90_ms", "p95_ms", "p99_ms", "images_per_second"])
def test_times_are_those_of_their_samples(report, figure):
    arm = report.arms["pruned"]
    first, *others = arm.latency
    wrong = replace(arm, latency=(replace(first, **{figure: getattr(first, figure) / 10}), *others))
    (told,) = figure_problems("pruned", wrong)
    assert told.startswith(f"arms.pruned.latency[onnxruntime-cpu, float, 1 threads, batch 1].{figure}: got ")
    for samples in ((), (1.0, 0.0), (1.0, float("nan"))):
        (told,) = figure_problems("pruned", replace(arm, latency=(replace(first, samples_ms=samples), *others)))
        assert told.endswith("samples_ms: expected times above 0")


def test_a_latency_factor_without_its_latencies_is_a_contradiction(report):
    dense = replace(report.arms["dense"], latency=())
    with pytest.raises(VpdeployError, match="dense over pruned is nan"):
        check_consistency(replace(report, arms={**report.arms, "dense": dense}))


def test_dense_comes_first_and_every_arm_is_compared_with_it(report):
    with pytest.raises(VpdeployError, match="expected 'dense' first"):
        check_consistency(replace(report, arms=dict(reversed(report.arms.items()))))
    with pytest.raises(VpdeployError, match=r"factors: got \[\]; expected every arm but dense"):
        check_consistency(replace(report, factors={}))
    with pytest.raises(VpdeployError, match=r"prompt_difference: got \[\]; expected \['dense\+prompt', 'pruned'\]"):
        check_consistency(replace(report, prompt_difference={}))


def test_a_prompt_difference_follows_from_its_two_arms(report):
    wrong = replace(report.prompt_difference["pruned"], difference=0.002, n=3)
    with pytest.raises(VpdeployError, match=r"prompt_difference.pruned: got 0.002; .*") as error:
        check_consistency(replace(report, prompt_difference={**report.prompt_difference, "pruned": wrong}))
    assert "prompt_difference.pruned.n: got 3; pruned-prompt has 10000 images" in str(error.value)


# --- words ---------------------------------------------------------------


def test_the_verdict_gives_factor_interval_and_settings(report):
    _, pruned, _ = verdicts(report)
    row = report.factors["pruned"].latency_p50[0]
    assert "2.05x fewer MACs" in pruned
    speed = f"{row.factor:.2f}x faster (95 % interval {row.interval[0]:.2f} to {row.interval[1]:.2f}"
    assert f"{speed}; float form, batch 1, 1 thread)" in pruned
    assert "0.81 points lower top-1 (95 % interval 0.31 to 1.31 lower; n = 10000" in pruned


def _with_pruned(report: Report, *, speed: float, interval, difference: float, bounds) -> str:
    """The verdict on pruned with other figures."""
    row = replace(report.factors["pruned"].latency_p50[0], factor=speed, interval=interval)
    factors = replace(report.factors["pruned"], latency_p50=(row,))
    accuracy = AccuracyDifference(difference, bounds, 0.02, N)
    return verdicts(
        replace(
            report,
            factors={**report.factors, "pruned": factors},
            accuracy_difference={**report.accuracy_difference, "pruned": accuracy},
        )
    )[1]


def test_a_difference_that_may_be_none_is_called_so(report):
    text = _with_pruned(report, speed=1.01, interval=(0.97, 1.04), difference=-0.001, bounds=(-0.004, 0.002))
    assert "speed not distinguishable from dense (factor 1.01, 95 % interval 0.97 to 1.04" in text
    assert "top-1 not distinguishable from dense (−0.10 points, 95 % interval −0.40 to +0.20" in text
    assert "faster" not in text


def test_a_slower_arm_is_called_slower(report):
    text = _with_pruned(report, speed=0.5, interval=(0.4, 0.8), difference=0.01, bounds=(0.005, 0.015))
    assert "2.00x slower (95 % interval 1.25 to 2.50" in text
    assert "1.00 points higher top-1 (95 % interval 0.50 to 1.50 higher" in text


def test_time_that_parts_from_macs_is_said_in_both_directions(report):
    at = {"difference": 0.01, "bounds": (0.005, 0.015)}
    assert "fell less than the MACs (1.10x against 2.05x)" in _with_pruned(
        report, speed=1.1, interval=(1.05, 1.2), **at
    )
    assert "fell more than the MACs (5.10x against 2.05x)" in _with_pruned(report, speed=5.1, interval=(5, 5.2), **at)
    assert "The time" not in _with_pruned(report, speed=2.0, interval=(1.9, 2.1), **at)


def test_the_prompt_is_judged_by_arms_trained_with_and_without_it(report):
    without_pruning, with_pruning, in_time = prompt_effect(report)
    assert in_time.startswith("In time: ") and "dense+prompt against dense; float form" in in_time
    assert "dense+prompt has +0.13 points top-1 against dense" in without_pruning
    assert "not distinguishable from none" in without_pruning
    assert "pruned has +0.19 points top-1 against pruned-prompt" in with_pruning
    assert "(paired 95 % interval +0.04 to +0.35)." in with_pruning


def test_without_the_arms_the_report_says_which_to_add(report):
    small = replace(report, arms={name: report.arms[name] for name in ("dense", "pruned")}, prompt_difference={})
    assert [re.findall("'([^']+)'", sentence) for sentence in prompt_effect(small)] == [
        ["dense+prompt"],
        ["pruned-prompt"],
    ]


def test_figures_have_few_digits_and_a_true_minus():
    assert [significant(v) for v in (0, 0.01234, 0.1234, 1.234, 12.34, 123.4, 1234.5, 1e-5)] == [
        "0", "0.0123", "0.123", "1.23", "12.3", "123", "1234", "1.00e−05",
    ]  # fmt: skip
    assert [amount(v) for v in (12, 1_234, 40_813_184, 1_814_073_344)] == ["12", "1.23 k", "40.8 M", "1.81 G"]
    assert (percent(0.9178, 360), percent(0.9178, N)) == ("91.8 %", "91.78 %")
    assert (points(-0.0081, N), points(0.0081, 10), points(-0.00001, N)) == ("−0.81", "+0.8", "0.00")
    assert (tiny(0), tiny(3.1e-7)) == ("0", "3.1e−07")


# --- pages ---------------------------------------------------------------


def test_markdown_holds_the_numbers_and_the_table_comes_first(pages):
    text = pages.markdown
    assert text.index("| arm |") < text.index("pruned against dense") < text.index("## What the prompt gave")
    for part in (
        "93.62 %",
        "92.81 %",
        "61.2 M",
        "2.05x",
        "−0.81",
        "4.2e−15",
        "3.1e−07",
        "0.4873",
        "AMD EPYC",
        "vpdeploy run",
    ):
        assert part in text, part
    assert "sigmoid gate at head.gate" in text
    assert 'name = "cifar_resnet56"' in text


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_head():
    text = render(example_report(groups=5, title=HOSTILE, reason=HOSTILE)).markdown
    body = text[: text.index("## Command")]
    tables = re.findall(r"(?:^\|.*\n)+", body, flags=re.MULTILINE)
    assert len(tables) >= 8
    for table in tables:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, table


class Structure(HTMLParser):
    """Tags that are left open or closed twice, tags by name, what the page would fetch, and ids used twice."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:image/png;base64,")):
                self.fetched.append(f"{tag} {value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag


def _read(html: str) -> Structure:
    structure = Structure()
    structure.feed(html)
    return structure


def test_the_page_is_whole_and_fetches_nothing(pages):
    page = _read(pages.html)
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.tags and "link" not in page.tags
    assert "@import" not in pages.html and "url(http" not in pages.html
    assert page.tags.count("svg") == 5  # arms, accuracy, two pruned arms, latency
    assert len(page.ids) == len(set(page.ids))


def test_sections_stand_in_their_order(pages):
    headings = re.findall(r"<h2>(.*?)</h2>", pages.html)
    assert headings == [
        "Comparison",
        "Accuracy against cost",
        "Accuracy over epochs",
        "Kept width per group",
        "Latency",
        "The prompt",
        "Certificate",
        "Excluded groups",
        "Environment and recipe",
    ]


def test_names_stay_names_whatever_they_hold():
    report = replace(example_report(groups=5, title=HOSTILE, reason=HOSTILE), skipped_images=(HOSTILE,))
    certificate = report.certificates["pruned"]
    groups = tuple(replace(group, root=HOSTILE) for group in certificate.groups)
    report = replace(
        report, certificates={"pruned": replace(certificate, groups=groups)}, command=HOSTILE, recipe=HOSTILE
    )
    pages = render(report)
    page = _read(pages.html)
    assert "script" not in page.tags
    assert "&lt;script&gt;" in pages.html
    outside = re.sub(r"^(`{3,})\n.*?\n\1$", "", pages.markdown, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside
    assert r"a\|b \`c\` \*d\* \[e\](f)" in outside


def test_a_fence_is_longer_than_any_in_the_text():
    assert fenced("a\n```\nb") == "````\na\n```\nb\n````"
    assert markdown_text("a\n| b") == r"a \| b"


def test_the_same_report_gives_the_same_bytes(report, pages):
    again = render(report, prompt=np.linspace(-0.3, 0.2, 3 * 16 * 16).reshape(3, 16, 16))
    assert again == pages


def test_colours_follow_the_page(pages):
    svg = "".join(re.findall(r"<svg.*?</svg>", pages.html, flags=re.DOTALL))
    assert "currentColor" in svg and "var(--arm-pruned)" in svg
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []


def test_a_report_of_little_still_renders(report):
    bare = {
        name: replace(report.arms[name], latency=(), memory=(), macs_uncounted={"aten::lstm": 2})
        for name in ("dense", "pruned")
    }
    small = replace(
        report,
        arms=bare,
        factors={"pruned": replace(report.factors["pruned"], latency_p50=())},
        certificates={},
        history=(),
    )
    pages = render(small)
    for text in (pages.markdown, pages.html):
        assert "Latency was not measured" in text
        assert "/proc/self/status" in text
        assert "No arm was pruned" in text
        assert "No epoch was recorded" in text
        assert "aten::lstm" in text
    assert _read(pages.html).open == []


def test_the_prompt_is_shown_with_its_strength(pages):
    assert "full colour is 0.300" in pages.html
    assert 'src="data:image/png;base64,' in pages.html
    assert "zero everywhere" in render(example_report(groups=2), prompt=np.zeros((3, 4, 4))).html


def test_markdown_keeps_the_last_epochs_of_every_stage(report):
    kept = [(r.stage, r.epoch) for r in last_epochs(report.history)]
    assert kept[:3] == [("fit", 3), ("fit", 4), ("fit", 5)]
    assert ("tune:pruned", 20) in kept and ("tune:pruned", 17) not in kept


def test_the_console_shows_every_arm_within_100_columns(report):
    console = Console(width=100, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(comparison_table(report))
        text = console.export_text()
    for part in ("dense+prompt", "pruned-prompt", "92.81 %", "2.05x", "61.2 M", "−0.81", "float form, batch 1"):
        assert part in text
    assert "…" not in text


def test_rendering_never_imports_torch():
    code = (
        "import sys, vpdeploy.report.render, vpdeploy.report.compare, vpdeploy.report.table;"
        "print([name for name in ('torch', 'torchvision', 'onnxruntime', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bounds_are_met_or_not_at_the_headline(report):
    row, drop = report.factors["pruned"].latency_p50[0], -100 * report.accuracy_difference["pruned"].difference
    p90 = report.arms["pruned"].latency[0].p90_ms
    for shift, met in ((1e-6, True), (-1e-6, False)):
        asked = {"min_speedup": row.factor - shift, "max_drop": drop + shift, "max_latency_ms": p90 + shift}
        found = bounds(report, **asked)
        assert [bound.met for bound in found] == [met] * 3
        assert all(bound.line.startswith("met: " if met else "FAILED: ") for bound in found)
        assert [words in bound.line for bound, words in zip(found, ("speed-up", "top-1", "p90"), strict=True)] == [
            True
        ] * 3
    assert bounds(report) == []


def test_a_bound_tells_that_the_measurement_was_not_steady(report):
    shaken = tuple(replace(row, steady=False) for row in report.arms["dense"].latency)
    made = replace(report, arms={**report.arms, "dense": replace(report.arms["dense"], latency=shaken)})
    for told, of in ((False, report), (True, made)):
        speed, drop = bounds(of, min_speedup=1.0, max_drop=100.0)
        assert ("not a steady measurement" in speed.line) is told and "steady" not in drop.line


def test_what_was_not_measured_meets_no_bound(report):
    bare = replace(report, arms={name: replace(arm, latency=()) for name, arm in report.arms.items()})
    bare = replace(bare, factors={name: replace(saved, latency_p50=()) for name, saved in bare.factors.items()})
    found = bounds(bare, min_speedup=0.1, max_latency_ms=1e9)
    assert [(bound.met, "not measured" in bound.line) for bound in found] == [(False, True)] * 2
    assert not any("steady" in bound.line for bound in found)
    shaky = tuple(replace(row, steady=False) for row in report.arms["dense"].latency)
    bare = replace(bare, arms={**bare.arms, "dense": replace(bare.arms["dense"], latency=shaky)})
    assert not any("steady" in bound.line for bound in bounds(bare, min_speedup=0.1))
    alone = replace(report, arms={"dense": report.arms["dense"]})
    assert [bound.met for bound in bounds(alone, max_drop=100.0)] == [False]


def shown(table) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_runs_stand_side_by_side_at_conditions_that_all_share(report):
    """The first run's headline, or the first conditions that the other has, too; none is made up."""
    first = report.arms["dense"].latency

    def with_rows(keep) -> Report:
        return replace(
            report,
            arms={n: replace(a, latency=tuple(r for r in a.latency if keep(r))) for n, a in report.arms.items()},
            factors={
                n: replace(f, latency_p50=tuple(r for r in f.latency_p50 if keep(r))) for n, f in report.factors.items()
            },
        )

    assert "float form, batch 1, 1 thread" in shown(runs_table({"a": report, "b": report}))
    text = shown(runs_table({"a": report, "b": with_rows(lambda row: row.batch == 8 and row.threads == 2)}))
    assert "float form, batch 8, 2 threads" in text
    at = next(row for row in first if row.batch == 8 and row.threads == 2)
    pruned = next(row for row in report.arms["pruned"].latency if row.conditions == at.conditions)
    assert text.count(significant(pruned.p50_ms)) == 2
    text = shown(runs_table({"a": with_rows(lambda row: row.batch == 1), "b": with_rows(lambda row: row.batch == 8)}))
    assert "no conditions that all were measured under" in text
    other = replace(report, environment={"machine": {"cpu": "another"}})
    assert "measured on different machines: AMD EPYC, another" in shown(runs_table({"a": report, "b": other}))


def test_runs_of_other_test_images_are_not_compared_without_a_word(report):
    dense = report.arms["dense"]
    fewer = replace(report, arms={**report.arms, "dense": replace(dense, n=100)})
    elsewhere = replace(report, recipe=f'{report.recipe}\n[data]\nname = "digits"\n')
    assert "test images" not in shown(runs_table({"a": report, "b": report}))
    assert "are of different test images (100 of " in shown(runs_table({"a": report, "b": fewer}))
    assert "10000 of digits) and cannot be compared" in shown(runs_table({"a": report, "b": elsewhere}))


def test_folders_of_one_sweep_are_told_apart(report):
    """Their names differ at the end."""
    names = [f"/a/long/path/to/some/folder/of/many/runs/macs_ratio-0.{digit}" for digit in (4, 7)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(runs_table(dict.fromkeys(names, report)))
    lines = console.export_text().splitlines()
    column = slice(1, lines[1].index("arm") - 1)
    cells = "".join(line[column].strip() for line in lines)
    assert all(name in cells for name in names)


def test_a_precision_of_its_own_is_told_beside_the_engine(report):
    dense = report.arms["dense"]
    rows = (dense.latency[0], replace(dense.latency[0], precision="bf16"))
    text = shown(times_table({"dense": (rows, ())}, first="arm"))
    assert text.count("onnxruntime-cpu") == 2 and text.count("onnxruntime-cpu, bf16") == 1
