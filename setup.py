"""Two packages from one tree: samtrain, and samtrain_kernels under kernels/ (a flat `kernels` package would hide
Hugging Face's `kernels` from transformers)."""

from setuptools import find_packages, setup

setup(
    name="samtrain",
    version="0.1.0",
    description="Distributed training of multi-image multimodal LLMs with Semantic Alignment (arXiv 2408.12867)",
    python_requires=">=3.11",
    packages=find_packages(include=["samtrain", "samtrain.*"]) + find_packages("kernels"),
    package_dir={"samtrain": "samtrain", "samtrain_kernels": "kernels/samtrain_kernels"},
    package_data={"samtrain": ["py.typed"], "samtrain_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "deepspeed>=0.19.8",
        "accelerate>=1.15",
        "peft>=0.21",
        "timm>=1.0",
        "safetensors",
        "tokenizers",
        "webdataset>=1.0.2",
        "ray[default,train]>=2.60",
        "mlflow>=3.17,<3.18",
        "pydantic>=2",
        "pyyaml",
        "typer",
        "rich",
        "numpy",
        "pillow",
        "matplotlib",
        "rouge==1.0.1",
        "pycocoevalcap==1.2",
        "psutil",
    ],
    extras_require={
        # The packaged sources of the mini recipe: art renderer, segmenter runtime, GGUF reader.
        "mini": ["resvg-py==0.5.0", "onnxruntime>=1.32", "gguf", "pypatchmatch==2.2.0"],
        "gpu": ["flash-attn", "liger-kernel>=0.8.5"],
        "dev": ["pytest>=9.2", "pytest-timeout", "ruff", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["samtrain = samtrain.cli:main"]},
)
