# shellcheck shell=bash
# `code_version` prints what identifies the code in the working folder: where setup.sh copied a folder, a checksum of
# the files that it copied, as they are now; else git's commit.

LISTED=.code_files # names of the copied files, each with a NUL after it

checksum() { # a list of files
    xargs -0 cksum <"$1" | cksum | tr ' ' -
}

code_version() {
    if [[ -f $LISTED ]]; then
        checksum "$LISTED"
    else
        git describe --always --dirty 2>/dev/null || echo unknown
    fi
}
