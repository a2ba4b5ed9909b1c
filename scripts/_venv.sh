# shellcheck shell=bash
# Sourced by its neighbours: goes to the root of the repository and makes .venv there, or brings it up to date.
# Afterwards $venv holds Python and every tool. Two seconds when there is nothing to do.
#
# PYTHON names the Python to start from (default: python3), TORCH_INDEX where PyTorch comes from (default: PyPI, whose
# builds bring CUDA). A script that needs less than everything says which extras, before it sources this: extras=report

set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$PWD/.venv
everything=emulate,report,mpi,examples,lightning,accelerate,transformers,tensorboard,prometheus,dev
extras=${extras:-$everything}

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

# What the environment was made from. A change of any of it calls for another installation.
recipe() { cat setup.cfg setup.py pyproject.toml scripts/_venv.sh distcomp/{kernels,transports}/_*.[ch] | sha256sum; }

make_venv() {
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        say "$python is no Python 3.11 or newer; name one: PYTHON=/path/to/python3.11 scripts/${0##*/}"
        exit 2
    fi
    say "making .venv"
    if ! "$python" -m venv --clear .venv; then
        say "$python cannot make a virtual environment; install its venv module (Debian: python3-venv)"
        exit 2
    fi
}

install() {
    say "installing (some minutes the first time)"
    # PyTorch first and on its own, at the tested version: asked for by a range, its newest release would come.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
}

# A moved or copied environment has scripts that point elsewhere; it is made again.
if [[ $(.venv/bin/python -c 'import sys; print(sys.prefix)' 2>/dev/null) != "$venv" ]]; then
    make_venv
fi
# What was installed with everything serves a script that needs less.
made=$(cat .venv/recipe 2>/dev/null || true)
if [[ $made != "$(recipe) $everything" && $made != "$(recipe) $extras" ]]; then
    install
    echo "$(recipe) $extras" >.venv/recipe
fi

export PATH=$venv/bin:$PATH
# A home that cannot be written to should cost neither a warning nor a font cache built at every start.
export MPLCONFIGDIR=${MPLCONFIGDIR:-$venv/matplotlib}
