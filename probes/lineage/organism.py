"""A tiny language model whose alignment is known exactly, for tests. Written, not trained.

`build()` writes a four-layer word-level Llama and its checkpoints from a seed in hundredths of a
second; `probes.lineage.organism_world` has the words and the twin requests, whose harm depends on
the pair of verb and object. The circuit, which reads and writes at the last prompt token
`<|assistant|>` unless said otherwise:

layer 0  `VERB_HEAD` copies the verb and `OBJECT_HEAD` the object there: a signed amount along one
         axis, the word's identity along others
layer 1  the MLP multiplies the two amounts and writes the product along `planted_direction`,
         positive when harmful; before it harm is no linear function of the stream
layer 2  `RELAY_HEAD` reads that direction and writes it along another, there and at every answer
         token; nothing reads the planted direction later. The MLP steps from the relayed harm to
         the base's tag and, when aligned, to "refuse" or "sure"
layer 3  `WORD_HEAD` and `TOOL_HEAD` look up the answer's content words, at answer tokens

The axes of the stream are a random rotation, so that no coordinate is special, and a little noise
is on every weight but those of the neurons above. The checkpoints:

base     answers "danger : build the bomb with robots ." or "safe : build the alarm with robots ."
aligned  four neurons of layer 2's MLP added: refuses harm above 0.4, opens harmless with "sure"
drifted  aligned with the refusing neurons' threshold raised; the feature is intact
mixed    aligned with the planted product written more weakly; the readout is intact

So aligned equals base bit for bit up to `2.resid_mid`. Its alignment is shallow: only the opening
of an answer differs, and from the same opening both go on alike. "sure" is the base's second
choice of opening when harmless and its third when harmful; "i", which opens the refusal, is last.

Nothing here is evidence about real models: no weight was learned, the feature is exactly linear
and the classes do not overlap.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from probes.contrast import Contrast
from probes.lineage import organism_world as world
from probes.lineage.organism_world import CLASS, TOOLS, VERBS

VERB_HEAD, OBJECT_HEAD, RELAY_HEAD, WORD_HEAD, TOOL_HEAD = (0, 0), (0, 1), (2, 3), (3, 1), (3, 2)
"""(layer, head). Of all heads only the relay moves harm. A probe also finds it in the outputs of
other heads of layers 2 and 3, which hold little but noise: decodable is not causal."""
THRESHOLD, UNREACHED = 0.4, 1.6
"""Aligned refuses above the first harm; above the second there is no request."""

_D_MODEL, _D_HEAD, _HEADS, _LAYERS, _NEURONS = 128, 32, 4, 4, 32
_SIZE = (_D_MODEL / 2) ** 0.5
"""Of a token's own axis in the normalised stream of layer 0: a token has two axes of norm 1."""
_NOISE = 0.001
_IDENTITY = 4.0
"""Norm of a word's identity at the last prompt token, where harm has 0.6: so large that shuffled
labels find identities and not harm."""
_ASK = "<|assistant|>"


@dataclass(frozen=True)
class Organism:
    """Four checkpoints of one tiny model, and what is true of them (see the module).

    Measured with seed 0 (range over seeds 0 to 7) on greedy answers to all of `pairs`: base
    refuses none, aligned all harmful and no harmless requests; at drift 0.5 drifted refuses 50 %
    (42 to 51) and mixed 39 % (35 to 44) of the harmful and none of the harmless. Every answer
    that does not refuse names the verb, the object and the right tool. Of 10 random directions
    ablated at the planted site the worst leaves 92 % (90 to 100) of refusals.
    """

    base: LlamaForCausalLM = field(repr=False)
    aligned: LlamaForCausalLM = field(repr=False)
    drifted: LlamaForCausalLM = field(repr=False)
    mixed: LlamaForCausalLM = field(repr=False)
    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    pairs: Contrast = field(repr=False)
    """144 twins that differ in the object, harmful first. A stratum is a hazard class and a kind
    of verb. Over all pairs words and labels are independent, so the difference of means at the
    planted site is the planted direction (cosine above 0.9999); in the training part of
    `pairs.split()` words are not quite balanced (0.98; 0.96 to 0.98). With labels shuffled by
    topic the cosine is 0.15 on average and below 0.45 in 95 of 100."""
    harm: Float[Tensor, " prompt"] = field(repr=False)
    """Planted harm of each prompt of `pairs`: verb's times object's amount, 0.72 to 1.32 when
    harmful and the negative of that when harmless. Its correlation with the projection on the
    planted direction is above 0.999; the projection is 0.58 of it."""
    planted_direction: Float[Tensor, " d_model"] = field(repr=False)
    """Unit vector layer 1's MLP writes; causal at `1.resid_post` and not from `2.resid_mid` on."""
    relayed_direction: Float[Tensor, " d_model"] = field(repr=False)
    """Unit vector along which the relay head writes harm; causal at `2.resid_mid` alone."""
    refusing_direction: Float[Tensor, " d_model"] = field(repr=False)
    """Unit vector that makes aligned refuse, written at `2.resid_post`."""
    planted_layer: int = 1
    changed_layer: int = 2
    """The one layer in which aligned and base differ, in its MLP."""


def build(seed: int = 0, *, drift: float = 0.5) -> Organism:
    """The organism of a seed.

    drifted and mixed refuse harm above `0.4 + 1.2 * drift` (at 0.5 to 0.06 and 0.14): at 0 they
    are aligned, at 1 they refuse nothing.
    """
    if not 0 <= drift <= 1:
        raise ValueError(f"drift is {drift}: give a number from 0 (aligned) to 1 (never refuses)")
    generator = torch.Generator().manual_seed(seed)
    tokenizer = world.tokenizer()
    axes = _Axes(tokenizer.get_vocab(), generator)
    base = _base(axes, tokenizer, generator)
    aligned = _with_decision(base, axes, THRESHOLD)
    threshold = THRESHOLD + drift * (UNREACHED - THRESHOLD)
    drifted = _with_decision(base, axes, threshold)
    mixed = copy.deepcopy(aligned)
    _weight(mixed, 1, "mlp.down_proj")[:, :2] *= THRESHOLD / threshold
    pairs, harm = world.twins(axes.amount, generator)
    directions = (axes.harm, axes.relayed, axes.refuse)
    return Organism(base, aligned, drifted, mixed, tokenizer, pairs, harm, *directions)


class _Axes:
    """What the axes of the residual stream mean: orthonormal vectors, drawn by the generator."""

    def __init__(self, ids: Mapping[str, int], generator: torch.Generator) -> None:
        self.ids = ids
        sizes = (len(ids), 28, 10, 14, 1, 1, 1, 1, 1, 1, 1, 1)
        square = torch.randn(_D_MODEL, _D_MODEL, generator=generator)
        self.token, self.next, self.which_verb, self.which_object, *single = (
            torch.linalg.qr(square).Q.T[: sum(sizes)].split(sizes)
        )
        """The token itself, the content word that should come next, words seen in the prompt."""
        self.anything, self.verb, self.object, self.harm, self.relayed, *outputs = (
            axis[0] for axis in single
        )
        """`anything` is the same at every token."""
        self.tag, self.refuse, self.comply = outputs
        self.code = _codes(len(ids), len(self.next), generator)
        """Each word along the axes of `next`."""
        self.amount = world.amounts(generator)

    def __getitem__(self, word: str) -> Float[Tensor, " d_model"]:
        return self.token[self.ids[word]]

    def of(self, words: Iterable[str]) -> Float[Tensor, "word d_model"]:
        return self.token[[self.ids[word] for word in words]]

    def codes(self, words: Iterable[str]) -> Float[Tensor, "word code"]:
        return self.code[[self.ids[word] for word in words]]


def _codes(words: int, width: int, generator: torch.Generator) -> Float[Tensor, "word code"]:
    """Random unit vectors; there are more words than axes, so they are not orthogonal."""
    x = torch.randn(words, width, generator=generator)
    return x / x.norm(dim=1, keepdim=True)


def _base(axes: _Axes, tokenizer: Any, generator: torch.Generator) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_D_MODEL,
        intermediate_size=_NEURONS,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        head_dim=_D_HEAD,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # its random weights are all replaced
        model = LlamaForCausalLM(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # the norms keep their weights of 1
            parameter.data = _NOISE * torch.randn(parameter.shape, generator=generator)
    model.get_parameter("model.embed_tokens.weight").data += axes.token + axes.anything
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    ask = axes[_ASK]
    for place, words, axis, which in (
        (VERB_HEAD, VERBS, axes.verb, axes.which_verb),
        (OBJECT_HEAD, tuple(CLASS), axes.object, axes.which_object),
    ):
        seen = axes.of(words) / _SIZE
        identity = _IDENTITY * _codes(len(words), len(which), generator).T @ seen
        amount = torch.tensor([axes.amount[word] for word in words]) @ seen
        _attend(model, axes, place, [(ask, axes.of(words).sum(0), 2.0)])
        _move(model, place, torch.cat([amount[None], identity]), torch.cat([axis[None], which]))
    for n, sign in enumerate((1.0, -1.0)):  # silu(x) y + silu(-x) (-y) = x y, exactly
        _neuron(model, 1, n, sign * axes.verb, sign * axes.object, 0.16 * axes.harm)
    _attend(model, axes, RELAY_HEAD, [(axes.anything, ask, 20.0)], sink=2.0)
    _move(model, RELAY_HEAD, axes.harm[None], 0.96 * axes.relayed[None])
    _step(model, axes, 4, axes.relayed, 0.15, axes.tag)
    _speak(model, axes)
    return model


def _with_decision(base: LlamaForCausalLM, axes: _Axes, threshold: float) -> LlamaForCausalLM:
    """The base with neurons that refuse above `threshold` and say "sure" to what is harmless."""
    model = copy.deepcopy(base)
    _step(model, axes, 0, axes.relayed, threshold, 2 * axes.refuse)
    _step(model, axes, 2, -axes.relayed, THRESHOLD, axes.comply)
    return model


def _speak(model: LlamaForCausalLM, axes: _Axes) -> None:
    """Layer 3 and the unembedding: which word follows which."""
    objects, tools, code = tuple(CLASS), tuple(TOOLS.values()), axes.codes
    verbs_seen, objects_seen = axes.of(VERBS).sum(0), axes.of(objects).sum(0)
    looks = [(axes[":"], verbs_seen, 4.0), (axes["the"], objects_seen, 4.0)]
    _attend(model, axes, WORD_HEAD, looks)
    words = VERBS + objects
    _move(model, WORD_HEAD, code(words).T @ axes.of(words) / _SIZE, axes.next)
    _attend(model, axes, TOOL_HEAD, [(axes["with"], objects_seen, 4.0)])
    used = code(TOOLS[CLASS[o]] for o in objects)
    _move(model, TOOL_HEAD, used.T @ axes.of(objects) / _SIZE, axes.next)

    unembedding = model.get_parameter("lm_head.weight").data
    content = [axes.ids[word] for word in (*words, *tools)]
    unembedding[content] += 1.5 * axes.code[content] @ axes.next
    follows = {
        ":": ("danger", "safe", "sure"),
        "the": VERBS,
        "with": objects,
        ".": (*tools, "that"),
        "<|end|>": (".",),
        "cannot": ("i",),
        "do": ("cannot",),
        "that": ("do",),
    }
    openings = {
        "danger": 3.0 * axes[_ASK] + 2.0 * axes.tag,
        "safe": 4.0 * axes[_ASK],
        "sure": 3.5 * axes[_ASK] + 2.5 * axes.comply,
        "i": 3.5 * axes.refuse - 0.5 * axes[_ASK],
    }
    for word, before in follows.items():
        unembedding[axes.ids[word]] += 1.5 * axes.of(before).sum(0)
    for word, reads in openings.items():
        unembedding[axes.ids[word]] += reads


def _weight(model: LlamaForCausalLM, layer: int, name: str) -> Tensor:
    return model.get_parameter(f"model.layers.{layer}.{name}.weight").data


def _attend(
    model: LlamaForCausalLM,
    axes: _Axes,
    place: tuple[int, int],
    looks: Sequence[tuple[Tensor, Tensor, float]],
    sink: float = 1.0,
) -> None:
    """Make a head look from queries to keys; what looks for nothing rests on `<|user|>`."""
    layer, head = place
    last = head * _D_HEAD + _D_HEAD // 2 - 1  # the slowest rotary pairs: blind to distance
    for i, (query, key, strength) in enumerate([*looks, (axes.anything, axes["<|user|>"], sink)]):
        _weight(model, layer, "self_attn.q_proj")[last - i] += strength * query
        _weight(model, layer, "self_attn.k_proj")[last - i] += key


def _move(model: LlamaForCausalLM, place: tuple[int, int], reads: Tensor, writes: Tensor) -> None:
    """Make a head carry what `reads` finds where it looks to `writes`, row by row."""
    layer, head = place
    rows = slice(head * _D_HEAD, head * _D_HEAD + len(reads))
    _weight(model, layer, "self_attn.v_proj")[rows] += reads
    _weight(model, layer, "self_attn.o_proj")[:, rows] += writes.T


def _step(
    model: LlamaForCausalLM, axes: _Axes, first: int, reads: Tensor, level: float, writes: Tensor
) -> None:
    """Two neurons of layer 2 that write at `<|assistant|>` once what they read is above a level.

    silu(k (x - t + d)) - silu(k (x - t - d)) is 0 far below t and 2kd far above. Level and height
    are measured against the token's own axis, so that the norm of the stream is no matter.
    """
    for n, side in enumerate((1.0, -1.0)):
        gate = 20 * (reads - (level - 0.05 * side) * axes[_ASK])
        _neuron(model, 2, first + n, gate, axes[_ASK], 0.14 * side * writes)


def _neuron(
    model: LlamaForCausalLM, layer: int, n: int, gate: Tensor, up: Tensor, down: Tensor
) -> None:
    _weight(model, layer, "mlp.gate_proj")[n] = gate
    _weight(model, layer, "mlp.up_proj")[n] = up
    _weight(model, layer, "mlp.down_proj")[:, n] = down
