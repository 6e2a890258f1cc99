"""Text and images of a sample as the model reads them: prompt, image spans, labels, Q-Former text, pixels.

Layouts (Q places for each image V_i): `prefix`  [V_1 ; ... ; V_N ; bos ; instruction], no separators, as the authors
do; `interleaved`  [bos ; text ; V_1 ; text ; V_2 ...], each `<image>` replaced by its span. Prompt and answer are
tokenised apart, so labels start exactly at the answer.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AddedToken, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from samtrain.core.batch import IGNORE_INDEX, ImageGroups
from samtrain.core.errors import ConfigError, DataError
from samtrain.core.sample import IMAGE_PLACEHOLDER, EncodedText


class SamMllmProcessor(ProcessorMixin):
    """Implements `core.sample.SampleEncoder`; saves and loads as an ordinary Hugging Face processor folder.

    max_instruction_tokens: LLM tokens of the instruction (bos included), cut on the left; image spans are never cut
        and never counted. max_output_tokens: answer and eos, cut on the right. max_text_tokens: Q-Former tokens of the
        instruction ([CLS] and [SEP] included), cut on the left.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        qformer_tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int = 32,
        image_layout: str = "prefix",
        max_instruction_tokens: int = 128,
        max_output_tokens: int = 256,
        max_text_tokens: int = 128,
        **kwargs: Any,
    ) -> None:
        if image_layout not in ("prefix", "interleaved"):
            raise ConfigError(f"image_layout = {image_layout!r}: expected `prefix` or `interleaved`")
        if IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
            token = AddedToken(IMAGE_PLACEHOLDER, normalized=False, special=True)
            tokenizer.add_tokens([token], special_tokens=True)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the LLM tokenizer {tokenizer.name_or_path!r} has no eos token; answers must end with one"
            )
        super().__init__(image_processor, tokenizer, qformer_tokenizer)
        self.qformer_tokenizer = qformer_tokenizer
        self.num_query_tokens = num_query_tokens
        self.image_layout = image_layout
        self.max_instruction_tokens = max_instruction_tokens
        self.max_output_tokens = max_output_tokens
        self.max_text_tokens = max_text_tokens
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER))  # type: ignore[arg-type]
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = self.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.qformer_pad_token_id: int = qformer_tokenizer.pad_token_id or 0
        # Special tokens around a text, found once: asking the tokenizer to truncate would change its shared state,
        # which is not safe with the loader's threads.
        self._bos = _specials_around(tokenizer)[0]
        self._qformer_specials = _specials_around(qformer_tokenizer)

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return int(self.image_processor.size["height"])

    def encode(self, *, key: str, instruction: str, output: str | None, num_images: int) -> EncodedText:
        """Tokens of one sample; `output=None` encodes a prompt for generation.

        Raises:
            DataError: placeholders and images disagree, an answer holds a placeholder, or the prompt is empty.
        """
        prompt = self._prompt(key, instruction, num_images)
        answer: list[int] = []
        if output is not None:
            if IMAGE_PLACEHOLDER in output:
                raise DataError(f"{key}: the answer holds {IMAGE_PLACEHOLDER}, which stands for an image; remove it")
            answer = [*self._ids(self.tokenizer, output), self.eos_token_id][: self.max_output_tokens]
        return EncodedText(
            input_ids=prompt + answer,
            labels=[IGNORE_INDEX] * len(prompt) + answer,
            qformer_input_ids=self._qformer_text(instruction),
        )

    def pixel_values(self, image: Image.Image | Tensor) -> Tensor:
        """[3, image_size, image_size] float32: bicubic resize (if needed), scaled, normalised.

        Args:
            image: a picture, or one that already has the size, as [3, image_size, image_size] uint8.
        """
        if isinstance(image, Image.Image):
            size = (self.image_size, self.image_size)
            image = image.convert("RGB")
            if image.size != size:
                image = image.resize(size, Image.Resampling.BICUBIC)
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        mean, std = (
            torch.tensor(v, dtype=torch.float64)[:, None, None]
            for v in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        # One product and one difference: a tenth of the time of the formula as it is written.
        return torch.mul(image, (1 / (255 * std)).float()).sub_((mean / std).float())

    def collate_prompts(self, prompts: list[tuple[EncodedText, Tensor]]) -> dict[str, Any]:
        """A batch for `generate`: each prompt with its pixels [N, 3, H, W] (N may be 0).

        Returns:
            input_ids, attention_mask [B, T] (padded on the left), pixel_values [I, 3, H, W], image_groups,
            qformer_input_ids, qformer_attention_mask [B, Tq] (padded on the right).
        """
        texts = [text for text, _ in prompts]
        input_ids, attention_mask = _pad([t.input_ids for t in texts], self.pad_token_id, left=True)
        text_ids, text_mask = _pad([t.qformer_input_ids for t in texts], self.qformer_pad_token_id, left=False)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": torch.cat([pixels for _, pixels in prompts]),
            "image_groups": ImageGroups.from_counts([pixels.shape[0] for _, pixels in prompts]),
            "qformer_input_ids": text_ids,
            "qformer_attention_mask": text_mask,
        }

    def __call__(
        self,
        images: list[Image.Image] | list[list[Image.Image]] | None = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts for generation, in Hugging Face's manner: `model.generate(**processor(images, text))`.

        Args:
            images: the images of each text (a list of lists), or of the only text (a flat list).
            text: one instruction, or several.
            kwargs: none but return_tensors="pt", which is what is returned anyway.
        """
        if set(kwargs) - {"return_tensors"} or kwargs.get("return_tensors", "pt") != "pt":
            raise TypeError(f"SamMllmProcessor takes images and text and returns torch tensors; got {kwargs}")
        texts = [text] if isinstance(text, str) else list(text or [])
        nested = [images or []] if not images or isinstance(images[0], Image.Image) else images
        if not texts or (images and len(nested) != len(texts)):
            raise DataError(f"{len(texts)} texts but images for {len(nested)}; give a list of images for each text")
        prompts = []
        for i, instruction in enumerate(texts):
            of_text: list[Any] = list(nested[i]) if images else []
            encoded = self.encode(key=f"text {i}", instruction=instruction, output=None, num_images=len(of_text))
            size = self.image_size
            pixels = [self.pixel_values(image) for image in of_text]
            prompts.append((encoded, torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size)))
        return BatchFeature(self.collate_prompts(prompts))

    def decode_answers(self, token_ids: Tensor) -> list[str]:
        """Generated ids [B, new] as text, without special tokens, stripped."""
        return [t.strip() for t in self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)]

    def _prompt(self, key: str, instruction: str, num_images: int) -> list[int]:
        placeholders = instruction.count(IMAGE_PLACEHOLDER)
        allowed = (num_images,) if self.image_layout == "interleaved" else (0, num_images)
        if placeholders not in allowed:
            hint = "write one for each image" + (", or none" if self.image_layout == "prefix" else "")
            raise DataError(
                f"{key}: the instruction has {placeholders} {IMAGE_PLACEHOLDER} placeholders but the sample has "
                f"{num_images} images; the {self.image_layout} layout wants: {hint}"
            )
        span = [self.image_token_id] * self.num_query_tokens
        budget = self.max_instruction_tokens - len(self._bos)
        if self.image_layout == "prefix":
            text = self._ids(self.tokenizer, instruction.replace(IMAGE_PLACEHOLDER, ""))
            prompt = span * num_images + self._bos + _cut_left(text, budget)
        else:
            text = self._ids(self.tokenizer, instruction)  # one image_token_id for each placeholder
            too_many = max(0, len(text) - placeholders - budget)
            prompt = list(self._bos)
            for token in text:
                if token == self.image_token_id:
                    prompt += span
                elif too_many > 0:
                    too_many -= 1
                else:
                    prompt.append(token)
        if not prompt:
            raise DataError(f"{key}: an empty prompt: no image, no instruction, and the tokenizer has no bos token")
        return prompt

    def _qformer_text(self, instruction: str) -> list[int]:
        before, after = self._qformer_specials
        text = self._ids(self.qformer_tokenizer, instruction.replace(IMAGE_PLACEHOLDER, ""))
        return before + _cut_left(text, self.max_text_tokens - len(before) - len(after)) + after

    @staticmethod
    def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []


def build_image_processor(*, image_size: int, mean: list[float], std: list[float]) -> Any:
    """transformers' PIL image processor: direct bicubic resize to a square, 1/255, normalisation."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    return BlipImageProcessorPil(
        size={"height": image_size, "width": image_size}, resample=3, image_mean=mean, image_std=std
    )


def _specials_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids a tokenizer puts before and after a text, e.g. ([CLS], [SEP]) or ([bos], [])."""
    inner = tokenizer("a", add_special_tokens=False).input_ids
    outer = tokenizer("a").input_ids
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    raise ConfigError(f"tokenizer {tokenizer.name_or_path!r} changes a text's tokens when it adds special ones")


def _cut_left(ids: list[int], length: int) -> list[int]:
    return ids[max(0, len(ids) - max(0, length)) :]


def _pad(rows: list[list[int]], fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows as [B, longest] ids and their mask, int64."""
    longest = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = 1
    return ids, mask
