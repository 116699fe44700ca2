"""Makes the virtual environment that the Makefile works in; standard library only.

    python prepare.py .venv dev.txt

A torch of 2.10 or later that this Python has is kept (the environment then sees its packages);
otherwise the pinned one is installed, and what that downloads is said before. Nothing is downloaded
when all is there. Without a network, packages of other versions than the pinned ones will do.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 10)
TRITON_OF_TORCH = {"2.10": "3.6.0", "2.11": "3.6.0", "2.13": "3.7.1", "2.14": "3.8.0"}
MODEL_LIBRARIES = ("torchvision", "timm", "transformers", "diffusers", "peft")
DOWNLOAD = """\
torch {version} is not installed for {python} and will be downloaded: about 200 MB where
the package index has a CPU build, 3 GB and more where it has a CUDA build with its libraries (Linux
x86_64, most often). To keep a torch that you have:
    make {target} PYTHON=/path/to/the/python/that/has/it
"""


def numbers(version):
    """ "2.13.0+cpu" -> (2, 13)"""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def own_torch():
    """Version of this interpreter's torch if it is recent enough, else None."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if numbers(version) >= OLDEST_TORCH else None


def create(folder, torch):
    """A virtual environment that sees this interpreter's packages if its torch is kept."""
    print(f"creating {folder} for Python {sys.version.split()[0]}", flush=True)
    venv.create(folder, system_site_packages=torch is not None, with_pip=True, clear=True)
    if torch is None or sys.prefix == sys.base_prefix:
        return
    # This interpreter is a virtual environment itself, and a new one sees the base's packages only.
    outer = next(p for p in sys.path if (Path(p) / "torch").is_dir())
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "outer_environment.pth").write_text(outer + "\n")


LIST_INSTALLED = """
import importlib.metadata, json
found = {}
for distribution in importlib.metadata.distributions():
    if name := distribution.metadata["Name"]:
        found.setdefault(name.lower().replace("_", "-"), distribution.version)  # the first counts
print(json.dumps(found))
"""
PARSE = """
import json, sys
from pip._vendor.packaging.requirements import Requirement
found = []
for line in open(sys.argv[1]):
    line = line.partition("#")[0].strip()
    if line:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate():
            found.append((wanted.name.lower(), str(wanted.specifier).lstrip("=")))
print(json.dumps(found))
"""


def ask(python, code, *arguments):
    done = subprocess.run(
        [str(python), "-c", code, *arguments], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def install(python, requirements):
    installed = ask(python, LIST_INSTALLED)
    wanted = dict(ask(python, PARSE, str(requirements)))
    torch = installed.get("torch")
    if torch and numbers(torch) >= OLDEST_TORCH:
        pinned = wanted.pop("torch")
        print(f"keeping torch {torch}", flush=True)
        if torch.split("+")[0] != pinned:
            # The pinned torchvision would bring its own torch: the models' libraries are left as
            # they are, and the tests that need them skip.
            for name in MODEL_LIBRARIES:
                wanted.pop(name, None)
        if "triton" in installed:
            wanted.pop("triton", None)
        elif "triton" in wanted:
            short = ".".join(map(str, numbers(torch)))
            wanted["triton"] = TRITON_OF_TORCH.get(short, wanted["triton"])
    else:
        facts = {"python": sys.executable, "target": os.environ.get("TARGET", "test")}
        print(DOWNLOAD.format(version=wanted["torch"], **facts), flush=True)
    missing = {name: version for name, version in wanted.items() if installed.get(name) != version}
    if not missing:
        return
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    done = subprocess.run([*command, *(f"{n}=={v}" for n, v in missing.items())])
    if done.returncode == 0:
        return
    installed = ask(python, LIST_INSTALLED)
    absent = sorted(name for name in missing if name not in installed)
    if absent:
        sys.exit(
            f"could not install {', '.join(absent)} (see above). With a network, try again; "
            "without one, install them for the Python that you pass as PYTHON."
        )
    others = ", ".join(f"{name} {installed[name]} (pinned: {missing[name]})" for name in missing)
    print(f"going on with versions that are already here: {others}", flush=True)


def main():
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"expected Python 3.10 or later, got {sys.version.split()[0]} ({sys.executable}); "
            "pass another: make PYTHON=python3.12"
        )
    folder, requirements = Path(sys.argv[1]), Path(sys.argv[2])
    python = folder / "bin" / "python"
    if not python.exists():
        try:
            create(folder, own_torch())
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"could not create {folder}: {error}. On Debian: apt install python3-venv")
    install(python, requirements)


if __name__ == "__main__":
    main()
