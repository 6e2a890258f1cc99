"""The two-stream encoder against a loop over images written from method.md, section 1, in float64."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samtrain.core.batch import ImageGroups, PackedBatch
from samtrain.core.errors import BatchError
from samtrain.model import SamMllmForConditionalGeneration
from samtrain.model.guidance import extract_visual_tokens

RAGGED = [2, 1, 3, 5]
BACKENDS = ["materialised", "reference"]  # Triton's interpreter has no float64; see test_kernel_backends.py


def reference(
    model: SamMllmForConditionalGeneration,
    features: Tensor,
    batch: PackedBatch,
    *,
    context_features: Tensor | None = None,
) -> Tensor:
    """One image at a time, one layer at a time; softmax over a stacked list of images."""
    config, guidance, qformer = model.config, model.guidance, model.qformer
    score = guidance.patch_score
    outputs = []
    borders = batch.cu_images.tolist()
    for s, (first, last) in enumerate(pairwise(borders)):
        group = features[first:last]
        context_group = group if context_features is None else context_features[first:last]
        read = [
            context_group[j] + (guidance.order_embedding.weight[j] if config.order_embedding else 0.0)
            for j in range(len(group))
        ]
        text = batch.qformer_input_ids[s : s + 1][
            :, batch.qformer_attention_mask[s].bool()
        ]  # padding cut off, not masked
        x0 = qformer.embeddings(input_ids=text, query_embeds=model.query_tokens)
        for i in range(len(group)):
            everyone = set(range(len(group)))
            context_set = sorted({"others": everyone - {i}, "all": everyone, "own": {i}}[config.guidance_context])
            own = group[i][None]
            if context_set:
                scores = torch.stack([(read[j] @ score.weight[0] + score.bias) for j in context_set])  # [n, P]
                a = torch.softmax(scores, 0)
                c = sum(a[n][:, None] * read[j] for n, j in enumerate(context_set))[None]
            q = w = x0
            for t, layer in enumerate(qformer.encoder.layer, start=1):
                if context_set and t <= config.contextual_layer:
                    if t == config.initial_layer:
                        w = w + guidance.initial_projection(q)
                    w_next = layer(w, None, c, query_length=config.num_query_tokens)
                    if t == config.contextual_layer:
                        q = q + guidance.context_projection(w_next)
                    w = w_next
                q = layer(q, None, own, query_length=config.num_query_tokens)
            outputs.append(q[0, : config.num_query_tokens])
    return torch.stack(outputs)


def encode(
    model: SamMllmForConditionalGeneration,
    features: Tensor,
    batch: PackedBatch,
    backend: Any = "reference",
    **context: Any,
) -> Tensor:
    return extract_visual_tokens(
        model.qformer,
        model.guidance,
        config=model.config,
        query_tokens=model.query_tokens,
        features=features,
        groups=batch.image_groups,
        input_ids=batch.qformer_input_ids,
        attention_mask=batch.qformer_attention_mask,
        backend=backend,
        **context,
    )


def outputs_and_gradients(
    function: Callable[..., Tensor], model: SamMllmForConditionalGeneration, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(batch.num_images, 5, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    out = function(model, features, batch)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out * direction).sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return out.detach(), gradients | {"features": features.grad}


LAYERS = [(first, last) for first in range(1, 5) for last in range(first, 5)]


@pytest.mark.parametrize("context", ["others", "all", "own"])
@pytest.mark.parametrize(("initial", "contextual"), LAYERS)
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_every_gradient_equal_the_loop_over_images(
    tiny_model: Any, make_batch: Any, backend: str, context: str, initial: int, contextual: int, order: bool
) -> None:
    model = tiny_model(
        dtype=torch.float64, random_guidance=True, guidance_context=context, initial_layer=initial,
        contextual_layer=contextual, order_embedding=order,
    )  # fmt: skip
    batch = make_batch(RAGGED)
    expected, expected_gradients = outputs_and_gradients(reference, model, batch)
    got, gradients = outputs_and_gradients(partial(encode, backend=backend), model, batch)
    assert (got - expected).abs().max() < 1e-9
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() < 1e-9, name
    scored = gradients["guidance.patch_score.weight"].abs().max()
    assert scored == 0.0 if context == "own" else scored > 1e-6  # the softmax over one image is a constant
    assert gradients["guidance.initial_projection.weight"].abs().max() > 1e-6
    if order:
        assert gradients["guidance.order_embedding.weight"].abs().max() > 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context", ["others", "all", "own"])
def test_a_frozen_qformer_gives_the_same_guidance_gradients(
    tiny_model: Any, make_batch: Any, context: str, backend: str
) -> None:
    model = tiny_model(
        dtype=torch.float64, random_guidance=True, guidance_context=context, initial_layer=2, order_embedding=True
    )
    batch = make_batch(RAGGED)
    features = torch.randn(batch.num_images, 5, 12, dtype=torch.float64)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        encode(model, features, batch, backend).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.guidance.named_parameters()}

    trained = gradients()
    for parameter in [*model.qformer.parameters(), model.query_tokens]:
        parameter.requires_grad_(False)
    frozen = gradients()
    for name, gradient in trained.items():
        assert (frozen[name] - gradient).abs().max() < 1e-9, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_qformer_records_nothing_of_the_q_stream_before_layer_k(
    tiny_model: Any, make_batch: Any, backend: str
) -> None:
    model = tiny_model(random_guidance=True)
    for parameter in [*model.qformer.parameters(), model.query_tokens]:
        parameter.requires_grad_(False)
    batch = make_batch([2, 2])
    records: list[tuple[int, int, bool]] = []
    for t, layer in enumerate(model.qformer.encoder.layer, start=1):
        end = layer.output_query  # called once wherever the layer runs, also where the layer itself is not called
        end.register_forward_hook(lambda m, a, out, t=t: records.append((t, out.shape[0], out.requires_grad)))
    encode(model, torch.randn(4, 5, 12), batch, backend)
    # k = 3: W then Q at every layer up to k, Q alone after it.
    assert records == [
        (1, 4, True),
        (1, 4, False),
        (2, 4, True),
        (2, 4, False),
        (3, 4, True),
        (3, 4, True),
        (4, 4, True),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_share_one_call_per_layer_and_all_runs_the_w_stream_once_per_sample(
    tiny_model: Any, make_batch: Any, backend: str
) -> None:
    model = tiny_model(guidance_context="all", initial_layer=3, contextual_layer=4)
    rows: list[int] = []
    for layer in model.qformer.encoder.layer:
        layer.output_query.register_forward_hook(lambda m, a, out: rows.append(out.shape[0]))
    encode(model, torch.randn(5, 5, 12), make_batch([2, 3]), backend)
    assert rows == [5 + 2, 5 + 2, 5 + 5, 5, 5]


@pytest.mark.parametrize("trains", [True, False])
def test_kernels_project_the_images_once_per_layer_for_both_streams(
    tiny_model: Any, make_batch: Any, trains: bool
) -> None:
    """Also where the streams run one after the other: at layer k, and before it where the Q-Former is frozen."""
    model = tiny_model(initial_layer=1, contextual_layer=3, order_embedding=True)
    for parameter in [*model.qformer.parameters(), model.query_tokens]:
        parameter.requires_grad_(trains)
    shapes: list[tuple[int, tuple[int, ...]]] = []
    for t in (1, 3):
        key = model.qformer.encoder.layer[t - 1].crossattention.attention.key
        key.register_forward_hook(lambda m, a, out, t=t: shapes.append((t, tuple(a[0].shape))))
    encode(model, torch.randn(5, 7, 12), make_batch([2, 3]), "reference")
    assert shapes == [(t, shape) for t in (1, 3) for shape in ((5, 7, 12), (5 + 1, 12))]  # images, then places


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_image_with_others_is_not_guided_but_with_all_or_its_own_it_is(
    tiny_model: Any, make_batch: Any, backend: str
) -> None:
    batch = make_batch([1])
    features = torch.randn(1, 5, 12, dtype=torch.float64)
    for context, is_guided in (("others", False), ("all", True), ("own", True)):
        model = tiny_model(dtype=torch.float64, random_guidance=True, guidance_context=context)
        guided = encode(model, features, batch, backend)
        model.guidance = None
        difference = (guided - encode(model, features, batch, backend)).abs().max()
        assert difference > 1e-3 if is_guided else difference < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_context_of_a_sample_never_reaches_another(tiny_model: Any, make_batch: Any, backend: str) -> None:
    model = tiny_model(dtype=torch.float64, random_guidance=True)
    batch = make_batch([2, 3])
    features = torch.randn(5, 5, 12, dtype=torch.float64)
    before = encode(model, features, batch, backend)
    changed = features.clone()
    changed[2:] += 1.0
    after = encode(model, changed, batch, backend)
    assert (before[:2] - after[:2]).abs().max() < 1e-12
    assert (before[2:] - after[2:]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("context", "crosses"), [("others", True), ("all", True), ("own", False)])
def test_with_its_own_context_nothing_passes_between_the_images_of_a_sample(
    tiny_model: Any, make_batch: Any, context: str, crosses: bool, backend: str
) -> None:
    model = tiny_model(
        dtype=torch.float64, random_guidance=True, guidance_context=context, initial_layer=2, order_embedding=True
    )
    batch = make_batch([3, 2])
    features = torch.randn(5, 5, 12, dtype=torch.float64)
    before = encode(model, features, batch, backend)
    for changed in range(3):
        other = features.clone()
        other[changed] += 1.0
        moved = (encode(model, other, batch, backend) - before).flatten(1).abs().amax(1)
        assert moved[changed] > 1e-3
        rest = [i for i in range(3) if i != changed]
        assert (moved[rest] > 1e-3).all() if crosses else (moved[rest] < 1e-12).all()


def test_more_images_than_the_order_embedding_has_rows_is_an_error(tiny_model: Any, make_batch: Any) -> None:
    model = tiny_model(order_embedding=True, max_images=2)
    with pytest.raises(BatchError, match=r"3 images, the order embedding 2 rows.*max_images"):
        encode(model, torch.randn(3, 5, 12), make_batch([3]))


def test_the_papers_shape_has_1182593_guidance_parameters(tiny_config: Any) -> None:
    from samtrain.model.guidance import Guidance

    config = tiny_config()
    config.qformer_config.hidden_size, config.qformer_config.encoder_hidden_size = 768, 1408
    guidance: nn.Module = Guidance(config)
    assert sum(p.numel() for p in guidance.parameters()) == 1_182_593


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context", ["others", "all", "own"])
def test_groups_without_images_are_allowed_beside_others(
    tiny_model: Any, make_batch: Any, context: str, backend: str
) -> None:
    model = tiny_model(dtype=torch.float64, random_guidance=True, guidance_context=context)
    with_empty, without = make_batch([0, 2, 0]), make_batch([2])
    features = torch.randn(2, 5, 12, dtype=torch.float64)
    text = {"input_ids": with_empty.qformer_input_ids[1:2], "attention_mask": with_empty.qformer_attention_mask[1:2]}
    got = encode(model, features, with_empty, backend)
    expected = extract_visual_tokens(
        model.qformer, model.guidance, config=model.config, query_tokens=model.query_tokens, features=features,
        groups=ImageGroups.from_counts([2]), backend=backend, **text,
    )  # fmt: skip
    assert without.num_images == 2 and (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context", ["others", "all", "own"])
def test_what_is_read_as_context_can_be_replaced_image_by_image(
    tiny_model: Any, make_batch: Any, context: str, backend: str
) -> None:
    model = tiny_model(
        dtype=torch.float64, random_guidance=True, guidance_context=context, initial_layer=2, order_embedding=True
    )
    batch = make_batch(RAGGED)
    features, others = torch.randn(2, batch.num_images, 5, 12, dtype=torch.float64)
    got = encode(model, features, batch, backend, context_features=others)
    assert (got - reference(model, features, batch, context_features=others)).abs().max() < 1e-9
    moved = (got - encode(model, features, batch, backend)).flatten(1).abs().amax(1)
    alone = torch.tensor([count == 1 for count in RAGGED])[batch.image_groups.group_of_image]
    keeps = alone if context == "others" else torch.zeros_like(alone)  # an image alone has no context to replace
    assert (moved[~keeps] > 1e-3).all() and (moved[keeps] == 0.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context", ["others", "all", "own"])
def test_without_its_context_a_model_is_one_whose_b_is_zero(
    tiny_model: Any, make_batch: Any, context: str, backend: str
) -> None:
    model = tiny_model(random_guidance=True, guidance_context=context, initial_layer=2, order_embedding=True)
    batch = make_batch(RAGGED)
    features, others = torch.randn(2, batch.num_images, 5, 12)
    left_out = encode(model, features, batch, backend, use_context=False)
    assert (left_out - encode(model, features, batch, backend)).abs().max() > 1e-3
    with torch.no_grad():
        for parameter in model.guidance.context_projection.parameters():
            parameter.zero_()
    # To the last bit: the same computation, whatever is read as context.
    assert torch.equal(left_out, encode(model, features, batch, backend))
    assert torch.equal(left_out, encode(model, features, batch, backend, context_features=others))
