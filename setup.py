from setuptools import setup

setup(
    name="lowdino",
    version="0.1.0",
    description="Self-supervised pre-training of vision backbones of about 5M parameters",
    license="MIT",
    packages=["lowdino"],
    python_requires=">=3.10",
    install_requires=["torch>=2.4", "torchvision>=0.19", "numpy"],
    extras_require={"test": ["pytest"]},
)
