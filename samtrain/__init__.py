"""samtrain: distributed training of multi-image multimodal LLMs with Semantic Alignment (arXiv 2408.12867)."""

__version__ = "0.1.0"
