"""Does an installed wheel work, without torch? The kernels in C, the names that need no torch, the version.

Run in an environment that holds the wheel, from a folder that does not hold the repository: cibuildwheel
does, after each wheel that it builds. Prints one line for each thing that it tried.
"""

import importlib.util
import sys
from importlib import metadata
from pathlib import Path


def main():
    import distcomp

    assert metadata.version("distcomp") == distcomp.__version__
    print(f"version {distcomp.__version__}, Python {sys.version.split()[0]}, {sys.platform}")

    folder = Path(distcomp.__file__).parent / "kernels"
    (extension,) = folder.glob("_cpu*.so")
    assert "abi3" in extension.name, extension
    spec = importlib.util.spec_from_file_location("_cpu", extension)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    (sockets,) = (Path(distcomp.__file__).parent / "transports").glob("_sockets*.so")
    assert "abi3" in sockets.name, sockets
    print(f"kernels: {extension.name}, {sum(not name.startswith('_') for name in dir(kernels))} functions")

    from distcomp.network import Fabric

    assert Fabric.parse(Fabric.uniform(4, "100mbit").to_toml()).ranks == 4
    print("fabrics are read and written")


if __name__ == "__main__":
    main()
