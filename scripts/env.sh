# shellcheck shell=bash
# Makes or reuses the virtual environment. Source it from the repository root, then call
#
#   prepare_environment          # what llm_jax needs
#   prepare_environment test     # and what an extra of setup.py needs
#
# which puts the environment's bin/ first on PATH and sets VENV_PYTHON, or says why it cannot and fails.
# Nothing is installed again until setup.py, the Python version, the folder or LLM_JAX_TORCH changes: a stamp
# in the environment holds them.
#
#   VENV=DIR            where the environment is (default .venv)
#   PYTHON=COMMAND      which Python makes it (default: the first of python3, python3.14 ... that is >= 3.11)
#   LLM_JAX_TORCH=ARGS  what `pip install` gets for the torch that tests compare with (default torch==2.13.0);
#                       may carry options, such as an --index-url that serves CPU builds

say() { printf '[env] %s\n' "$*" >&2; }

find_python() {
    local candidates=(python3 python python3.14 python3.13 python3.12 python3.11) candidate
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "no Python >= 3.11 among: ${candidates[*]}; install one, or name it: PYTHON=/path/to/python3"
    return 1
}

make_venv() {
    local python
    python=$(find_python) || return
    say "creating $VENV with $("$python" --version)"
    if ! "$python" -m venv --clear "$VENV"; then
        say "$python has no working venv module (on Debian and Ubuntu: apt install python3-venv)"
        return 1
    fi
    "$VENV_PYTHON" -m pip install --quiet --upgrade pip
}

install_package() {
    local extra=$1
    if [[ $extra == test ]]; then
        say "installing the torch that tests compare with: $LLM_JAX_TORCH"
        # shellcheck disable=SC2086  # it may be several arguments
        "$VENV_PYTHON" -m pip install --quiet $LLM_JAX_TORCH || return
    fi
    say "installing llm_jax${extra:+, extra $extra} (minutes the first time)"
    "$VENV_PYTHON" -m pip install --quiet --editable ".${extra:+[$extra]}"
}

prepare_environment() {
    local extra=${1:-} core state stamp
    export VENV=${VENV:-$PWD/.venv} LLM_JAX_TORCH=${LLM_JAX_TORCH:-torch==2.13.0}
    VENV_PYTHON=$VENV/bin/python
    if ! "$VENV_PYTHON" -c '' 2>/dev/null; then
        make_venv || return
    fi
    core="$("$VENV_PYTHON" --version), $PWD, $(cksum <setup.py)"
    state="$core${extra:+, $LLM_JAX_TORCH}"
    stamp=$VENV/llm_jax-${extra:-core}.stamp
    if [[ -f $stamp && $(<"$stamp") == "$state" ]]; then
        say "reusing $VENV"
    else
        install_package "$extra" || return
        echo "$core" >"$VENV/llm_jax-core.stamp" # an extra brings the core with it
        echo "$state" >"$stamp"
    fi
    export PATH="$VENV/bin:$PATH"
}
