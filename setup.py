"""Package map: top-level folders are source roots that hold uniquely named packages.

``recipe/`` and ``kernels/`` are not packages themselves: a package importable as ``recipe`` would hide
verl's, one importable as ``kernels`` would hide the Hugging Face package of that name.
"""

from setuptools import find_packages, setup

ROOTS = {"keytoken": "recipe", "keytoken_kernels": "kernels", "keytoken_configs": "configs"}

setup(
    name="keytoken",
    version="0.1.0",
    description="Token-attribution reinforcement learning for video and vision LLMs, a recipe on verl",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=[
        name
        for package, root in ROOTS.items()
        for name in find_packages(root, include=[package, f"{package}.*"])
    ],
    package_dir={package: f"{root}/{package}" for package, root in ROOTS.items()},
    package_data={
        "keytoken_configs": ["**/*.yaml"],
        "keytoken": ["py.typed", "lens/web/*", "lens/web/vendor/*"],
    },
    entry_points={
        "console_scripts": ["keytoken = keytoken.cli:main"],
        # Called at the end of `import torch`; does nothing unless torch is a CPU build (see the module).
        "torch.backends": ["keytoken = keytoken.verl_adapter.shims.torch_extensions:install"],
    },
)
