"""docs/coverage.md from the records of tests/judge.py."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Record", "complaints", "judged_by_oracle", "page"]

Record = dict[str, Any]

TITLES = {
    "tv": "torchvision, classification",
    "tvx": "torchvision, detection, segmentation, video",
    "timm": "timm, every family",
    "hf": "transformers",
    "hfx": "transformers, more architectures",
    "shape": "shapes of nets",
}


# The oracle adds in another order. A model that amplifies rounding can't be judged more finely than that allows.
_ROUNDINGS, _COARSEST = 10, 1e-7


def judged_by_oracle(record: Record) -> str:
    """What the oracle says: exact, exact but for rounding, differs, or unjudged."""
    found = [
        (record[f"oracle {s}"], record.get(f"rounding {s}", 0.0)) for s in ("0.5", "0.9") if f"oracle {s}" in record
    ]
    tolerance = record.get("tolerance", 1e-9)
    gaps = [(gap, rounding) for gap, rounding in found if isinstance(gap, float)]
    if any(gap > max(tolerance, min(_COARSEST, _ROUNDINGS * rounding)) for gap, rounding in gaps):
        return "differs"
    if len(gaps) < len(found):
        return "unjudged"
    return "exact" if all(gap <= tolerance for gap, _ in gaps) else "exact but for rounding"


def complaints(record: Record) -> list[str]:
    """What is wrong with a model that is neither exact in every respect nor refused; nothing for any other.

    Another batch size or a train mode that the graph refuses with its reason are no silent differences: the page has
    them, as remarks.
    """
    if record["state"] == "refused":
        return []
    if record["state"] != "exact":
        return [f"{record['state']}: {record.get('reason', '')}"]
    found = []
    if judged_by_oracle(record) == "differs":
        found.append(f"the oracle differs: {record.get('oracle 0.5')}; {record.get('oracle 0.9')}")
    if record.get("batch") not in ("ok", "fixed", None) and not record["batch"].startswith("refused"):
        found.append(f"another batch size: {record['batch']}")
    if record.get("size", "ok").startswith(("traced differs", "slim differs", "fails")):
        found.append(f"another size: {record['size']}")
    if not record.get("train", "ok").startswith(("ok", "refused: ", "the model itself: ")):
        found.append(f"train mode: {record['train']}")
    if not record.get("untouched", True):
        found.append("the model given was changed")
    return found


def forwards(record: Record) -> float:
    """Time of trace, analyze, plan and rewrite in forwards of the model."""
    return (record["trace"] + record["analyze"] + record["rewrite"]) / max(record["forward"], 1e-9)


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")


def _cell(text: str) -> str:
    """One line; files are named from the folder on that every checkout and every Python has."""
    text = re.sub(r"/[^\s():,]*/(?=tests/zoo/|lib/python3)", "", text)
    return " ".join(text.split()).replace("|", "\\|")


def _overall(key: str, otherwise: float, records: Iterable[Record]) -> float:
    """Median of a figure over all models; one that is not exact has the worst of it."""
    return _median(r[key] if r["state"] == "exact" else otherwise for r in records)


SUMMARY = """# Coverage

Written by `make matrix` (`python -m tests.matrix`); do not edit. Each model is captured, pruned to 50 % and to 90 % of
its channels without any option, and compared in double precision with the masked dense graph (at most 1e-9 relative
difference) and with an oracle that knows no labels (`tests/kept_means.py`), which adds in another order: a model that
moves by itself when its weights move by half a unit in the last place may differ from it by ten times that much, and
never by more than 1e-7.

- **exact**: both sparsities agree with the masked reference, and the traced graph with the model.
- **refused**: an error with its reason; nothing was changed. **mismatch**: `verify` found a difference and raised.
- **can shrink**: share of the parameters that some plan makes smaller. **but for outputs**: the same, and those counted
  too that only keep their size because an output of the model has it, or that the forward never uses.
- **time**: trace, analyze, plan and rewrite, in forwards of the same model and inputs (tiny models: mostly overhead).

- **rules**: how many operator rules the model used; the records have their names.

Medians of what is left and of what can shrink are over all models of a corpus; one that is not exact counts as wholly
left. The other medians are over the exact models."""

HEAD = (
    "corpus", "models", "exact", "refused", "mismatch", "crashed", "oracle: exact / differs / unjudged", "left at 50 %",
    "left at 90 %", "can shrink", "but for outputs", "time", "rules",
)  # fmt: skip
MODEL = (
    "model", "parameters", "left at 50 %", "left at 90 %", "can shrink", "but for outputs", "time", "rules", "oracle",
)  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(_cell(str(cell)) for cell in row) + " |" for row in rows),
    ]


def _state_of_page(records: Sequence[Record], missing: int) -> str:
    """What a reader must know before the numbers: what was not judged, by which code, and how strictly."""
    codes = len({r.get("code") for r in records})
    loose = sum(r.get("tolerance", 1e-9) > 1e-9 or r.get("precision") == "single" for r in records)
    mixed = f" The records come from {codes} versions of the code." if codes > 1 else ""
    return (
        f"{len(records)} models judged, **{missing} of the corpora not judged yet**.{mixed} {loose} models "
        "run in single precision or pass through it on their way; those are allowed 1e-5 to 1e-4."
    )


def page(records: dict[str, Record], missing: int) -> str:
    """docs/coverage.md; ``missing`` models of the corpora have no record."""
    corpora = {prefix: [r for n, r in records.items() if n.split(":")[0] == prefix] for prefix in TITLES}
    everything = [r for rs in corpora.values() for r in rs]
    lines = [*SUMMARY.splitlines(), "", _state_of_page(everything, missing)]
    titled = [*((TITLES[p], rs) for p, rs in corpora.items()), ("**all**", everything)]
    lines += _table(HEAD, [_summary(title, rs) for title, rs in titled])
    _not_exact(lines, everything)
    _remarks(lines, [r for r in everything if r["state"] == "exact"])
    for prefix, rs in corpora.items():
        exact = sorted((r for r in rs if r["state"] == "exact"), key=lambda r: r["name"])
        if exact:
            lines += ["", f"## {TITLES[prefix]}"]
            lines += _table(MODEL, map(_model, exact))
    return "\n".join(lines) + "\n"


def _summary(title: str, records: Sequence[Record]) -> tuple[object, ...]:
    states = Counter(r["state"] for r in records)
    exact = [r for r in records if r["state"] == "exact"]
    oracle = Counter(judged_by_oracle(r) for r in exact)
    broken = sum(states[s] for s in ("crashed", "timeout", "unbuilt"))
    return (
        title,
        len(records),
        *(states[s] for s in ("exact", "refused", "mismatch")),
        broken,
        f"{oracle['exact'] + oracle['exact but for rounding']} / {oracle['differs']} / {oracle['unjudged']}",
        f"{_overall('left 0.5', 1.0, records):.2f}",
        f"{_overall('left 0.9', 1.0, records):.3f}",
        f"{_overall('prunable', 0.0, records):.3f}",
        f"{_overall('free', 0.0, records):.3f}",
        f"{_median(map(forwards, exact)):.0f}",
        f"{_median(len(r.get('rules', ())) for r in exact):.0f}",
    )


def _by_oracle(r: Record) -> str:
    gaps = f"{r.get('oracle 0.5')}; {r.get('oracle 0.9')}"
    rounding = max((r[key] for key in ("rounding 0.5", "rounding 0.9") if key in r), default=0.0)
    return f"{judged_by_oracle(r)}: {gaps}" + (
        f" (rounding moves the model itself by {rounding:.1e})" if rounding else ""
    )


def _model(r: Record) -> tuple[object, ...]:
    return (
        r["name"].split(":", 1)[1],
        f"{r['parameters']:,}",
        f"{r['left 0.5']:.2f}",
        f"{r['left 0.9']:.3f}",
        f"{r['prunable']:.3f}",
        f"{r['free']:.3f}",
        f"{forwards(r):.0f}",
        len(r.get("rules", ())),
        judged_by_oracle(r),
    )


def _not_exact(lines: list[str], records: Sequence[Record]) -> None:
    bad = sorted((r for r in records if r["state"] != "exact"), key=lambda r: (r["state"], r["name"]))
    lines += ["", "## Not exact"]
    lines += _table(("model", "state", "reason"), [(r["name"], r["state"], r.get("reason", "")[:260]) for r in bad])


def _remarks(lines: list[str], exact: Sequence[Record]) -> None:
    oracle = [(r, _by_oracle(r)) for r in exact if judged_by_oracle(r) != "exact"]
    batch = [(r, r["batch"]) for r in exact if r.get("batch") not in ("ok", "fixed", None)]
    size = [(r, r["size"]) for r in exact if not r.get("size", "ok").startswith(("ok", "fixed"))]
    train = [(r, r["train"]) for r in exact if r.get("train") not in ("ok", None)]
    frozen = [
        (r, f"{r['free']:.2f}: {'; '.join((r['unknown'] or r['frozen'])[:2])}") for r in exact if r["free"] < 0.97
    ]
    parts = {
        "The oracle differs or can't judge": oracle,
        "Another batch size": batch,
        "Another resolution or sequence length": size,
        "Train mode: outputs, gradients, buffers": train,
        "Frozen for another reason than an output": frozen,
    }
    for title, found in parts.items():
        if found:
            rows = [(r["name"], str(text)[:260]) for r, text in sorted(found, key=lambda pair: pair[0]["name"])]
            lines += ["", f"## {title}", *_table(("model", ""), rows)]
    unknown = Counter(op for r in exact for op in {u.split(": ")[0] for u in r["unknown"]})
    if unknown:
        lines += ["", "## Operators that froze channels"]
        lines += _table(("operator", "models"), [(f"`{op}`", number) for op, number in unknown.most_common()])
    rules = Counter(rule for r in exact for rule in r.get("rules", ()))
    if rules:
        lines += ["", "## Rules used"]
        lines += _table(("rule", "models"), [(f"`{rule}`", number) for rule, number in rules.most_common()])
