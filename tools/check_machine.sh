# Names what this machine lacks to set dsclip up, with the command that installs it. Called by make; needs only sh.
# Usage: PYTHON=python3 sh tools/check_machine.sh
python="${PYTHON:-python3}"
missing=0

lacks() { # what it is for · Debian and Ubuntu package · Fedora package · Homebrew package
    echo "dsclip needs $1." >&2
    if command -v apt-get >/dev/null 2>&1; then echo "  install it with: sudo apt-get install -y $2" >&2
    elif command -v dnf >/dev/null 2>&1; then echo "  install it with: sudo dnf install -y $3" >&2
    elif command -v brew >/dev/null 2>&1; then echo "  install it with: brew install $4" >&2
    else echo "  install one of these packages: $2 (Debian, Ubuntu), $3 (Fedora), $4 (Homebrew)" >&2
    fi
    missing=1
}

if ! command -v "$python" >/dev/null 2>&1; then
    lacks "Python 3.10 or later ($python was not found)" "python3 python3-venv python3-dev" "python3 python3-devel" "python"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    lacks "Python 3.10 or later ($python is $("$python" -V 2>&1)); then say make PYTHON=python3.12" \
        "python3.12 python3.12-venv python3.12-dev" "python3.12 python3.12-devel" "python@3.12"
else
    "$python" -c 'import venv, ensurepip' 2>/dev/null || lacks "Python's venv module" "python3-venv" "python3" "python"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
        lacks "Python's header files (torch.compile builds with them)" "python3-dev" "python3-devel" "python"
fi
command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 ||
    lacks "a C++ compiler (torch.compile builds with it)" "g++" "gcc-c++" "gcc"
exit $missing
