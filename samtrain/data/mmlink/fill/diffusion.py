"""An inpainting pipeline of diffusers: a description in words becomes the background around the things."""

import numpy as np
from PIL import Image

from samtrain.data.mmlink.fill import Background
from samtrain.data.mmlink.optional import choose_device, import_optional, pretrained
from samtrain.data.mmlink.options import DiffusersFillOptions


class DiffusersFiller:
    """Raises ConfigError where diffusers or the model is not there."""

    def __init__(self, options: DiffusersFillOptions) -> None:
        import torch

        diffusers = import_optional("diffusers", needed_for="fill.kind = diffusers")
        self.options = options
        self.device = choose_device(options.device)
        pipeline = pretrained(
            diffusers.AutoPipelineForInpainting,
            options.model,
            where="fill.model",
            revision=options.revision,
            torch_dtype=getattr(torch, options.dtype),
        )
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.to(self.device)

    def __call__(self, things: Image.Image, background: Background, rng: np.random.Generator) -> Image.Image:
        import torch

        size = (self.options.size, self.options.size)
        alpha = things.getchannel("A")
        start = Image.new("RGB", things.size, (127, 127, 127))
        start.paste(things, mask=alpha)
        holes = alpha.point(lambda value: 0 if value > 127 else 255)  # white is painted
        result = self.pipeline(
            prompt=background.description,
            negative_prompt=self.options.negative_prompt,
            image=start.resize(size, Image.Resampling.BICUBIC),
            mask_image=holes.resize(size, Image.Resampling.NEAREST),
            height=self.options.size,
            width=self.options.size,
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance_scale,
            # On the CPU, so that a seed means the same on every device.
            generator=torch.Generator("cpu").manual_seed(int(rng.integers(2**31))),
        )
        picture = result.images[0].convert("RGB").resize(things.size, Image.Resampling.LANCZOS)
        picture.paste(things, mask=alpha)
        return picture
