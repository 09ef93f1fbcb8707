"""A verdict as one page that can be published beside the vector: no script, nothing from outside."""

import html
from pathlib import Path

from probes import figures, files
from steering.export.verdict import OUTCOMES, UNITS, Verdict

_MEANING = {
    "equal": "The program's distributions are those of the edit that was meant.",
    "different": "The program is steered, and not as was meant.",
    "not applied": "The program answers as if there were no vector. Do not use this export.",
    "another model": "Without the vector, too, the program answers as another model than the one "
    "given: nothing can be said of the vector.",
    "cannot tell": "These answers do not tell what was meant from something else: the steering "
    "moves them too little beside what the program is exact to, or they are too short. Take more "
    "prompts and tokens, a greater strength, or weights of full precision.",
    "format checked": "The file holds what was meant, as the program's loader would read it. The "
    "program itself was not run.",
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { border-left: .4rem solid; padding: .4rem 1rem; background: #f6f6f6; }
.verdict b { font-size: 1.25rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
       border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } code { background: #f2f2f2; overflow-wrap: anywhere; }
"""


def write_verdict(verdict: Verdict, folder: Path | str) -> Path:
    """Write `result.json`, `record.json` and `verdict.html`; gives the page."""
    folder = verdict.save(folder)
    files.write_text(folder / "verdict.html", page(verdict))
    return folder / "verdict.html"


def page(verdict: Verdict) -> str:
    """The page's HTML. Every text that comes from elsewhere is escaped."""
    v, said = verdict, html.escape
    color = figures.PALETTE[0] if v.outcome in ("equal", "format checked") else figures.PALETTE[1]
    rows = "".join(
        f"<tr><td>{said(row['steered'])}</td><td>{row['largest difference']:.3g}</td>"
        f"<td>{'' if row['mean KL, nats'] is None else format(row['mean KL, nats'], '.3g')}</td>"
        f"<td>{'equal' if row['equal'] else ''}</td></tr>"
        for row in v.frame().astype(object).where(v.frame().notna(), None).to_dict("records")
    )
    facts = {
        "Program": v.consumer,
        "Steering": v.steering,
        "Model": ", ".join(v.record.models),
        "Fingerprint": ", ".join(f[:16] for f in v.record.fingerprints),
        "Replayed": f"{v.n_prompts} prompts, {v.n_tokens} tokens" if v.n_prompts else "nothing",
        "Off by": f"{v.gaps['as it was made']:.3g} {UNITS[v.kind]}, allowed {v.allowed:.3g}",
        "The steering moves them by": f"{v.effect:.3g}" if v.n_prompts else "",
        "Both unsteered": "" if v.floor is None else f"{v.floor:.3g} {UNITS[v.kind]}",
        "Effect explained": "" if v.explained is None else f"{v.explained:.6f}",
        "Versions": ", ".join(f"{name} {number}" for name, number in v.record.versions.items()),
    }
    table = "".join(
        f"<tr><th>{said(name)}</th><td>{said(text)}</td></tr>"
        for name, text in facts.items()
        if text
    )
    notes = "".join(f"<li>{said(note)}</li>" for note in v.notes)
    found = f" Found: {said(v.diagnosis)}." if v.outcome == "different" else ""
    if v.rivals:
        found += f" The answers would be the same {said(', '.join(v.rivals))}."
    drawn = v.plot().get_figure(root=True)
    picture = "" if drawn is None else figures.svg(drawn)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{said(OUTCOMES[v.outcome])}: {said(v.consumer)}</title><style>{_STYLE}</style>
<h1>Is this vector served as it was made?</h1>
<div class="verdict" style="border-color:{color}"><b>{said(OUTCOMES[v.outcome])}</b><br>
{said(_MEANING[v.outcome])}{found}</div>
<h2>What was measured</h2><table>{table}</table>
{f"<ul>{notes}</ul>" if notes else ""}
<h2>The program against our own model, steered in each way</h2>
<p>Answers of the program are read by our own model under the edit that was meant, under none, and
under faults that exports are known for. The way with the smallest difference is what it does.</p>
{picture}
<table><tr><th>steered</th><th>largest difference</th><th>mean KL, nats</th><th></th></tr>{rows}</table>
<h2>Make it again</h2><p><code>{said(v.record.command or "alignlens verify")}</code></p>
</html>
"""
