"""A Segment-Anything model of transformers, asked for the thing in the middle of the picture.

Any model of the class works (sam, sam_hq, sam2, edgetam, ...): it gets a few points around the centre as a prompt,
proposes masks, and the one it trusts most that is neither a speck nor the whole picture is taken.
"""

import numpy as np
from PIL import Image

from samtrain.data.mmlink.optional import choose_device, pretrained
from samtrain.data.mmlink.options import SamOptions

_POINTS = ((0.5, 0.5), (0.42, 0.42), (0.58, 0.42), (0.42, 0.58), (0.58, 0.58))  # parts of width and height


class SamSegmenter:
    """Raises ConfigError where the model cannot be loaded."""

    def __init__(self, options: SamOptions) -> None:
        import torch
        from transformers import AutoModelForMaskGeneration, AutoProcessor

        self.options = options
        self.device = choose_device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.processor = pretrained(AutoProcessor, options.model, where="segment.model", revision=options.revision)
        model = pretrained(
            AutoModelForMaskGeneration,
            options.model,
            where="segment.model",
            revision=options.revision,
            dtype=self.dtype,
        )
        self.model = model.to(self.device).eval()

    def __call__(self, image: Image.Image) -> np.ndarray:
        import torch

        image = image.convert("RGB")
        points = [[x * image.width, y * image.height] for x, y in _POINTS]
        # [pictures, prompts, points, 2], as every model of the class takes them
        inputs = self.processor(
            images=image, input_points=[[points]], input_labels=[[[1] * len(points)]], return_tensors="pt"
        ).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        sizes = inputs["original_sizes"]
        given = {k: v for k, v in inputs.items() if k in ("pixel_values", "input_points", "input_labels")}
        with torch.inference_mode():
            outputs = self.model(**given, multimask_output=True)
            reshaped = inputs.get("reshaped_input_sizes")
            logits = outputs.pred_masks.float().cpu()
            arguments = (logits, sizes.cpu()) if reshaped is None else (logits, sizes.cpu(), reshaped.cpu())
            masks = self.processor.post_process_masks(*arguments, binarize=False)[0][0]  # [masks, H, W]
        scores = outputs.iou_scores.float().cpu().reshape(-1)[: masks.shape[0]]
        sureness = masks.sigmoid().numpy()
        areas = (sureness > 0.5).mean(axis=(1, 2))
        fits = (areas >= self.options.min_area) & (areas <= self.options.max_area)
        ranked = np.where(fits, scores.numpy(), scores.numpy() - 1e6)
        return np.asarray(sureness[int(ranked.argmax())], dtype=np.float32)
