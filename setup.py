"""Metadata, requirements and the folder-to-package map. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION_LINE = re.search(r'^__version__ = "([^"]+)"', (HERE / "merge/__init__.py").read_text(), re.MULTILINE)
assert VERSION_LINE, "merge/__init__.py must hold one line of the form: __version__ = ..."

# numba and torch publish wheels for these platforms only; elsewhere pip would try to compile them and fail.
HAS_WHEELS = (
    'python_version < "3.15" and ('
    '(sys_platform == "linux" and (platform_machine == "x86_64" or platform_machine == "aarch64"))'
    ' or (sys_platform == "darwin" and platform_machine == "arm64")'
    ' or (sys_platform == "win32" and platform_machine == "AMD64"))'
)
HAS_TRITON_WHEELS = (
    'python_version < "3.15" and sys_platform == "linux"'
    ' and (platform_machine == "x86_64" or platform_machine == "aarch64")'
)

# A lower bound is the first release with what the code calls; there is no upper bound without a known break.
REQUIRES = [
    "einops>=0.7",
    "huggingface_hub>=1.3",  # the oldest that transformers 5 works with
    "matplotlib>=3.9",  # numpy 2
    "ml_dtypes>=0.5",  # bfloat16 for numpy 2
    f"numba>=0.61; {HAS_WHEELS}",  # numpy 2.1, Python 3.13
    "numpy>=2.0",
    "pillow>=10.0",
    "pycountry>=24.6",
    "pyyaml>=6.0",
    "rich>=13.0",
    "safetensors>=0.5",
    f"torch>=2.6; {HAS_WHEELS}",  # the oldest that transformers 5 works with
    "transformers>=5.0",
    f"triton>=3.2; {HAS_TRITON_WHEELS}",  # the one that belongs to torch 2.6
    "typer>=0.15.4",  # earlier ones break with click 8.2
    "xxhash>=3.5",  # lets other threads run meanwhile
]

EVALUATE_REQUIRES = [
    "pyarrow>=18.0",  # numpy 2, Python 3.13
]

TEST_REQUIRES = [
    *EVALUATE_REQUIRES,
    'diffusers>=0.42; python_version >= "3.11"',  # the oldest that works with huggingface_hub 2
    "hypothesis>=6.100",
    "kernels>=0.10",  # Hugging Face's package, whose name must stay free: see tests/test_packaging.py
    "mergekit==0.1.5",  # the release that parity is tested against
    "mypy>=1.15",
    "peft>=0.18",  # its merges are what those of adapters are compared with
    "pre-commit>=4.0",
    "pytest>=8.0",
    "ruff>=0.9",
    "sacrebleu>=2.3",  # what our chrF is compared with
    "safetensors>=0.8",  # knows every dtype that the header tests compare
    "scipy>=1.13",  # numpy 2; our statistics are compared with its
    "setuptools>=77",  # builds the wheel under test without a network
    "types-PyYAML>=6.0",
]

setup(
    name="ggez-merge",
    version=VERSION_LINE.group(1),
    description="Merge a global vision-language model with its region-tuned copies, at the speed of the disk",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # The code is Apache-2.0; the demo's pictures and names have their own licences: recipes/emoji/README.md.
    license_expression="Apache-2.0 AND CC-BY-4.0 AND Unicode-3.0",
    license_files=["LICENSE", "recipes/emoji/LICENSE-UNICODE.txt"],
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={
        "ggez_merge": "merge",
        "ggez_kernels": "kernels",
        "ggez_merge.benchmarks": "benchmarks",
        "ggez_merge.recipes": "recipes",
    },
    packages=[
        "ggez_merge",
        "ggez_merge.benchmarks",
        "ggez_merge.evaluate",
        "ggez_merge.methods",
        "ggez_merge.recipes",
        "ggez_merge.recipes.emoji",
        "ggez_merge.sweep",
        "ggez_kernels",
        "ggez_kernels.cpu",
        "ggez_kernels.gpu",
        "ggez_kernels.reference",
    ],
    package_data={
        "ggez_merge": ["py.typed"],
        "ggez_merge.benchmarks": ["*.md", "results/*"],
        "ggez_merge.recipes": ["*.csv", "*.yaml", "*.md"],
        "ggez_merge.recipes.emoji": [
            "*.yaml",
            "*.md",
            "*.txt",
            "images.png",
            "names.jsonl",
            "global/*",
            "region/*",
        ],
        "ggez_kernels": ["py.typed"],
    },
    include_package_data=False,
    zip_safe=False,
    install_requires=REQUIRES,
    extras_require={"evaluate": EVALUATE_REQUIRES, "test": TEST_REQUIRES},
    entry_points={"console_scripts": ["ggez-merge = ggez_merge.cli:main"]},
)
