"""The package's home: what it needs, with the versions that were tested."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIREMENTS = [
    "torch>=2.11,<2.14",
    "deepspeed==0.19.8",
    "megatron-core==0.16.1",
    "mpi4py==4.1.2",
    "numpy>=2,<2.5",
    "sentencepiece==0.2.3",
    "tokenizers>=0.22,<0.24",
    "pyarrow>=20",
    "pydantic>=2.12,<3",
    "psutil>=6",
    "rich>=14",
    "safetensors>=0.6",
    "tensorboard>=2.19",
    "matplotlib>=3.10",
    "plotly>=7,<8",
    "pymetis==2025.2.2",
]
DEVELOPMENT = [
    "pytest>=8.4",
    "pytest-xdist>=3.8",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "pre-commit>=4",
    "scipy>=1.15",
    "scikit-learn>=1.6",
    "transformers>=5.17,<6",  # benchmarks compare with its models
    # Its interpreter runs the GPU kernels in the tests, and needs this numpy. PyTorch for CUDA brings its own.
    "triton==3.6.0",
    "numpy<2.4",
]

setup(
    name="ssd_megatron",
    version="0.1.0",
    description="Distributed pre-training of language models with switchable sparse-dense learning",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ssd_megatron", "ssd_megatron.*"]),
    package_data={"ssd_megatron": ["py.typed", "ffn/kernels/csrc/*", "reporting/*.css", "reporting/*.js"]},
    install_requires=REQUIREMENTS,
    extras_require={"dev": DEVELOPMENT},
)
