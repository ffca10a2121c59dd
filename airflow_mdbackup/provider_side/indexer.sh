# Build the provider index where the provider has no Python 3.6: what the Python indexer does, in POSIX sh.
#
#     list    find passes paths to `visit`, which writes the list of files, and hashes those with awkward names
#     hash    xargs passes 100 paths of the list at a time to `hash`
#     write   the index under a temporary name, renamed into place at the end
#
# Same output, exit status and index as the Python indexer, with these differences: every file is hashed each time,
# one after the other; a build waits for any other one, also of the same request; awkward names come last in the
# index; a file that changes while it is hashed is not hashed again; and a directory that somebody replaces by a
# symlink between the listing and the hashing is followed, even out of the chroot.
#
# Needs the usual tools (GNU, busybox or BSD), with xargs -0. Awkward names are those with LF, CR or backslash, which
# the tools treat differently. A path begins with "./" where it is opened, and with "/" where it is written.
#
# The consumer puts assignments (MDBACKUP_CHROOT, _INDEX, _NICE, _XDEV, _IGNORED) and a "set --" of the sources before
# this text, and a line that calls main or serve behind it. Nothing runs before that line has arrived.

LC_ALL=C
export LC_ALL
newline='
'

say() { printf 'mdbackup %s\n' "$1" 2>/dev/null; }

fail() { # PATH REASON
    say "error $(escape report "$1"): $2"
    exit 1
}

# --- what the shells that find and xargs start need, too: so it is text ---

# From od's bytes in hex: for form=index, LF, CR and backslash are escaped, else whatever is not printable ASCII.
MDBACKUP_ESCAPE='
BEGIN {
    for (code = 1; code < 256; code++) {
        hex = sprintf("%02x", code)
        text[hex] = form == "index" || (code >= 32 && code < 127) ? sprintf("%c", code) : "\\x" hex
    }
    text["5c"] = "\\\\"
    if (form == "index") { text["0a"] = "\\n"; text["0d"] = "\\r" }
}
{ for (i = 1; i <= NF; i++) printf "%s", text[$i] }'

# No index is written without the file "intact": it is removed if something cannot be written, as on a full disk.
functions='
escape() { printf "%s" "$2" | od -An -v -t x1 | awk -v form="$1" "$MDBACKUP_ESCAPE"; } # FORM PATH
refuse() { # PATH REASON: a line for the report, TAB, a line for the index
    shown=$1 entry=$1
    case $1 in *[!\ -~]* | *\\*) shown=$(escape report "$1") entry=$(escape index "$1") ;; esac
    printf "mdbackup unreadable %s: %s\t# mdbackup unreadable %s\n" "$shown" "$2" "$entry" \
        >>"$MDBACKUP_WORK/refused" || rm -f "$MDBACKUP_WORK/intact"
}
'
eval "$functions"

visit=$functions'
newline="
" return=$(printf "\r")
can_open() { { :; } 2>/dev/null <"$1"; } # some shells assume that root can read everything
for path; do
    name=${path#.}
    name=${name:-/}
    [ "$name" != "$MDBACKUP_INDEX" ] || continue
    case ${path#"$MDBACKUP_OWN"} in # what any build keeps beside the index
        .cache | .lock | .report | .stop | .lock.d | .lock.d/* | .cache.[0-9]*[0-9].tmp) continue ;;
        .*[!0-9.]*.tmp | .*[!0-9.]*.tmp/* | .*.*.*.tmp | .*.*.*.tmp/*) ;;
        .[0-9]*.[0-9]*.tmp | .[0-9]*.[0-9]*.tmp/*) continue ;;
    esac
    if [ "${#path}" -gt 4095 ]; then
        while [ "${#path}" -gt 4095 ]; do path=${path%/*}; done
        refuse "${path#.}" "a path or name in it is too long"
    elif [ -d "$path" ]; then
        if ! [ -e "$path/." ] || ! can_open "$path"; then refuse "$name" "cannot be opened"; fi
    elif ! [ -e "$path" ]; then
        : # deleted, or in a directory that cannot be entered, which is refused itself
    elif ! can_open "$path"; then
        refuse "$name" "cannot be opened"
    else
        case $path in
            *"$newline"* | *"$return"* | *\\*)
                md5=$($MDBACKUP_MD5 2>/dev/null <"$path") &&
                    size=$(ls -lnd "$path" 2>/dev/null | awk "NR == 1 { print \$5 }") && [ -n "$size" ] &&
                    printf "%s \\\\%s  %s\n" "$size" "${md5%% *}" "$(escape index "$name")" >&4 ||
                    [ ! -e "$path" ] || refuse "$name" "cannot be read" ;;
            *) printf "%s\n" "$name" >&3 || rm -f "$MDBACKUP_WORK/intact" ;;
        esac
    fi
done'

# ls prints the size in the fifth column.
hash='
[ $# -gt 0 ] || exit 0
lines=$($MDBACKUP_MD5 "$@" 2>/dev/null)
{ [ -z "$lines" ] || printf "%s\n" "$lines"; } &&
    ls -lnd "$@" 2>/dev/null | awk "{ sum += \$5 } END { printf \"%.0f\n\", sum }" >>"$MDBACKUP_WORK/sizes"'

# --- the build ---

lines() { cat "$@" 2>/dev/null | wc -l | tr -d ' '; }
total() { awk '{ sum += $1 } END { printf "%.0f", sum }' "$work/sizes" 2>/dev/null; }
seconds() { echo "$(($(date +%s) - started))"; }
flush() { sync "$1" 2>/dev/null || sync; }

check_path() {
    case $1 in
        *//* | */./* | */../* | */. | */.. | */) fail "$1" "has an empty, '.' or '..' component, remove it" ;;
        /*) ;;
        *) fail "$1" "is not an absolute path" ;;
    esac
    [ "${#1}" -le 4094 ] || fail "$1" "is too long for a path"
}

# Sets `at` to the first part of a path that is a symlink, or to all of it, and `rest` to what follows.
find_symlink() {
    at=. rest=${1#/}
    while [ -n "$rest" ] && [ ! -L "$at" ]; do
        at=$at/${rest%%/*}
        case $rest in */*) rest=${rest#*/} ;; *) rest= ;; esac
    done
}

can_walk() { # SOURCE
    find_symlink "$1"
    if [ -L "$at" ] && [ -n "$rest" ]; then why="lies below a symlink"
    elif [ -L "$at" ]; then why="is a symlink"
    elif ! [ -e "$at" ]; then why="does not exist"
    elif ! [ -d "$at" ] && ! [ -f "$at" ]; then why="is neither a regular file nor a directory"
    else return 0
    fi
    refuse "$1" "$why"
    return 1
}

list_files() { # SOURCE
    status=0
    find ".${1%/}" $MDBACKUP_XDEV \( -type d -o -type f \) -exec sh -c "$visit" visit {} + \
        3>>"$work/list" 4>>"$work/awkward" 2>"$work/complaints" || status=$?
    # It complains of what it cannot read; if it fails without a word, something killed it.
    if [ "$status" -gt 125 ] || { [ "$status" -ne 0 ] && ! [ -s "$work/complaints" ]; }; then
        problem="find ended with status $status"
        exit 1
    fi
    # Other complaints are of names that find cannot even pass on: then the source is incomplete.
    if grep -v -e 'Permission denied$' -e 'No such file or directory$' "$work/complaints" >/dev/null; then
        refuse "$1" "$(escape report "find: $(head -n 1 "$work/complaints" | tr ':' ',')")"
    fi
}

build() { # SOURCE...
    problem="cannot be written (is the disk full?)"
    trap '[ -z "$problem" ] || fail "$index" "$problem"' EXIT
    set -e
    for source; do
        # One at a time: the find of busybox takes -xdev to mean the filesystems of all of them.
        if can_walk "$source"; then list_files "$source"; fi
    done
    sort -u -o "$work/list" "$work/list"
    sed 's/^/./' "$work/list" | tr '\n' '\0' | xargs -0 -n 100 sh -c "$hash" hash >"$work/hashed"
    # md5 -r writes one blank, md5sum two.
    sed 's/^\(.\{32\}\) *\./\1  /' "$work/hashed" >"$work/entries"
    cut -b 35- "$work/entries" | sort -o "$work/both" - "$work/list"
    uniq -u "$work/both" | while IFS= read -r path; do
        [ ! -f ".$path" ] || refuse "$path" "cannot be read"
    done
    sort -u -o "$work/awkward" "$work/awkward"
    cut -d ' ' -f 1 "$work/awkward" >>"$work/sizes"
    cut -d ' ' -f 2- "$work/awkward" >>"$work/entries"
    sort -u -o "$work/refused" "$work/refused"
    cut -f 2- "$work/refused" | sort -u -o "$work/unreadable"
    files=$(lines "$work/entries") unreadable=$(lines "$work/unreadable") bytes=$(total)
    echo "# mdbackup started $started" >"$work/index"
    cat "$work/entries" "$work/unreadable" >>"$work/index"
    echo "# mdbackup end format=1 files=$files unreadable=$unreadable bytes=$bytes" >>"$work/index"
    chmod 644 "$work/index"
    flush "$work/index"
    [ -e "$work/intact" ]
    mv -f "$work/index" ".$index"
    flush "$directory"
    problem=
    set +e
    cut -f 1 "$work/refused" | head -n 20 2>/dev/null
    say "done files=$files bytes=$bytes hashed=$files unreadable=$unreadable rotten=0 seconds=$(seconds).0"
    [ "$unreadable" -eq 0 ] || exit 3
    exit 0
}

# --- one build at a time; progress, and the end ---

# A process that was killed exists until its parent takes note, which may be waiting for its heartbeat to end.
is_alive() {
    kill -0 "$1" 2>/dev/null || return 1
    case $(cat "/proc/$1/stat" 2>/dev/null) in *") Z "*) return 1 ;; esac
}

# Ends with this shell even if that is killed, and holds none of its output open.
heartbeat() {
    while sleep 5 >/dev/null 2>&1 && is_alive $$ && [ -d "$work" ]; do
        date +%s >"$lock/beats"
        hashed=$(lines "$work/hashed" "$work/awkward")
        say "progress files=$hashed bytes=$(total) hashed=$hashed seconds=$(seconds)"
    done
}

# A line without end ends this process, at the limit of its memory, and nothing else.
listen() {
    exec >/dev/null 2>&1
    ulimit -v 200000
    while IFS= read -r line; do
        [ "$line" != stop ] || kill -s USR1 $$
    done <&3
}

lock_state() { cat "$lock/holder" "$lock/beats" 2>/dev/null; }

# The directory $lock can be made by one build only. If its process is gone, or nothing in it has changed for half a
# minute, its build was killed.
take_lock() {
    waited=0 changed=0 seen=
    while ! mkdir -m 700 "$lock" 2>/dev/null; do
        [ -d "$directory" ] && [ -w "$directory" ] || fail "$index" "$no_access"
        state=$(lock_state)
        [ "$state" = "$seen" ] || changed=$waited
        seen=$state
        if holder_is_gone || [ $((waited - changed)) -ge 30 ]; then
            break_lock
            changed=$waited
        else
            [ $((waited % 60)) -ne 0 ] || say "waiting another build of this index is running, this one is next"
            sleep 1 >/dev/null 2>&1 &
            wait $!
            waited=$((waited + 1))
        fi
    done
    echo "$$ $(id -u) $(uname -n)" >"$lock/holder"
}

holder_is_gone() {
    read -r pid account <"$lock/holder" || return 1
    [ "$account" = "$(id -u) $(uname -n)" ] && ! is_alive "$pid"
} 2>/dev/null

# One build can make the directory inside; and the lock must still be the one that was judged.
break_lock() {
    if ! mkdir "$lock/breaking" 2>/dev/null; then
        rmdir "$lock/breaking" 2>/dev/null
    elif [ "$(lock_state)" = "$seen" ]; then
        mv "$lock" "$MDBACKUP_OWN.$$.0.tmp" && rm -rf "$MDBACKUP_OWN.$$.0.tmp"
    else
        rmdir "$lock/breaking"
    fi
}

# Ends a process and all below it: a signal to one of them would not. The ps of busybox has no -A, and shows all.
end_tree() {
    set -- "$1" $({ ps -A -o pid= -o ppid= 2>/dev/null || ps -o pid,ppid 2>/dev/null; } |
        awk -v parent="$1" '$2 == parent { print $1 }')
    kill "$1" 2>/dev/null
    shift
    for process; do end_tree "$process"; done
}

clean_up() {
    trap '' INT TERM USR1
    trap - EXIT
    end_tree $$
    kill $beat $listener $builder 2>/dev/null # where there is no ps
    [ -z "$locked" ] || rm -rf "$work" "$lock"
}

stop() { # REASON
    clean_up # first, so that no progress is reported behind the end
    say "error $1"
    exit 1
}

main() { # SOURCE...
    # Otherwise a file that is opened later could get the number of a closed standard output, and the report.
    { : >&1; } 2>/dev/null || exec >/dev/null
    umask 022
    trap '' HUP PIPE
    MDBACKUP_MD5=md5sum
    if command -v md5 >/dev/null && ! command -v md5sum >/dev/null; then MDBACKUP_MD5="md5 -r"; fi
    tools="awk cat chmod cut date find grep head id ls mkdir mv od rm rmdir sed sort sync tr uname uniq wc xargs"
    for tool in $tools "${MDBACKUP_MD5% -r}"; do
        command -v "$tool" >/dev/null && continue
        say "error the provider has no program $tool, nor Python 3.6 or newer: install either"
        exit 1
    done
    index=$MDBACKUP_INDEX started=$(date +%s) beat= listener= builder= locked=
    check_path "$index"
    [ $# -gt 0 ] || fail "$index" "no source is given, name at least one directory"
    for source; do
        [ "$source" = / ] || check_path "$source"
    done
    cd "${MDBACKUP_CHROOT%/}/" || fail "$MDBACKUP_CHROOT" "the chroot is not a directory on the provider"
    [ "$MDBACKUP_NICE" -eq 0 ] || renice -n "$MDBACKUP_NICE" -p $$ >/dev/null 2>&1
    [ -z "$MDBACKUP_IGNORED" ] || say "note without Python on the provider there is no $MDBACKUP_IGNORED"

    find_symlink "${index%/*}"
    [ ! -L "$at" ] || fail "${at#.}" "must be a directory, not a symlink, to hold the index"
    [ ! -d ".$index" ] || fail "$index" "is a directory, and must be a file or missing"
    directory=.${index%/*} no_access="its directory cannot be written (the index account must be able to)"
    mkdir -p "$directory" || fail "$index" "$no_access"
    MDBACKUP_OWN=$directory/.${index##*/}
    MDBACKUP_WORK=$MDBACKUP_OWN.$$.$started.tmp
    work=$MDBACKUP_WORK lock=$MDBACKUP_OWN.lock.d
    export MDBACKUP_INDEX MDBACKUP_OWN MDBACKUP_WORK MDBACKUP_MD5 MDBACKUP_ESCAPE

    trap 'stop "stopped by a signal"' INT TERM
    trap 'stop "stopped on request"' USR1
    trap clean_up EXIT
    listen &
    listener=$!
    take_lock
    locked=yes
    for left in "$MDBACKUP_OWN".[0-9]*.[0-9]*.tmp; do # of killed builds; files are of builds with Python
        case ${left#"$MDBACKUP_OWN"} in
            .*[!0-9.]*.tmp | .*.*.*.tmp) ;; # somebody else's
            *) [ -L "$left" ] || [ ! -d "$left" ] || rm -rf "$left" ;;
        esac
    done
    started=$(date +%s)
    mkdir -m 700 "$work" || fail "$index" "$no_access"
    for file in list awkward refused sizes intact; do
        : >"$work/$file" || fail "$index" "cannot be written (is the disk full?)"
    done
    heartbeat &
    beat=$!
    # Beside this shell, so that signals interrupt it whatever the tools are doing.
    build "$@" &
    builder=$!
    wait "$builder"
    exit
}

# As a forced command. Of the request nothing matters but that it has come.
serve() { # SOURCE...
    if [ "$MDBACKUP_ASKED" = --no-request ]; then main "$@" 3</dev/null </dev/null; fi
    say "ready request"
    {
        sleep 30 >/dev/null 2>&1
        say "error no request came within 30 seconds"
        kill $$
    } &
    timer=$!
    # One block: the rest of a longer one is read, and ignored, by what waits for "stop".
    request=$(exec 2>/dev/null; dd bs=65536 count=1 | tr -d '\000')
    kill $timer
    case $request in
        '{'*"${newline}stop" | '{'*"${newline}stop$newline"*) say "error stopped on request" ;;
        '{'*) main "$@" 3<&0 </dev/null ;;
        *) say "error the request is not understood" ;;
    esac
    exit 1
}
