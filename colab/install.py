"""Installs what bivl needs and this machine lacks; what is there already stays at its version.

    python colab/install.py

For Colab, whose jax and plugins for GPU and TPU fit one another and the drivers: pip would follow
requirements.txt to a newer jax, which finds neither. Nor is anything else exchanged that the rest
of Colab relies on. In August 2026 Colab had Python 3.13, jax 0.7.2, flax 0.11.2, grain 0.2.18 and
numpy 2.1.3 (googlecolab/backend-info), with which bivl trains; it lacked clu, importlib_resources,
jiwer, ml-collections and tensorboardX. TensorFlow is neither needed nor installed.
"""

import pathlib
import re
import subprocess
import sys
from importlib import metadata


def plan(lines, version) -> list[str]:
    """What to ask pip for: the lines of a requirements file, where there is a version the same one.

    version: name -> the installed version, or None.
    """
    wanted = filter(None, (line.partition("#")[0].strip() for line in lines))
    named = {re.match(r"[\w.-]+", requirement)[0]: requirement for requirement in wanted}
    found = [f"{name}=={version(name)}" if version(name) else named[name] for name in named]
    found += [f"jaxlib=={version('jaxlib')}"] if version("jaxlib") else []
    return found + repairs(version)


def repairs(version) -> list[str]:
    """tensorflow-metadata 1.21, without which tensorflow-datasets reads nothing, cannot be imported
    beside a protobuf before 6.31 (tensorflow/metadata, issue 68), and these two are what Colab's
    CPU and GPU machines have had since June 2026. 1.17 can."""

    def before(name, *wanted):
        return tuple(map(int, (version(name) or "0.0").split(".")[:2])) < wanted

    broken = before("protobuf", 6, 31) and not before("tensorflow-metadata", 1, 18)
    return ["tensorflow-metadata<1.18"] if broken else []


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Asks pip once for everything, so that it refuses what does not go together."""
    file = pathlib.Path(__file__).resolve().parents[1] / "requirements.txt"
    requirements = plan(file.read_text().splitlines(), installed)
    missing = [requirement for requirement in requirements if "==" not in requirement]
    print("as they are:", ", ".join(r for r in requirements if r not in missing))
    print("installing: ", ", ".join(missing) or "nothing", flush=True)
    if missing:
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
        subprocess.run([*pip, *requirements], check=True)


if __name__ == "__main__":
    main()
