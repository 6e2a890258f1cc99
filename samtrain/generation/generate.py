"""Batched answers to instructions about images, with the settings of the evaluation protocol by default.

Prompts are padded on the left and masked, so an answer does not depend on its neighbours in the batch (beyond the
rounding of the device's matrix kernels).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from samtrain.core.errors import InputError
from samtrain.generation.options import GenerationOptions

if TYPE_CHECKING:
    from samtrain.model import SamMllmForConditionalGeneration, SamMllmProcessor

Item = tuple[str, Sequence[Image.Image]]
MAX_IMAGE_PIXELS = 64_000_000


def generate_answers(
    model: "SamMllmForConditionalGeneration",
    processor: "SamMllmProcessor",
    items: Sequence[Item],
    options: GenerationOptions,
    *,
    batch_size: int,
) -> list[str]:
    """An answer for each (instruction, images), in order; the model's parameters must be whole."""
    answers: list[str] = []
    for start in range(0, len(items), batch_size):
        answers += generate_batch(model, processor, items[start : start + batch_size], options)
    return answers


@torch.no_grad()
def generate_batch(
    model: "SamMllmForConditionalGeneration",
    processor: "SamMllmProcessor",
    items: Sequence[Item],
    options: GenerationOptions,
) -> list[str]:
    """The answers of one batch. The model's train or eval mode is put back afterwards.

    Raises:
        DataError: placeholders and images of an item disagree.
    """
    prompts = []
    for i, (instruction, images) in enumerate(items):
        text = processor.encode(key=f"item {i}", instruction=instruction, output=None, num_images=len(images))
        pixels = [processor.pixel_values(image) for image in images]
        size = processor.image_size
        prompts.append((text, torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size)))
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in processor.collate_prompts(prompts).items()}
    was_training = model.training
    model.eval()
    try:
        token_ids = model.generate(**inputs, **generation_arguments(model, processor, options))
    finally:
        model.train(was_training)
    return processor.decode_answers(token_ids)


def generation_arguments(
    model: "SamMllmForConditionalGeneration", processor: "SamMllmProcessor", options: GenerationOptions
) -> dict[str, Any]:
    """Keyword arguments of transformers' `generate`; sampling is off whatever the LLM's own defaults say."""
    eos = processor.eos_token_id if model.config.eos_token_id is None else model.config.eos_token_id
    return {
        **options.model_dump(),
        "do_sample": False,
        "eos_token_id": eos,
        "pad_token_id": processor.pad_token_id,
    }


def generate_from_paths(
    folder: str | Path, image_paths: Sequence[str | Path], prompt: str, options: GenerationOptions
) -> str:
    """Answer one instruction about image files with an exported model, on the GPU where there is one.

    Raises:
        InputError: an image is missing, is not an image, or is too large; the prompt does not fit the images.
        CheckpointError: `folder` is not an exported model.
    """
    from samtrain.generation.export import load_exported

    images = [_open_image(Path(path)) for path in image_paths]
    model, processor = load_exported(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    return generate_answers(model, processor, [(prompt, images)], options, batch_size=1)[0]


def _open_image(path: Path) -> Image.Image:
    from samtrain.data.decode import decode_image

    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the image: {error.strerror}") from None
    return decode_image(data, max_pixels=MAX_IMAGE_PIXELS, where=str(path))
