"""A run of all operators on one machine: made, written, read back, compared with an earlier one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import ppnet.roofline.cases  # noqa: F401  registers the operators
from ppnet.errors import PPNetError
from ppnet.evaluate.progress import Progress
from ppnet.roofline.case import OPERATORS, Band, Case, Row, Size, measure
from ppnet.roofline.machine import Machine
from ppnet.roofline.timing import off_the_default_stream

SCHEMA = "ppnet bench operators 1"
SECONDS = {"full": 3.0, "quick": 1.0, "tiny": 0.0}  # of measuring per case
MACHINE_KEYS = ("device", "processor", "driver", "threads", "isa", "pages", "torch")


@dataclass(frozen=True)
class Result:
    """`machine`: setting and ceilings (`Machine.to_dict`); `size`: "full" or "quick"; `rows`: one per case;
    `failed`: case -> error, on a GPU."""

    machine: dict[str, Any]
    size: str
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """One line per case and provider."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = ["operator", "variant", "dtype", "shape", "keep", "bytes", "flops", "provider", "seconds", "p20", "p80"]
        where = ["device", "processor", "driver", "isa", "threads", "torch", "ppnet", "commit"]
        timing = ["timing", "eager seconds"]
        writer.writerow([*head, "ours x faster", "share of ideal", "bound", "ceiling", *timing, *where])
        for row in self.rows:
            shape = " ".join(f"{name}={value}" for name, value in row.shape.items())
            for provider, band in row.seconds.items():
                faster = row.faster.get(provider, 1.0)
                share = row.share.median if provider not in row.faster else row.ideal / band.median
                eager = row.eager.get(provider)
                writer.writerow(
                    [row.operator, row.variant, row.dtype, shape, row.keep, int(row.bytes), int(row.flops), provider]
                    + [f"{value:.6g}" for value in (band.median, band.p20, band.p80, faster, share)]
                    + [row.bound, f"{row.ceiling.median:.6g}", row.timing.get(provider, "host")]
                    + ["" if eager is None else f"{eager.median:.6g}", *(self.machine.get(key) for key in where)]
                )
        return out.getvalue()

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """An earlier result: its result.json, or the folder that holds it.

        Raises:
            PPNetError: no such file, not JSON, or not a result of this schema.
        """
        path = Path(path)
        path = path / "result.json" if path.is_dir() else path
        what = "give the result.json that `ppnet bench --out FOLDER` wrote"
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            raise PPNetError(f"compare: {path} does not exist; {what}.") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PPNetError(f"compare: {path} cannot be read as JSON ({error}); {what}.") from error
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise PPNetError(f"compare: {path} has the schema {schema!r}, needed is {SCHEMA!r}; {what}.")
        try:
            rows = [_row(row) for row in found["rows"]]
            return cls(dict(found["machine"]), str(found["size"]), rows, dict(found.get("failed", {})))
        except (KeyError, TypeError, ValueError) as error:
            raise PPNetError(f"compare: {path} is damaged ({type(error).__name__}: {error}); {what}.") from error


def _row(found: dict[str, Any]) -> Row:
    bands = {name: Band(**found[name]) for name in ("ceiling", "share")}
    times = {key: {name: Band(**band) for name, band in found.get(key, {}).items()} for key in ("seconds", "eager")}
    return Row(**{**found, **bands, **times})


def chosen(operators: Sequence[str] | None, size: Size, device: torch.device) -> list[Case]:
    """The cases of the named operators; None: of all.

    Raises:
        PPNetError: an operator is not known.
    """
    names = list(OPERATORS) if operators is None else list(operators)
    unknown = [name for name in names if name not in OPERATORS]
    if unknown or not names:
        asked = ", ".join(map(repr, unknown)) or "none"
        raise PPNetError(f"operators: {asked} is not known; known are {', '.join(sorted(OPERATORS))}.")
    return [case for name in names for case in OPERATORS[name](size, device)]


def run(
    operators: Sequence[str] | None = None,
    *,
    size: Size = "full",
    device: str | torch.device = "cpu",
    keep: Callable[[Result], None] | None = None,
) -> Result:
    """Measures the machine, then every case of the named operators (None: all), each beside its baselines.

    `keep` is called after every case with all that is measured so far, so that a run that is stopped loses nothing.
    On a GPU, whose minutes are few, a case that fails is noted and the others go on.

    Raises:
        PPNetError: an operator is not known.
    """
    device = torch.device(device)
    cases = chosen(operators, size, device)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    whole = size == "full"
    with (
        Progress(len(cases) + 1, "operators, cases") as report,
        torch.no_grad(),
        off_the_default_stream(device),
    ):
        machine = Machine(device, rounds=7 if whole else 3)
        report.advance()
        for case in cases:
            try:
                rows.append(measure(case, machine, seconds=SECONDS[size], least=7 if whole else 5))
            except Exception as error:
                if device.type != "cuda":
                    raise
                failed[f"{case.operator}: {case.label}"] = f"{type(error).__name__}: {error}"[:500]
            report.advance()
            if keep is not None:
                keep(Result(machine.to_dict(), size, rows, failed))
    return Result(machine.to_dict(), size, rows, failed)


@dataclass(frozen=True)
class Change:
    """One case then and now. `ratio`: seconds now / seconds then. `mark`: "slower", "faster", "", "new" or "gone"."""

    operator: str
    label: str
    before: float | None
    now: float | None
    ratio: float | None
    share_before: float | None
    share_now: float | None
    mark: str


def compare(before: Result, now: Result) -> tuple[list[Change], list[str]]:
    """Every case of the operators measured now, and what has to be known about it (other machine, other ceilings).

    "slower" takes both: the bands (20th to 80th percentile) of the seconds are apart, and so are those of the share of
    the ideal. A machine that is slower as a whole moves the first alone, and is told in the notes.
    """
    operators = {row.operator for row in now.rows}
    old, new = ({_key(row): row for row in result.rows if row.operator in operators} for result in (before, now))
    changes = [_change(old.get(key), new.get(key)) for key in dict.fromkeys([*new, *old])]
    notes = [
        f"another {key}: then {before.machine.get(key)}, now {now.machine.get(key)}"
        for key in MACHINE_KEYS
        if before.machine.get(key) != now.machine.get(key)
    ]
    if before.size != now.size:
        notes.append(f"then a {before.size} run, now a {now.size} one: not the same cases")
    for kind, figure in now.machine.get("ceilings", {}).items():
        then = before.machine.get("ceilings", {}).get(kind)
        if then and _apart(then["value"], figure["value"]):
            values = f"{then['value']['median']:.1f}, now {figure['value']['median']:.1f} {figure['unit']}"
            notes.append(f"the machine's {kind} differs: then {values}")
    return changes, notes


def _apart(a: dict[str, float], b: dict[str, float]) -> bool:
    return a["p20"] > b["p80"] or b["p20"] > a["p80"]


def _key(row: Row) -> tuple[Any, ...]:
    return row.operator, row.variant, row.dtype, tuple(sorted(row.shape.items())), row.keep


def _change(before: Row | None, now: Row | None) -> Change:
    row = now or before
    assert row is not None
    label = f"{row.variant}, {row.dtype}"
    if before is None or now is None:
        seconds, share = row.seconds[next(iter(row.seconds))].median, row.share.median
        if before is None:
            return Change(row.operator, label, None, seconds, None, None, share, "new")
        return Change(row.operator, label, seconds, None, None, share, None, "gone")
    then, ours = before.seconds[next(iter(before.seconds))], now.seconds[next(iter(now.seconds))]
    mark = ""
    if ours.p20 > then.p80 and now.share.p80 < before.share.p20:
        mark = "slower"
    elif ours.p80 < then.p20 and now.share.p20 > before.share.p80:
        mark = "faster"
    ratio = ours.median / then.median
    return Change(row.operator, label, then.median, ours.median, ratio, before.share.median, now.share.median, mark)
