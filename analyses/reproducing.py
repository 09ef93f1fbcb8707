"""Commands that make a report again, and its panels on topics drawn anew."""

import shlex

from analyses.pairs import SHIPPED
from analyses.report import DEFAULT, SIZES, Report
from analyses.steered import refusal_openers

FIXED = ("tokens", "permutations", "every")
"""Numbers of a size that are what was asked, and no upper limits."""


def commands(report: Report) -> list[tuple[str, str]]:
    """Panel and command. The first makes the whole report again, number by number; the others are
    the verbs of single panels, with its models, settings and numbers of topics, but they draw these
    topics anew.

    The file of the prompts is `record.settings["prompts"]`; where that is missing its place is
    marked, because `contrast` is only its name.
    """
    base, aligned, *drifted = report.record.models
    size, label = report.size, report.tokens.aligned
    source = _source(report)
    prompts = () if source is None else ("--prompts", source)
    file = () if source is None else (source,)
    trained = [word for name in drifted for word in ("--drifted", name)]
    loaded = _loading(report)
    own = report.tokens.base_context
    context = () if own == "same" else ("--context", own)
    layers = report.sweeps[1][1].layers.tolist()
    whole = len(layers) == report.separation.distance.shape[1]
    sites = () if whole else ("--sites", f"{','.join(map(str, layers))}.resid_post")
    strengths = " ".join(f"{s:g}" for s in report.steering.strengths.tolist())
    openers = " ".join(refusal_openers(report.refusals, label) or ["I"])
    read = size.train + size.validation + size.test
    anew = ", topics drawn anew"
    found = [
        ("all, the same numbers", _whole(report)),
        (f"b{anew}", _line(
            "shift", base, aligned, "--topics", size.shifted, "--tokens", size.tokens,
            *context, *prompts, *loaded,
        )),
        (f"c, {label}{anew}", _line(
            "probe", aligned, *file, "--topics", read, "--permutations", size.permutations,
            *sites, *loaded,
        )),
        ("beside d and e", _line(
            "subspace", base, aligned, *(w for name in drifted for w in ("--tuned", name)),
            "--only", "activations", *prompts, *loaded,
        )),
        (f"f{anew}", _line(
            "sweep", aligned, *file, "--sites", report.steering.sites[0],
            "--strengths", strengths, "--effects", "odds", "--openers", openers,
            "--topics", size.steered, "--trained", size.train, *loaded,
        )),
    ]  # fmt: skip
    if report.drift is not None and drifted:
        line = _line("drift", base, aligned, *trained, "--topics", size.answered, *prompts, *loaded)
        found.append((f"a, g, h{anew}", line))
    return found


def _whole(report: Report) -> str:
    """The command of the report; a line of Python where its size, or a built-in lineage without
    drifted models, has no option."""
    base, aligned, *drifted = report.record.models
    record, own = report.record, report.tokens.base_context
    source, named = _source(report), _size_option(report)
    if named is None or (not drifted and (base, aligned) == DEFAULT[:2]):
        call = (
            f"run({base!r}, {aligned!r}, {drifted!r}, prompts={source!r}, size={report.size!r}, "
            f"seed={record.seeds[0]}, engine={record.engine!r}, base_context={own!r}, "
            f"dtype={record.dtype!r})"
        )
        code = "from analyses.page import write; from analyses.report import Size, run; "
        return shlex.join(["python", "-c", f"{code}write({call}, 'alignlens-report')"])
    words = ["--base", base, "--aligned", aligned]
    words += [word for name in drifted for word in ("--drifted", name)]
    words += [] if source is None else ["--prompts", source]
    words += [] if own == "same" else ["--base-context", own]
    return _line("report", *words, *named, *_loading(report))


def _source(report: Report) -> str | None:
    """The file of the prompts; None for those that ship."""
    if report.contrast == SHIPPED:
        return None
    return str(report.record.settings.get("prompts") or f"FILE OF {report.contrast}")


def _loading(report: Report) -> list[str]:
    """Seed, engine and dtype where they are not the default."""
    record = report.record
    found = ["--seed", str(record.seeds[0])] if record.seeds[0] else []
    found += ["--engine", record.engine] if record.engine != "transformers" else []
    return found + (["--dtype", record.dtype] if record.dtype != "float32" else [])


def _size_option(report: Report) -> tuple[str, ...] | None:
    """The option of `alignlens report` that asks for this size; None where none does."""
    own, limits = vars(report.size), vars(SIZES["default"]).keys() - set(FIXED)
    for name, known in SIZES.items():
        asked = vars(known)
        bitten = report.contrast == SHIPPED  # there are as many topics as any size asks for
        fits = all(own[k] == asked[k] if bitten else own[k] <= asked[k] for k in limits)
        if fits and all(own[k] == asked[k] for k in FIXED):
            return () if name == "default" else (f"--{name}",)
    return None


def _line(verb: str, *words: object) -> str:
    return shlex.join(["alignlens", verb, *map(str, words)])
