"""A training step in the style of SAM's public (inference) code, which stands on LAVIS.

What is kept of that style: images one after another through the vision tower and through both streams of the Q-Former;
both streams for every image, whatever they share; the contextual feature built and projected; the Q-Former in float32
under autocast with its dropout on although it is frozen; instructions and answers padded apart; attention masks and
logits of all positions; eager attention (`attention="sdpa"` makes a second row of it). What is not kept is what would
hinder a comparison: the setting (l, k, context) is the table's, and precision is bfloat16 without a loss scaler.

Legend: S samples, N images of each, P patches, C width of the features, D of the Q-Former, Q query tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train.models import build_instructblip
from samtrain.core.batch import IGNORE_INDEX
from samtrain.model.freezing import apply_freezing


class ReferenceModel(nn.Module):
    """forward(batch) -> summed loss; parameters of Q-Former, guidance and projection in float32."""

    def __init__(self, setting: Any, *, like: nn.Module, attention: str) -> None:
        super().__init__()
        from benchmarks.train.shapes import trains

        whole = build_instructblip(
            setting.shape, train=setting.train, dtype=setting.dtype, device=setting.place, attention=attention,
            like=like,
        )  # fmt: skip
        self.shape, self.precision = setting.shape, setting.dtype
        self.vision_model, self.language_model = whole.vision_model, whole.language_model
        self.qformer, self.language_projection = _wide(whole.qformer), _wide(whole.language_projection)
        self.query_tokens = nn.Parameter(whole.query_tokens.detach().float())
        source: Any = like
        self.guidance = nn.ModuleDict(
            {
                name: _wide_linear(getattr(source.guidance, name))
                for name in ("patch_score", "initial_projection", "context_projection")
            }
        )
        if setting.checkpointing:
            self.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        apply_freezing(self, trains(setting.train, guided=True))
        self.train()

    def train(self, mode: bool = True) -> "ReferenceModel":
        """Everything in train mode but the vision tower, as in the release: a frozen Q-Former keeps its dropout."""
        super().train(mode)
        self.vision_model.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> Tensor:
        device = batch["input_ids"].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16):
            visual = self._visual_tokens(batch)  # [S, N * Q, E]
            embeddings = self.language_model.get_input_embeddings()(batch["input_ids"][:, visual.shape[1] :])
            logits = self.language_model(
                inputs_embeds=torch.cat([visual.to(embeddings.dtype), embeddings], dim=1),
                attention_mask=batch["attention_mask"],
                use_cache=False,
            ).logits
        following = batch["labels"][:, 1:].flatten()
        return nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), following, ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def _visual_tokens(self, batch: dict[str, Any]) -> Tensor:
        pixels = batch["pixel_values"].to(self.precision)  # [S, N, 3, H, W]
        images = [pixels[:, j] for j in range(pixels.shape[1])]
        with torch.no_grad():
            features = torch.stack([self.vision_model(pixel_values=image).last_hidden_state for image in images], dim=1)
        contextual = self._contextual(features)  # one for every image
        visual = [self._one_image(batch, features[:, j], contextual[j]) for j in range(len(images))]
        return torch.cat(visual, dim=1)

    def _contextual(self, features: Tensor) -> list[Tensor]:
        """C_j [S, P, C] of every image: a softmax over the images, patch by patch."""
        scores = self.guidance["patch_score"](features)  # [S, N, P, 1]
        count = features.shape[1]
        if self.shape.context == "all":
            shared = (scores.softmax(1) * features).sum(1)
            return [shared] * count
        found = []
        for j in range(count):
            others = [i for i in range(count) if i != j] or [j]
            found.append((scores[:, others].softmax(1) * features[:, others]).sum(1))
        return found

    def _one_image(self, batch: dict[str, Any], features: Tensor, contextual: Tensor) -> Tensor:
        num_queries, count = self.query_tokens.shape[1], features.shape[0]
        q = w = self.qformer.embeddings(
            input_ids=batch["qformer_input_ids"], query_embeds=self.query_tokens.expand(count, -1, -1)
        )
        visible = nn.functional.pad(batch["qformer_attention_mask"].bool(), (num_queries, 0), value=True)
        mask = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min)[:, None, None]
        for t, layer in enumerate(self.qformer.encoder.layer, start=1):
            if t <= self.shape.contextual_layer:
                if t == self.shape.initial_layer:
                    w = w + self.guidance["initial_projection"](q)
                w = layer(w, mask, contextual, query_length=num_queries)
                if t == self.shape.contextual_layer:
                    q = q + self.guidance["context_projection"](w)
            q = layer(q, mask, features, query_length=num_queries)
        return self.language_projection(q[:, :num_queries])


def _wide(module: nn.Module) -> Any:
    """The module with float32 copies of its parameters, in place."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach().float().clone())
    return module


def _wide_linear(linear: nn.Module) -> nn.Linear:
    """A plain nn.Linear of the same values: the adjustment's own class calls our kernel."""
    weight, bias = linear.weight, linear.bias
    plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")  # type: ignore[arg-type, index]
    plain.weight = nn.Parameter(weight.detach().float().clone())  # type: ignore[operator]
    plain.bias = nn.Parameter(bias.detach().float().clone())  # type: ignore[operator]
    return plain
