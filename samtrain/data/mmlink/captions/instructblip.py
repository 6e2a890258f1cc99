"""InstructBLIP of transformers."""

from PIL import Image

from samtrain.data.mmlink.optional import choose_device, pretrained
from samtrain.data.mmlink.options import InstructBlipOptions


class InstructBlipCaptioner:
    """Raises ConfigError where the model cannot be loaded."""

    def __init__(self, options: InstructBlipOptions) -> None:
        import torch
        from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

        self.options = options
        self.device = choose_device(options.device)
        self.dtype = getattr(torch, options.dtype)
        where, revision = "captions.model", options.revision
        self.processor = pretrained(InstructBlipProcessor, options.model, where=where, revision=revision)
        model = pretrained(
            InstructBlipForConditionalGeneration, options.model, where=where, revision=revision, dtype=self.dtype
        )
        self.model = model.to(self.device).eval()

    def __call__(self, image: Image.Image, *, name: str, caption: str) -> str:
        import torch

        inputs = self.processor(images=image.convert("RGB"), text=self.options.prompt, return_tensors="pt")
        inputs = inputs.to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=self.options.num_beams,
                max_new_tokens=self.options.max_new_tokens,
            )
        text = self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        # Some language models give the prompt back in front of the answer.
        return " ".join(text.removeprefix(self.options.prompt).split()) or caption or name
