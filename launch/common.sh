# shellcheck shell=bash
# What all scripts share: flags, help, and printing instead of running. A script sets the defaults of its own
# flags, sources this file (gcloud.sh does, too) and calls
#
#   parse "topology" "spot" "$@"     # --topology=VALUE sets the variable topology, --spot sets spot to 1
#
# after which `words` holds what is no flag, and `command` what stands after a lone --.
# shellcheck disable=SC2034

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "bash 4.4 or newer is needed" >&2 && exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dry_run='' words=() command=()

say() { printf '[%s] %s\n' "$(basename "$0" .sh)" "$*" >&2; }

fail() { # the caller's mistake, and what to do
    say "$*"
    exit 2
}

header() { # the comment at the top of a script
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$1"
}

usage() { header "$0"; }

parse() {
    local values=" $1 " switches=" dry_run $2 " word
    for word in "${@:3}"; do
        shift
        case $word in
        --help) usage && exit ;;
        --) take_command "${@:3}" && break ;;
        --*=*) set_flag "$values" "${word%%=*}" "${word#*=}" ;;
        --*) set_flag "$switches" "$word" 1 ;;
        *) words+=("$word") ;;
        esac
    done
}

take_command() {
    [[ " $* " != *" --dry_run "* ]] || fail "put --dry_run before the lone -- (or, if the command is to have it, write --dry_run=true)"
    command=("$@")
}

set_flag() {
    local flag=${2#--}
    [[ $1 == *" $flag "* ]] || fail "flag --$flag: unknown, or --NAME=VALUE where --NAME is meant, or the reverse; see --help"
    printf -v "$flag" '%s' "$3"
}

need() { # flags that must have been given
    local flag
    for flag in "$@"; do
        [[ -n ${!flag} ]] || fail "--$flag is missing; see --help"
    done
}

nothing_else() { # neither words nor a command
    ((${#words[@]} + ${#command[@]} == 0)) || fail "unexpected: ${words[*]} ${command[*]}; see --help"
}

one_name() { # exactly one word, the name of a run
    ((${#words[@]} == 1)) || fail "expected the name of a run, and got: ${words[*]:-none}; see --help"
    name=${words[0]}
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "name $name: letters, digits and . _ - only"
}

is_number() { # flags whose values are whole numbers
    local flag
    for flag in "$@"; do
        [[ ${!flag} =~ ^[0-9]+$ ]] || fail "--$flag=${!flag}: expected a whole number"
    done
}

quoted() { # words as a line for a shell
    local word line=()
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
    done
    printf '%s\n' "${line[*]}"
}

run() {
    if [[ -n $dry_run ]]; then quoted "$@"; else "$@"; fi
}
