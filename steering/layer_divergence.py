"""How far two sets of states lie apart in what the model's head makes of them, layer by layer."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from probes.activations import Activations
from probes.unembed import head_of as head_of

Decode = Callable[[Tensor], Tensor]
"""`[row, d_model] -> [row, vocab]`: logits that a state would give if it left the last block."""


def js_divergence(
    p_logits: Float[Tensor, "*batch vocab"], q_logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence in nats, float64: `KL(p‖m)/2 + KL(q‖m)/2`, m half-way.

    Symmetric, 0 for equal distributions, at most ln 2.
    """
    p = p_logits.double().log_softmax(-1)
    q = q_logits.double().log_softmax(-1)
    zero = torch.zeros((), dtype=torch.float64, device=p.device)
    # log(p / m) = ln 2 - log(1 + q / p), which is 0 to the last bit where they are equal
    ratios = [math.log(2) - torch.logaddexp(zero, d) for d in (q - p, p - q)]
    halves = [(x.exp() * r.nan_to_num(0.0)).sum(-1) for x, r in zip((p, q), ratios, strict=True)]
    return ((halves[0] + halves[1]) / 2).clamp(0.0, math.log(2))


def released_score(
    clean: Float[Tensor, "*batch d_model"], adversarial: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch"]:
    """What the released code calls the divergence (`steering.layer_search`); none, only compared."""
    P, Q = clean.double().softmax(-1), adversarial.double().softmax(-1)
    M = (P + Q) / 2
    terms = [torch.xlogy(M, M) - M * x for x in (P, Q)]
    return (terms[0].mean(-1) + terms[1].mean(-1)) / 2


def by_layer(
    clean: Activations,
    adversarial: Activations,
    decode: Decode,
    decode_adversarial: Decode | None = None,
) -> Float[Tensor, "layer prompt"]:
    """Jensen-Shannon divergence of the decoded distributions, for each site and prompt.

    A second head decodes the adversarial states where these come from another model.
    """
    other = decode_adversarial or decode
    _check_pair(clean, adversarial)
    return torch.stack(
        [js_divergence(decode(clean[site]), other(adversarial[site])) for site in clean.sites]
    )


def displacement(clean: Activations, adversarial: Activations) -> Float[Tensor, "layer d_model"]:
    """`v = mean(h_adversarial - h_clean)` over prompts at each site."""
    _check_pair(clean, adversarial)
    sites = clean.sites
    return torch.stack([(adversarial[s].double() - clean[s].double()).mean(0) for s in sites])


def _check_pair(clean: Activations, adversarial: Activations) -> None:
    if clean.sites != adversarial.sites or len(clean) != len(adversarial):
        raise ValueError(
            f"{clean} and {adversarial} are no pair: capture the same prompts at the same sites, "
            "once with each continuation"
        )
