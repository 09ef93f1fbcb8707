"""A report written to disk: one offline page, figures, a table, the numbers and their record."""

import base64
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from analyses import reproducing, summary
from analyses.drift.terms import TERMS
from analyses.figures import broken, legend_below
from analyses.report import Report
from analyses.tokens import contexts
from analyses.tokens.shift import KINDS
from probes import figures, files
from probes.results import Result

HERE = Path(__file__).parent
TOKEN_PROMPTS = 12
"""Prompts of each class whose coloured answers the page shows."""


def write(report: Report, folder: Path | str) -> Path:
    """Write everything into `folder`; returns the page's path."""
    folder = Path(folder)
    record = dataclasses.asdict(report.record)
    pictures = draw(report)
    for name, figure in pictures.items():
        figures.save(figure, folder / name, record)
    named: dict[str, Result] = {
        "tokens": report.tokens,
        "separation": report.separation,
        "maps": report.maps,
        "refusals": report.refusals,
        "steering": report.steering,
        **{f"probe-{label}": sweep for label, sweep in report.sweeps},
    }
    if report.drift is not None:
        named |= {"drift": report.drift[0], "weights": report.drift[1]}
    for name, result in named.items():
        dataclasses.replace(result, record=report.record).save(folder / "results" / name)
    rows = table(report)
    said = summary.sentences(report)
    files.write_text(folder / "table.csv", _csv(rows))
    files.write_json(
        folder / "result.json",
        {
            "summary": said,
            "size": dataclasses.asdict(report.size),
            "base_context": report.tokens.base_context,
            "table": rows,
        },
    )
    files.write_json(folder / "record.json", {**record, "seconds": round(report.seconds, 1)})
    page = folder / "report.html"
    files.write_text(page, html(report, pictures, said, record))
    return page


def draw(report: Report) -> dict[str, Any]:
    """One figure for each panel."""

    def panel(n: int, height: float = 3.9) -> tuple[Any, Any]:
        return figures.row(n, (4.0 if n > 2 else 4.6) * n, height)

    shift, (ax,) = panel(1)
    report.tokens.plot(ax)
    probe, (ax,) = panel(1, 4.4)
    _draw_sweeps(report, ax)
    apart, axes = panel(3, 4.2)
    report.separation.plot(axes[0])
    report.separation.plot_cosine(axes[1])
    report.separation.plot_change(axes[2])
    where, axes = panel(2)
    report.maps.plot(axes[0])
    report.maps.plot_umap(axes[1])
    rates, (ax,) = panel(1)
    report.refusals.plot(ax)
    moved, axes = panel(2, 4.2)
    _draw_steering(report, axes)
    drawn = {
        "a-refusals": rates,
        "b-token-shift": shift,
        "c-probes": probe,
        "d-separation": apart,
        "e-maps": where,
        "f-steering": moved,
    }
    if report.drift is not None:
        ledger, changes = report.drift
        weights, axes = panel(2, 4.2)
        changes.plot(axes[0])
        changes.plot_cosine(axes[1])
        drifted, axes = panel(2, 2.4 + 0.5 * len(ledger.labels))
        ledger.plot(axes[0])
        ledger.plot_layers(axes[1])
        drawn |= {"g-weights": weights, "h-drift": drifted}
    return drawn


def _draw_sweeps(report: Report, ax: Any) -> None:
    with figures.theme():
        for i, (label, sweep) in enumerate(report.sweeps):
            look = figures.style(i)
            x = sweep.layers.numpy()
            low, high = sweep.low.numpy(), sweep.high.numpy()
            ax.fill_between(x, low, high, alpha=0.12, lw=0, color=look["color"])
            ax.plot(x, sweep.auroc.numpy(), label=label, markevery=2, **look)
        null = [sweep.null_95.numpy() for _, sweep in report.sweeps]
        ax.plot(
            report.sweeps[0][1].layers.numpy(),
            [max(values) for values in zip(*null, strict=True)],
            ls=":",
            color=figures.PALETTE[6],
            label="shuffled labels, 95 % (largest)",
        )
        ax.axhline(0.5, lw=0.8, color=figures.PALETTE[7])
        first = report.sweeps[0][1]
        ax.set(
            xlabel="layer (0 is the first block)",
            ylabel="AUROC on test topics",
            ylim=(min(0.4, *(float(sweep.low.min()) for _, sweep in report.sweeps)) - 0.01, 1.02),
            title=broken(
                f"Reading {report.classes[0]} against {report.classes[1]}, {first.n_groups} topics"
            ),
        )
        legend_below(ax, "checkpoint, 95 % interval")


def _draw_steering(report: Report, axes: Any) -> None:
    steering = report.steering
    steering.plot(axes[0], "strength")
    steering.plot(axes[1], "pareto")
    titles = (f"Added at {steering.sites[0]}", "Effect against cost")
    for ax, title in zip(axes, titles, strict=True):
        with figures.theme():
            ax.set(title=title, ylabel=broken(ax.get_ylabel(), 40))
            legend_below(ax)


def table(report: Report) -> list[dict[str, Any]]:
    """Every number of the page in one long table."""
    rows: list[dict[str, Any]] = []

    def add(panel: str, quantity: str, model: str, value: float, **more: Any) -> None:
        empty = {"group": "", "layer": "", "low": "", "high": "", "null_95": "", "n": ""}
        row = {"panel": panel, "quantity": quantity, "model": model, "value": value}
        rows.append({**row, **empty, **more})

    for group in report.classes:
        share = report.tokens.shares(group)
        n = report.tokens.groups.count(group)
        for k, kind in enumerate(KINDS):
            add(
                "b", f"share of {kind} tokens", report.tokens.aligned, float(share.value[k]),
                group=group, low=float(share.low[k]), high=float(share.high[k]), n=n,
            )  # fmt: skip
    for label, sweep in report.sweeps:
        for i, layer in enumerate(sweep.layers.tolist()):
            add(
                "c", "probe AUROC", label, float(sweep.auroc[i]), layer=layer,
                low=float(sweep.low[i]), high=float(sweep.high[i]),
                null_95=float(sweep.null_95[i]), n=sweep.n_test,
            )  # fmt: skip
    apart = report.separation
    n = report.size.test
    for m, model in enumerate(apart.models):
        for layer in range(apart.distance.shape[1]):
            add(
                "d", "separation d'", model, float(apart.distance[m, layer]), layer=layer,
                low=float(apart.distance_low[m, layer]), high=float(apart.distance_high[m, layer]),
                null_95=float(apart.shuffled[m, layer]), n=n,
            )  # fmt: skip
            add(
                "d", f"cosine with {apart.reference}", model, float(apart.cosine[m, layer]),
                layer=layer, low=float(apart.cosine_low[m, layer]),
                high=float(apart.cosine_high[m, layer]), n=report.size.train,
            )  # fmt: skip
            add("d", "relative change", model, float(apart.change[m, layer]), layer=layer, n=2 * n)
    for row in report.refusals.frame().to_dict("records"):
        add(
            "a", "refusal rate", row["model"], row["rate"], group=row["group"],
            low=row["low"], high=row["high"], n=row["asked"],
        )  # fmt: skip
    for row in report.steering.frame().to_dict("records"):
        null = row["null_95"]
        add(
            "f", f"change of {row['measure']} at strength {row['strength']:g}",
            report.tokens.aligned, row["change"], layer=int(row["site"].partition(".")[0]),
            low=row["low"], high=row["high"], null_95="" if null != null else null, n=row["n"],
        )  # fmt: skip
    if report.drift is not None:
        ledger, changes = report.drift
        for row in changes.by_layer().to_dict("records"):
            for quantity in ("relative change", "cosine"):
                add(
                    "g", f"{quantity} of the weights", row["checkpoint"], row[quantity],
                    layer=row["layer"], null_95=row["null_95"] if quantity == "cosine" else "",
                )  # fmt: skip
        for row in ledger.frame().to_dict("records"):
            add(
                "h", f"drift: {row['term']}", row["checkpoint"], row["value"],
                low=row["low"], high=row["high"], null_95=1.0, n=ledger.topics,
            )  # fmt: skip
    return rows


def html(report: Report, pictures: dict[str, Any], said: list[str], record: dict) -> str:
    """The page: every prompt and answer escaped, every figure inline, nothing loaded."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "report.html").read_text(encoding="utf-8"))
    images = {
        name: "data:image/svg+xml;base64," + base64.b64encode(figures.svg(f).encode()).decode()
        for name, f in pictures.items()
    }
    shift = report.tokens
    return template.render(
        report=report,
        context=contexts.sentence(shift.base_context, shift.base, shift.aligned),
        images=images,
        summary=said,
        answers=_answers(report),
        openings=_openings(report),
        record=json.dumps(record, indent=1, sort_keys=True, default=str),
        kinds=KINDS,
        terms=TERMS,
        commands=reproducing.commands(report),
    )


def _answers(report: Report) -> list[dict[str, Any]]:
    """Prompts with their answer's tokens, each with kind, rank and probabilities."""
    shift = report.tokens
    shown: dict[str, int] = {}
    answers, start = [], 0
    kinds = shift.kinds.tolist()
    for prompt, group, tokens in zip(shift.prompts, shift.groups, shift.tokens, strict=True):
        spans = [
            {
                "text": token,
                "kind": KINDS[kinds[i]],
                "rank": int(shift.ranks[i]),
                "p_base": float(shift.p_base[i]),
                "p_aligned": float(shift.p_aligned[i]),
            }
            for i, token in enumerate(tokens, start)
        ]
        start += len(tokens)
        shown[group] = shown.get(group, 0) + 1
        if shown[group] <= TOKEN_PROMPTS:
            answers.append({"prompt": prompt, "group": group, "tokens": spans})
    return answers


def _openings(report: Report) -> list[dict[str, Any]]:
    rates = report.refusals
    return [
        {"model": model, "answers": rates.answers[m][:4]} for m, model in enumerate(rates.models)
    ]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
