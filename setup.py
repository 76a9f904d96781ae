from setuptools import find_packages, setup

setup(
    name="rljax",
    version="0.1.0",
    description="Reinforcement learning of language models in JAX: small pure functions and short scripts",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rljax", "rljax.*"]),
    package_data={"": ["*.html", "*.js", "py.typed"]},  # the report; types for type checkers
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<1",  # 1.0 moves the v1 API to the top level
        "chex",
        "jaxtyping",
        "numpy",
        "transformers>=5",
        "tokenizers",
        "safetensors",
        "jinja2",  # apply_chat_template needs it, transformers does not ask for it
        "tyro",
        "rich",
        "tensorboardX",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "beartype",
            "ruff",
            "check-jsonschema",
            "setuptools>=64",  # with wheel: test_install builds without network
            "wheel",
        ],
        "parity": ["torch==2.13.0", "peft"],  # gigabytes; tests only
        "data": ["datasets"],
        "wandb": ["wandb", "trackio"],
        "envs": [
            "gymnax>=1.0.1,<2; python_version < '3.12'",
            "six; python_version < '3.12'",  # gymnax imports it without asking for it
        ],
        "verify": ["math-verify"],
        "preflight": ["jax[tpu]"],  # libtpu compiles for a pod that is not there
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
)
