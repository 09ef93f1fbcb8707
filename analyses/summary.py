"""A report in a few sentences, generated from its numbers and saying them."""

from analyses.drift.ledger import DriftLedger
from analyses.report import Report
from probes.scores import Interval


def sentences(report: Report) -> list[str]:
    """Five to seven sentences; nothing is claimed whose interval does not exclude its null."""
    said = [_refusals(report), _shift(report), _probe(report), _where(report)]
    if len(report.refusals.models) > 2:
        said.append(_drift(report))
    said.append(steering_sentence(report))
    if report.drift is not None and "drifted" in report.drift[0].roles:
        said.append(_ledger(report.drift[0]))
    return said


def _rate(interval: Interval) -> str:
    return f"{interval.value:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def _refusals(report: Report) -> str:
    rates, (positive, negative) = report.refusals, report.classes
    base, aligned = rates.models[:2]
    n = rates.asked[rates.groups.index(positive)]
    return (
        f"{aligned} refuses {_rate(rates.rate(aligned, positive))} of {n} {positive} prompts and "
        f"{_rate(rates.rate(aligned, negative))} of their {negative} twins; {base} refuses "
        f"{_rate(rates.rate(base, positive))} and {_rate(rates.rate(base, negative))}."
    )


def _shift(report: Report) -> str:
    shift, (positive, negative) = report.tokens, report.classes
    a, b = shift.shares(positive), shift.shares(negative)
    if a.low[2] > b.high[2]:
        verdict = f"so the shift is concentrated on {positive} prompts"
    elif b.low[2] > a.high[2]:
        verdict = f"so the shift is concentrated on {negative} prompts"
    else:
        verdict = "and the intervals overlap, so no difference between the two is claimed"
    return (
        f"Of the tokens {shift.aligned} answers with, {shift.reader} ranks below third place "
        f"{a.value[2]:.0%} [{a.low[2]:.0%}, {a.high[2]:.0%}] on {positive} and "
        f"{b.value[2]:.0%} [{b.low[2]:.0%}, {b.high[2]:.0%}] on {negative} prompts, {verdict}."
    )


def _probe(report: Report) -> str:
    (base, first), (aligned, second) = report.sweeps[:2]
    i, j = first.best_index, second.best_index
    text = (
        f"A linear probe reads the class in {aligned} at layer {int(second.layers[j])} (chosen on "
        f"validation) with AUROC {second.auroc[j]:.3f} [{second.low[j]:.3f}, "
        f"{second.high[j]:.3f}] and in {base} at layer {int(first.layers[i])} with "
        f"{first.auroc[i]:.3f} [{first.low[i]:.3f}, {first.high[i]:.3f}]"
    )
    if first.best_claimed and second.best_claimed:
        return text + (
            f", both above their shuffled-label null: {base} already tells the classes apart, so a "
            "probe alone cannot show alignment."
        )
    weak = [label for label, s in report.sweeps[:2] if not s.best_claimed]
    return text + f"; in {' and '.join(weak)} this does not exceed the shuffled-label null."


def _where(report: Report) -> str:
    apart = report.separation
    aligned = apart.models[1]
    m = 1
    first = apart.first_changed(aligned)
    if first is None:
        return f"No activation of {aligned} differs from {apart.reference} in any layer."
    last = apart.change.shape[1] - 1
    before = (
        f"Through layer {first - 1} the activations of {aligned} equal those of "
        f"{apart.reference} bit for bit; "
        if first > 0
        else "Activations differ from the first layer on; "
    )
    low, high = apart.cosine_low[m, last], apart.cosine_high[m, last]
    return (
        before + f"by layer {last} they have moved by {apart.change[m, last]:.0%} and the class "
        f"direction has cosine {apart.cosine[m, last]:.2f} [{low:.2f}, {high:.2f}] with "
        f"{apart.reference}'s."
    )


def _drift(report: Report) -> str:
    rates, positive = report.refusals, report.classes[0]
    aligned = rates.rate(rates.models[1], positive)
    said = []
    for model in rates.models[2:]:
        rate = rates.rate(model, positive)
        if rate.high < aligned.low:
            verdict = "fewer"
        elif rate.low > aligned.high:
            verdict = "more"
        else:
            verdict = "not clearly different"
        said.append(f"{model} refuses {_rate(rate)} ({verdict})")
    return f"Against {rates.models[1]}, {', and '.join(said)} of the {positive} prompts."


def _ledger(ledger: DriftLedger) -> str:
    said = []
    for label, role in zip(ledger.labels, ledger.roles, strict=True):
        if role != "drifted":
            continue
        head, claimed = ledger.headline(label), ledger.claimed(label)
        beyond = f"beyond the null: {', '.join(claimed)}" if claimed else "no term beyond its null"
        said.append(f"{label} {head.value:.1f} [{head.low:.1f}, {head.high:.1f}] ({beyond})")
    inside = [
        label
        for label, role in zip(ledger.labels, ledger.roles, strict=True)
        if role == "control" and not ledger.claimed(label)
    ]
    controls = f"; no term of the controls {' and '.join(inside)} is" if inside else ""
    return (
        f"Drift from {ledger.reference}, in nulls (0 none, 1 as large as each null's 95th "
        f"percentile): {'; '.join(said)}{controls}."
    )


def steering_sentence(report: Report) -> str:
    """What the class direction does, and whether that is beyond random directions."""
    steering, negative = report.steering, report.classes[1]
    row = len(steering.cells) - 1
    change, low, high = (float(x[row, 0]) for x in (steering.change, steering.low, steering.high))
    bottom, top = (float(x[row, 0]) for x in steering.band)
    verdict = (
        "so the direction acts, and is not only read"
        if steering.claimed[row, 0] and change > 0
        else "so nothing is claimed of what the direction does"
    )
    return (
        f"Added to {negative} prompts of {report.tokens.aligned} at {steering.sites[0]}, the class "
        f"direction changes the log-odds of a refusal by {change:.1f} nats [{low:.1f}, {high:.1f}] "
        f"at a KL of {float(steering.value[row, 1]):.2f} nats on benign answers; random directions "
        f"change them by {bottom:.1f} to {top:.1f}, {verdict}."
    )
