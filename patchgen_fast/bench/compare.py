"""Old against new: a gate on the speed-up measured in the same run, not on absolute times.

Machines in CI differ from run to run, and the ratio "peer's time / ours" in one run differs far
less. A case has become slower only if, against every peer that both runs timed,

- the median ratio fell by more than `relative`, and by more than `absolute`, and
- it fell by more than the scatter of single rounds, times `scatters`, and
- a Mann-Whitney test on the paired ratios of all rounds agrees (p < `significance`).

A slower kernel of ours shows against every peer; a peer that had a bad run shows against itself
alone. The test takes rounds of a run for independent, which they are not where other work takes
turns with ours: hence the condition on scatter. A case of several threads that was disturbed in
either run has no verdict, and says so: a thread that waits for one whose core was taken waits in
eager and in ours for other lengths, whatever their kernels. Nor has one whose cores shared a cache
in one run and not in the other. Absolute times are compared as well, and only warn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from patchgen_fast.bench import stats, tables
from patchgen_fast.bench.schema import OK, RED, CaseResult, Cell, ResultFile

MARKER = "<!-- patchgen-fast bench compare -->"
MINIMUM_SAMPLES = 4  # below, a rank test cannot reach the significance


@dataclass(frozen=True)
class Gate:
    """When a change counts."""

    relative: float = 0.08
    absolute: float = 0.05  # of the speed-up: 1.30 to 1.26 is no news
    scatters: float = 1.0
    significance: float = 0.01
    time_warning: float = 0.15  # absolute times that changed by more than this are mentioned
    apart: float = 1.6  # handovers from core to core that differ more are those of other cores
    blind: float = 0.15  # scatter that hides larger changes than this is mentioned


@dataclass
class Change:
    """One case in both runs."""

    id: str
    label: str
    verdict: str  # "same", "slower", "faster", "disturbed", "parity", "lost", "new", "no number"
    against: str = ""  # the peer that decided
    old_ratio: float | None = None
    new_ratio: float | None = None
    p_value: float | None = None
    old_s: float | None = None
    new_s: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def change(self) -> float | None:
        """new / old - 1 of the speed-up: negative is slower."""
        if not self.old_ratio or not self.new_ratio:
            return None
        return self.new_ratio / self.old_ratio - 1.0


@dataclass
class Comparison:
    """All changes, and what they come to."""

    changes: list[Change]
    warnings: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict in ("slower", "lost")]

    @property
    def exit_code(self) -> int:
        """3 if the new run has a red parity check, 1 for a regression, else 0."""
        if any(change.verdict == "parity" for change in self.changes):
            return 3
        return 1 if self.regressions else 0


def compare(old: ResultFile, new: ResultFile, gate: Gate | None = None) -> Comparison:
    """Match cases by id and judge each."""
    gate = gate or Gate()
    before = {case.id: case for case in old.cases}
    after = {case.id: case for case in new.cases}
    changes = [_judge(before.get(name), case, gate) for name, case in after.items()]
    if new.complete:
        changes += [
            _lost(case) for name, case in before.items() if name not in after and case.status == OK
        ]
    return Comparison(changes, _warnings(old, new))


def _lost(case: CaseResult) -> Change:
    return Change(case.id, tables.label(case), "no number", notes=["not in the new run"])


def _judge(old: CaseResult | None, new: CaseResult, gate: Gate) -> Change:
    change = Change(new.id, f"{tables.label(new)} {tables.short(new.dtype)}", "same")
    if new.status == RED:
        change.verdict, change.notes = "parity", [new.reason]
        return change
    if old is None:
        change.verdict = "new"
        return change
    if new.status != OK or old.status != OK:
        had_number = old.status == OK
        # A case that had a number and now raises or is refused is a loss, not noise.
        change.verdict = (
            "lost" if had_number and new.status in ("error", "refused") else "no number"
        )
        change.notes = [f"{old.status} before, {new.status} now: {new.reason}"]
        return change
    _times(old, new, change, gate)
    verdicts = [
        _against(peer, old, new, gate) for peer in new.cells if _paired(peer, old) is not None
    ]
    if not verdicts:
        change.verdict, change.notes = "no number", ["no peer was timed in both runs"]
        return change
    names = {one.verdict for one in verdicts}
    # The peer that shows the least change decides: all must agree on a verdict.
    least = min(verdicts, key=lambda one: abs(one.new_ratio / one.old_ratio - 1.0))
    change.against, change.p_value = least.peer, least.p_value
    change.old_ratio, change.new_ratio = least.old_ratio, least.new_ratio
    change.verdict = least.verdict if len(names) == 1 else "same"
    if new.device == "cpu" and new.threads > 1 and not (old.undisturbed and new.undisturbed):
        change.verdict = "disturbed"
    if moved := _moved(old.handover_s, new.handover_s, gate):
        change.verdict = "disturbed"
        change.notes.append(moved)
    hidden = min(one.hidden for one in verdicts)
    if hidden > gate.blind:
        change.notes.append(f"scatter hides changes under {hidden:.0%}")
    return change


def _moved(old_s: float | None, new_s: float | None, gate: Gate) -> str:
    """That the cores lie nearer or farther than they did, if so."""
    if not old_s or not new_s or max(old_s, new_s) <= gate.apart * min(old_s, new_s):
        return ""
    return f"from core to core in {old_s * 1e9:.0f} ns before, {new_s * 1e9:.0f} ns now"


def _paired(peer: Cell, old: CaseResult) -> Cell | None:
    other = old.cell(peer.name)
    if peer.role == "ours" or not peer.speedup_of_ours or not other or not other.speedup_of_ours:
        return None
    return other


class Against(NamedTuple):
    """A case by one peer alone."""

    verdict: str
    peer: str
    old_ratio: float
    new_ratio: float
    p_value: float
    hidden: float  # changes of the ratio under this share of it are lost in the scatter


def _against(peer: Cell, old: CaseResult, new: CaseResult, gate: Gate) -> Against:
    was, now = ratios(old, peer.name), ratios(new, peer.name)
    old_ratio, new_ratio = stats.median(was), stats.median(now)
    slower = stats.mann_whitney_less(now, was)
    faster = stats.mann_whitney_less(was, now)
    noise = gate.scatters * math.hypot(stats.scatter(was), stats.scatter(now))
    big = abs(new_ratio / old_ratio - 1.0) > gate.relative
    big = big and abs(new_ratio - old_ratio) > max(gate.absolute, noise)
    enough = min(len(was), len(now)) >= MINIMUM_SAMPLES
    verdict = "same"
    if big and enough and slower < gate.significance:
        verdict = "slower"
    elif big and enough and faster < gate.significance:
        verdict = "faster"
    p_value = min(slower, faster)
    return Against(verdict, peer.name, old_ratio, new_ratio, p_value, noise / old_ratio)


def ratios(case: CaseResult, peer: str) -> list[float]:
    """The paired ratios "peer / ours" of every round."""
    theirs, ours = case.cell(peer), case.ours
    if not theirs or not ours or not theirs.timing or not ours.timing:
        return []
    pairs = zip(theirs.timing.samples, ours.timing.samples, strict=True)
    return [a / b for a, b in pairs]


def _times(old: CaseResult, new: CaseResult, change: Change, gate: Gate) -> None:
    was, now = old.ours, new.ours
    if was and now and was.timing and now.timing:
        change.old_s, change.new_s = was.timing.median, now.timing.median
        ratio = change.new_s / change.old_s
        if abs(ratio - 1.0) > gate.time_warning:
            change.notes.append(f"time {'up' if ratio > 1 else 'down'} {abs(ratio - 1):.0%}")
        if was.backend != now.backend:
            change.notes.append(f"backend {was.backend or '?'} before, {now.backend or '?'} now")


def _warnings(old: ResultFile, new: ResultFile) -> list[str]:
    warnings = []
    if not old.complete:
        warnings.append("the old run was interrupted")
    if not new.complete:
        warnings.append("the new run was interrupted")
    if old.environment.cpu != new.environment.cpu:
        warnings.append(
            f"other processor: {old.environment.cpu} before, {new.environment.cpu} now; ratios of "
            "different processors are not comparable"
        )
    if old.environment.gpu.get("name") != new.environment.gpu.get("name"):
        warnings.append("other GPU")
    for name, version in new.environment.packages.items():
        was = old.environment.packages.get(name)
        if was and was != version:
            warnings.append(f"{name} {was} before, {version} now")
    return warnings


HEADINGS = (
    "case",
    "verdict",
    "× before",
    "× now",
    "change",
    "against",
    "p",
    "ms before",
    "ms now",
    "notes",
)


def rows(comparison: Comparison) -> list[list[str]]:
    """Changes first, then what stayed."""
    verdicts = ("parity", "lost", "slower", "faster", "disturbed", "new", "no number", "same")
    order = {verdict: place for place, verdict in enumerate(verdicts)}
    out = []
    for change in sorted(comparison.changes, key=lambda c: (order[c.verdict], c.id)):
        out.append(
            [
                change.label,
                change.verdict,
                f"{change.old_ratio:.2f}" if change.old_ratio else "",
                f"{change.new_ratio:.2f}" if change.new_ratio else "",
                f"{change.change:+.1%}" if change.change is not None else "",
                change.against,
                f"{change.p_value:.3f}" if change.p_value is not None else "",
                tables.milliseconds(change.old_s) if change.old_s else "",
                tables.milliseconds(change.new_s) if change.new_s else "",
                "; ".join(change.notes),
            ]
        )
    return out


def summary(comparison: Comparison) -> str:
    """One sentence."""
    counts = {
        verdict: sum(change.verdict == verdict for change in comparison.changes)
        for verdict in ("parity", "lost", "slower", "faster", "same", "disturbed")
    }
    words = {
        "parity": "with a red parity check",
        "lost": "lost",
        "slower": "slower",
        "faster": "faster",
        "same": "unchanged",
        "disturbed": "too disturbed to judge",
    }
    said = [f"{count} {words[name]}" for name, count in counts.items() if count]
    return f"{len(comparison.changes)} cases: {', '.join(said) or 'none comparable'}."


def markdown(comparison: Comparison) -> str:
    """For a pull-request comment; the hidden marker lets a workflow find and replace it."""
    parts = [MARKER, "### patchgen_fast benchmark", "", summary(comparison), ""]
    parts += [f"> {line}" for line in comparison.warnings]
    parts += ["", tables.markdown_table(HEADINGS, rows(comparison)), ""]
    return "\n".join(parts)
