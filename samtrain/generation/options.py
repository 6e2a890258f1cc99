"""The `generation:` section; the defaults are the authors' evaluation protocol."""

from pydantic import Field

from samtrain.core.options import Options


class GenerationOptions(Options):
    """Beam search of the protocol: 5 beams, no sampling, repetition penalty 1.5, at most 255 new tokens."""

    num_beams: int = Field(default=5, ge=1)
    min_new_tokens: int = Field(default=1, ge=0)
    max_new_tokens: int = Field(default=255, ge=1)
    repetition_penalty: float = Field(default=1.5, gt=0)
    length_penalty: float = 1.0
