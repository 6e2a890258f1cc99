"""Real work of a step, by samtrain/model/flops.py: no padding, no recomputation, causal attention at half."""

from benchmarks.train.loops import Setting
from benchmarks.train.samples import StepData
from benchmarks.train.shapes import trains
from samtrain.core.batch import IGNORE_INDEX
from samtrain.model.flops import FlopCounter

OPTIMIZER_BYTES = 30  # read master, two moments, gradient (bf16); write them and the bf16 weight


class Work:
    """part -> floating-point operations of the step, forward and backward: vision, qformer, llm, head (of the LLM)."""

    def __init__(self, setting: Setting, data: StepData, *, guided: bool) -> None:
        config = setting.shape.config(guided=guided)
        counter = FlopCounter(config, trains(setting.train, guided=guided), image_size=setting.shape.image_size)
        self.parts = {"vision": 0.0, "qformer": 0.0, "llm": 0.0, "head": 0.0}
        for sample in data.samples:
            text, labels = sample.text, sum(label != IGNORE_INDEX for label in sample.text.labels)
            whole = counter.sample(
                num_tokens=text.num_tokens,
                num_labels=labels,
                num_images=len(sample.images),
                num_text_tokens=len(text.qformer_input_ids),
            )
            head = counter.sample(num_tokens=0, num_labels=labels, num_images=0, num_text_tokens=0).language_model
            self.parts["vision"] += whole.vision
            self.parts["qformer"] += whole.qformer
            self.parts["llm"] += whole.language_model - head
            self.parts["head"] += head

    @property
    def total(self) -> float:
        return sum(self.parts.values())
