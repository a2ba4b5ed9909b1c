"""What setup.cfg cannot declare: the C extensions, without which distcomp still installs (and says so), and
that Windows is none of its systems."""

import sys

from setuptools import Extension, setup

if sys.platform == "win32":
    sys.exit(
        "distcomp does not run on Windows: its transports and its kernels are for POSIX systems; "
        "use WSL 2 (wsl --install), which is Linux"
    )

setup(
    ext_modules=[
        Extension(
            "distcomp.kernels._cpu",
            sources=[
                f"distcomp/kernels/{name}.c"
                for name in (
                    "_cpu",
                    "_binary",
                    "_dct",
                    "_entropy",
                    "_header",
                    "_integers",
                    "_lowrank",
                    "_minifloat",
                    "_mixing",
                    "_rows",
                    "_subspace",
                    "_twomeans",
                    "_words",
                )
            ],
            depends=[
                "distcomp/kernels/_cpu.h",
                "distcomp/kernels/_select.h",
                "distcomp/kernels/_above.h",
                "distcomp/kernels/_top.h",
                "distcomp/kernels/_binary.h",
                "distcomp/kernels/_dct.h",
                "distcomp/kernels/_dct_chunks.h",
                "distcomp/kernels/_entropy.h",
                "distcomp/kernels/_header.h",
                "distcomp/kernels/_ans.h",
                "distcomp/kernels/_ans_avx2.h",
                "distcomp/kernels/_choice.h",
                "distcomp/kernels/_prices.h",
                "distcomp/kernels/_division.h",
                "distcomp/kernels/_lowrank.h",
                "distcomp/kernels/_minifloat.h",
                "distcomp/kernels/_mixing.h",
                "distcomp/kernels/_codes.h",
                "distcomp/kernels/_scales.h",
                "distcomp/kernels/_rotation.h",
                "distcomp/kernels/_rows.h",
                "distcomp/kernels/_inside.h",
                "distcomp/kernels/_integers.h",
                "distcomp/kernels/_subspace.h",
                "distcomp/kernels/_subspace_loops.h",
                "distcomp/kernels/_twomeans.h",
                "distcomp/kernels/_variants.h",
                "distcomp/kernels/_words.h",
            ],
            # A contracted multiply-add gives other bits: replicas on unlike machines would drift apart.
            extra_compile_args=["-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        ),
        Extension(
            "distcomp.transports._sockets",
            sources=["distcomp/transports/_sockets.c"],
            extra_compile_args=["-O2", "-g0", "-pthread"],
            extra_link_args=["-pthread"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        ),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
