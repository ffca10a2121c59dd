# Build the provider index where the provider has no Python 3.6: what indexer.py does, in POSIX sh.
#
# The consumer puts assignments before this text (MDBACKUP_CHROOT, _INDEX, _ID, _NICE, _XDEV, _IGNORED) and a
# "set --" of the sources, each quoted, and after it a line that calls main or serve. It sends all that to the
# standard input of a shell, or it is installed as a file. Nothing runs before the last line has arrived.
#
# Same output, exit status and index as indexer.py, with these differences: everything is hashed each time, one
# file after the other; a build waits for another one, also of the same request; entries whose names must be
# escaped come after all others; a file that changes while it is hashed is not hashed again; and a directory that
# somebody replaces by a symlink between the listing and the hashing is followed, also out of the chroot.
#
# Needs the usual tools (GNU, busybox or BSD), xargs with -0 among them. Names with LF, CR or backslash, which the
# tools do not handle alike, are kept apart and travel as records that end in NUL: path NUL md5-or-reason NUL.

LC_ALL=C
export LC_ALL

newline='
'
say() {
    printf '%s\n' "$1" 2>/dev/null
}

# Reads records; writes index lines (entry, unreadable) or lines of the report (unreadable-log, error).
records() {
    od -An -v -t x1 | awk -v form="$1" '
        BEGIN {
            which = 0
            for (code = 0; code < 256; code++) {
                hex = sprintf("%02x", code)
                raw[hex] = sprintf("%c", code)
                log_text[hex] = code >= 32 && code < 127 ? raw[hex] : "\\x" hex
            }
            log_text["5c"] = "\\\\"
            for (hex in raw) index_text[hex] = raw[hex]
            index_text["5c"] = "\\\\"; index_text["0a"] = "\\n"; index_text["0d"] = "\\r"
        }
        function finish() {
            if (form == "entry") print "\\" field[1] "  " field[0]
            else if (form == "unreadable") print "# mdbackup unreadable " field[0]
            else if (form == "unreadable-log") print "mdbackup unreadable " field[0] ": " field[1]
            else print "mdbackup error " field[0] ": " field[1]
            field[0] = field[1] = ""; which = 0
        }
        {
            for (i = 1; i <= NF; i++) {
                if ($i != "00") {
                    if (form == "entry" || form == "unreadable") field[which] = field[which] index_text[$i]
                    else field[which] = field[which] log_text[$i]
                } else if (which++) finish()
            }
        }'
}

# fail PATH REASON
fail() {
    printf '%s\0%s\0' "$1" "$2" | records error 2>/dev/null
    exit 1
}

# refuse PATH REASON: note a source, or what md5sum could not read, as unreadable.
refuse() {
    printf '%s\0%s\0' "$1" "$2" >>"$work/refused" || rm -f "$work/intact"
}

check_path() {
    case $1 in
        *//* | */./* | */../* | */. | */.. | */) fail "$1" "has an empty, '.' or '..' component, write it without" ;;
        /*) ;;
        *) fail "$1" "is not an absolute path" ;;
    esac
    [ "${#1}" -le 4094 ] || fail "$1" "is too long for a path"
}

# Succeeds if a source can be walked. No component below the chroot may be a symlink.
can_walk() {
    rest=${1#/} prefix=.
    while [ -n "$rest" ]; do
        prefix=$prefix/${rest%%/*}
        case $rest in */*) rest=${rest#*/} ;; *) rest= ;; esac
        if [ -L "$prefix" ]; then
            if [ -n "$rest" ]; then refuse "$1" "lies below a symlink"; else refuse "$1" "is a symlink"; fi
            return 1
        fi
    done
    if ! [ -e "$prefix" ]; then
        refuse "$1" "does not exist"
    elif ! [ -d "$prefix" ] && ! [ -f "$prefix" ]; then
        refuse "$1" "is neither a regular file nor a directory"
    else
        return 0
    fi
    return 1
}

# lies_in_another SOURCE OTHER...: an equal one among the others counts, one that begins with "./" was walked
# through by can_walk already.
lies_in_another() {
    inner=$1
    shift
    for outer; do
        outer=${outer#.}
        case $inner in "$outer" | "${outer%/}"/*) return 0 ;; esac
    done
    return 1
}

# Run by find with many paths at a time: sorts them into plain names (descriptor 3, lines), awkward names
# (4, ended by NUL) and unreadable things (5, records). All paths begin with "./".
sort_out='
newline="
" return=$(printf "\r")
refuse() {
    name=${path#.}
    printf "%s\0%s\0" "${name:-/}" "$1" >&5 || rm -f "$MDBACKUP_WORK/intact"
}
# By opening it: some shells take it for granted that root can read everything.
can_open() {
    { :; } 2>/dev/null <"$1"
}
for path; do
    # Nor the index itself, nor what any build keeps beside it.
    [ "$path" = ".$MDBACKUP_INDEX" ] && continue
    case $path in
        "$MDBACKUP_TEMPORARY".cache | "$MDBACKUP_TEMPORARY".lock | "$MDBACKUP_TEMPORARY".report) continue ;;
        "$MDBACKUP_TEMPORARY".stop | "$MDBACKUP_TEMPORARY".lock.d | "$MDBACKUP_TEMPORARY".lock.d/*) continue ;;
        "$MDBACKUP_TEMPORARY".*.tmp | "$MDBACKUP_TEMPORARY".*.tmp/*)
            numbers=${path#"$MDBACKUP_TEMPORARY".}
            numbers=${numbers#cache.}
            numbers=${numbers%%/*}
            numbers=${numbers%.tmp}
            case $numbers in *.*.* | *[!0-9.]* | .* | *.) ;; *.*) continue ;; esac ;;
    esac
    if [ "${#path}" -gt 4095 ]; then
        while [ "${#path}" -gt 4095 ]; do path=${path%/*}; done
        refuse "a path or name in it is too long"
    elif [ -d "$path" ]; then
        if ! [ -e "$path/." ] || ! can_open "$path"; then refuse "cannot be opened"; fi
    elif ! [ -e "$path" ]; then
        : # it is gone, or lies in a directory that may not be searched, which has been named
    elif ! can_open "$path"; then
        refuse "cannot be opened"
    else
        case $path in
            *"$newline"* | *"$return"* | *\\*) printf "%s\0" "$path" >&4 ;;
            *) printf "%s\n" "$path" >&3 ;;
        esac || rm -f "$MDBACKUP_WORK/intact"
    fi
done'

# ls gives the size in its fifth column; a name never comes before it.
hash_plain='
if [ "$MDBACKUP_MD5" = md5sum ]; then
    md5sum "$@" 2>/dev/null
else
    md5 -r "$@" 2>/dev/null | sed "s/^\(.\{32\}\) /\1  /"
fi
ls -lnd "$@" 2>/dev/null | awk "{ sum += \$5 } END { printf \"%.0f\n\", sum }" >>"$MDBACKUP_WORK/sizes"'

hash_awkward='
for path; do
    md5=$($MDBACKUP_MD5 2>/dev/null <"$path") && md5=${md5%% *}
    if [ "${#md5}" -eq 32 ]; then
        size=$(ls -lnd "$path" 2>/dev/null | awk "NR == 1 { print \$5 }")
        printf "%s\0%s\0" "${path#.}" "$md5 ${size:-0}" || rm -f "$MDBACKUP_WORK/intact"
    elif [ -e "$path" ]; then
        printf "%s\0%s\0" "${path#.}" "cannot be read" >>"$MDBACKUP_WORK/refused" || rm -f "$MDBACKUP_WORK/intact"
    fi
done'

lines() {
    cat "$@" 2>/dev/null | wc -l | tr -d ' '
}

total() {
    awk '{ sum += $1 } END { printf "%.0f", sum }' "$work/sizes" 2>/dev/null
}

seconds() {
    echo "$(($(date +%s) - started))"
}

# Whether a process runs. One that was killed is still there until its parent takes note; and a shell that has it
# in $(...) does so only when nobody holds its output open any more, not even a heartbeat.
is_alive() {
    kill -0 "$1" 2>/dev/null || return 1
    case $(cat "/proc/$1/stat" 2>/dev/null) in *") Z "*) return 1 ;; esac
}

# Ends with this shell even if that is killed; holds none of its output open, or the caller would wait for it.
heartbeat() {
    beats=0
    while sleep 5 >/dev/null 2>&1 && is_alive $$ && [ -d "$work" ]; do
        beats=$((beats + 1))
        echo "$beats" >"$lock/beats"
        hashed=$(lines "$work/hashed")
        say "mdbackup progress files=$hashed bytes=$(total) hashed=$hashed seconds=$(seconds)"
    done
}

# Waits for a line "stop", and then interrupts this shell. A block at a time, since a line may never end.
listen() {
    line=
    while block=$(dd bs=4096 count=1 2>/dev/null <&3 | tr -d '\000'; echo .) && [ "$block" != . ]; do
        line=$line${block%.}
        case $newline$line in *"${newline}stop$newline"*) kill -s USR1 $$ && return ;; esac
        line=${line##*"$newline"}
        [ "${#line}" -le 10 ] || line=..........
    done
}

# Ends whatever this shell has started and what that has started, which a signal to one of them would not.
end_descendants() {
    # The ps of busybox takes no -A, and shows all.
    descendants=$({ ps -A -o pid= -o ppid= 2>/dev/null || ps -o pid,ppid 2>/dev/null; } | awk -v top=$$ '
        { above[$1 + 0] = $2 + 0 }
        END {
            for (one in above) {
                at = one + 0
                for (step = 0; step < 100 && at != top && at > 1; step++) at = above[at]
                if (at == top && one != top) print one
            }
        }')
    for process in $beat $listener $builder $descendants; do
        kill "$process" 2>/dev/null
    done
}

clean_up() {
    trap '' INT TERM USR1
    end_descendants
    rm -rf "$work"
    rm -rf "$lock"
}

# take_lock: makes the directory that only one build can make. One that a killed build left is known by that its
# process is gone, or else by that nothing in it has changed for half a minute.
take_lock() {
    reminded=-60 waited=0 since=0 seen=
    while ! mkdir -m 700 "$lock" 2>/dev/null; do
        [ -d "$directory" ] && [ -w "$directory" ] ||
            fail "$index" "its directory cannot be written (the index account must be able to)"
        mark="$(cat "$lock/holder" "$lock/beats" 2>/dev/null)"
        [ "$mark" = "$seen" ] || since=$waited
        seen=$mark
        if is_gone || [ $((waited - since)) -ge 30 ]; then
            break_lock
            since=$waited
            continue
        fi
        if [ $((waited - reminded)) -ge 60 ]; then
            say "mdbackup waiting another build of this index is running; then a new one begins"
            reminded=$waited
        fi
        sleep 1 >/dev/null 2>&1 &
        wait $!
        waited=$((waited + 1))
    done
    printf '%s %s %s\n%s\n' "$$" "$(id -u)" "$(uname -n)" "$MDBACKUP_ID" >"$lock/holder"
}

# Whether the process that the holder of the lock told of is known not to exist.
is_gone() {
    holder=${seen%%"$newline"*}
    pid=${holder%% *}
    case $pid in '' | *[!0-9]*) return 1 ;; esac
    [ "$holder" = "$pid $(id -u) $(uname -n)" ] && ! is_alive "$pid"
}

# Only one can make the directory inside; and what that is made in must still be the lock that was judged.
break_lock() {
    if mkdir "$lock/breaking" 2>/dev/null; then
        if [ "$(cat "$lock/holder" "$lock/beats" 2>/dev/null)" = "$seen" ]; then
            mv "$lock" "$MDBACKUP_TEMPORARY.$$.0.tmp" && rm -rf "$MDBACKUP_TEMPORARY.$$.0.tmp"
        else
            rmdir "$lock/breaking"
        fi
    else
        rmdir "$lock/breaking" 2>/dev/null
    fi
}

# What killed builds left; only directories, the files are of builds with Python.
remove_left_overs() {
    for left in "$MDBACKUP_TEMPORARY".*.tmp; do
        numbers=${left#"$MDBACKUP_TEMPORARY".}
        numbers=${numbers%.tmp}
        case $numbers in *.*.* | *[!0-9.]* | .* | *.) ;; *.*) [ ! -d "$left" ] || rm -rf "$left" ;; esac
    done
}

flush() {
    sync "$1" 2>/dev/null || sync
}

list_files() {
    # One after the other, because the find of busybox takes -xdev to mean the filesystems of all of them.
    for source; do
        find "$source" $MDBACKUP_XDEV \( -type d -o -type f \) -exec sh -c "$sort_out" sort_out {} + \
            3>>"$work/plain" 4>>"$work/awkward" 5>>"$work/refused" 2>"$work/complaints"
        status=$?
        # It complains of what it cannot read; without a word it only fails if it was killed.
        if [ "$status" -gt 125 ] || { [ "$status" -ne 0 ] && ! [ -s "$work/complaints" ]; }; then
            fail "$index" "find ended with status $status"
        fi
        # Names that find could not even tell are not missed silently: then the source does not count as complete.
        if grep -v -e 'Permission denied$' -e 'No such file or directory$' "$work/complaints" >/dev/null; then
            path=${source#.}
            refuse "${path:-/}" "find: $(head -n 1 "$work/complaints" | tr ':' ',')"
        fi
    done
    sort -u -o "$work/plain" "$work/plain" || fail "$index" "the list of files cannot be sorted, is the disk full?"
}

hash_files() {
    if [ -s "$work/plain" ]; then
        # In groups, so that progress can be told and no line gets too long.
        tr '\n' '\0' <"$work/plain" | xargs -0 -n 100 sh -c "$hash_plain" hash_plain >"$work/hashed"
        # A name that stands there once was not hashed. No line may be of a name that was never listed: it would
        # be one that was cut short because the disk is full.
        cut -b 35- "$work/hashed" | sort -o "$work/both" - "$work/plain" || rm -f "$work/intact"
        uniq -u "$work/both" | while IFS= read -r path; do
            [ ! -f "$path" ] || refuse "${path#.}" "cannot be read"
        done
        [ "$(uniq -d "$work/both" | wc -l)" -eq "$(lines "$work/hashed")" ] || rm -f "$work/intact"
        sed 's/^\(.\{32\}  \)\./\1/' "$work/hashed" >"$work/entries" || rm -f "$work/intact"
    fi
    if [ -s "$work/awkward" ]; then
        xargs -0 sh -c "$hash_awkward" hash_awkward <"$work/awkward" >"$work/records" ||
            rm -f "$work/intact"
        records entry <"$work/records" | sort -u >"$work/sized" || rm -f "$work/intact"
        cut -d ' ' -f 2 "$work/sized" >>"$work/sizes"
        sed 's/ [0-9]*  /  /' "$work/sized" >"$work/awkward-entries" || rm -f "$work/intact"
    fi
}

write_index() {
    records unreadable <"$work/refused" | sort -u >"$work/unreadable" || rm -f "$work/intact"
    files=$(lines "$work/entries" "$work/awkward-entries")
    unreadable=$(lines "$work/unreadable")
    bytes=$(total)
    {
        printf '# mdbackup started %s\n' "$started" &&
            cat "$work/entries" "$work/awkward-entries" "$work/unreadable" &&
            printf '# mdbackup end format=1 files=%s unreadable=%s bytes=%s\n' "$files" "$unreadable" "$bytes"
    } >"$work/index" && chmod 644 "$work/index" && flush "$work/index" &&
        [ -e "$work/intact" ] && mv -f "$work/index" ".$index" && flush "$directory" ||
        fail "$index" "cannot be written (is the disk full?)"
}

build() {
    # The sources that can be walked replace the sources that were given, one round through all of them.
    for source; do
        shift
        # With -xdev find may not come by one that lies in another; by one that it does, it comes twice.
        if can_walk "$source" && { [ -n "$MDBACKUP_XDEV" ] || ! lies_in_another "$source" "$@"; }; then
            if [ "$source" = / ]; then set -- "$@" .; else set -- "$@" ".$source"; fi
        fi
    done
    list_files "$@"
    hash_files
    write_index

    records unreadable-log <"$work/refused" | sort -u 2>/dev/null | head -n 20 2>/dev/null
    counts="files=$files bytes=$bytes hashed=$files unreadable=$unreadable rotten=0"
    say "mdbackup done $counts seconds=$(seconds).0"
    [ "$unreadable" -eq 0 ] || exit 3
    exit 0
}

main() {
    # Else a file that is opened later takes the place of a closed standard output, and gets the report.
    { : >&1; } 2>/dev/null || exec >/dev/null
    umask 022
    trap '' HUP PIPE
    tools="awk cat chmod cut date dd find grep head id ls mkdir mv od rm rmdir sed sort sync tr uname uniq wc xargs"
    for tool in $tools; do
        if ! command -v "$tool" >/dev/null; then
            say "mdbackup error the provider has no program $tool, nor Python 3.6 or newer: install either"
            exit 1
        fi
    done
    if command -v md5sum >/dev/null; then
        MDBACKUP_MD5=md5sum
    elif command -v md5 >/dev/null; then
        MDBACKUP_MD5="md5 -r"
    else
        say "mdbackup error the provider has no program md5sum, nor Python 3.6 or newer: install either"
        exit 1
    fi
    index=$MDBACKUP_INDEX started=$(date +%s) beat= listener= builder=
    check_path "$index"
    [ $# -gt 0 ] || fail "$index" "no source is given, name at least one directory"
    for source; do
        [ "$source" = / ] || check_path "$source"
    done
    cd "${MDBACKUP_CHROOT%/}/" || fail "$MDBACKUP_CHROOT" "the chroot is not a directory on the provider"
    [ "$MDBACKUP_NICE" -eq 0 ] || renice -n "$MDBACKUP_NICE" -p $$ >/dev/null 2>&1
    [ -z "$MDBACKUP_IGNORED" ] || say "mdbackup note without Python on the provider there is no $MDBACKUP_IGNORED"

    directory=.${index%/*}
    MDBACKUP_TEMPORARY=$directory/.${index##*/}
    work=$MDBACKUP_TEMPORARY.$$.$started.tmp
    lock=$MDBACKUP_TEMPORARY.lock.d
    MDBACKUP_WORK=$work
    export MDBACKUP_INDEX MDBACKUP_TEMPORARY MDBACKUP_WORK MDBACKUP_MD5
    rest=${index#/} prefix=.
    while :; do
        case $rest in */*) prefix=$prefix/${rest%%/*} rest=${rest#*/} ;; *) break ;; esac
        [ ! -L "$prefix" ] || fail "${prefix#.}" "must be a directory, not a symlink, to hold the index"
    done
    [ ! -d ".$index" ] || fail "$index" "is a directory, and must be a file or missing"
    mkdir -p "$directory" || fail "$index" "its directory cannot be written (the index account must be able to)"

    # First its children, so that no progress is reported behind the end.
    trap 'trap "" INT TERM USR1; end_descendants; fail "$index" "stopped by a signal"' INT TERM
    trap 'trap "" INT TERM USR1; end_descendants; say "mdbackup error stopped on request"; exit 1' USR1
    # Holding none of our output, since without ps what it waits for outlives this shell. By exec, because the
    # shell keeps what a function's redirections replace.
    {
        exec >/dev/null 2>&1
        listen
    } &
    listener=$!
    # Not the lock's: that is another build's until it is taken.
    trap 'trap "" INT TERM USR1; end_descendants' EXIT
    take_lock
    trap clean_up EXIT
    remove_left_overs
    started=$(date +%s)
    mkdir -m 700 "$work" || fail "$index" "its directory cannot be written (the index account must be able to)"
    for file in plain awkward refused sizes intact entries awkward-entries hashed; do
        : >"$work/$file" || fail "$index" "cannot be written (is the disk full?)"
    done
    heartbeat &
    beat=$!
    # Beside this shell, which so can be interrupted whatever the tools are doing.
    build "$@" &
    builder=$!
    wait "$builder"
    exit
}

# As a forced command: nothing counts of the request but that it is there, and its id.
serve() {
    if [ "$MDBACKUP_ASKED" = --no-request ]; then
        main "$@" 3</dev/null </dev/null
    fi
    say "mdbackup ready request"
    (
        sleep 30 >/dev/null 2>&1
        say "mdbackup error no request came within 30 seconds"
        kill $$
    ) &
    timer=$!
    request=
    while :; do
        case $request in *"$newline"*) break ;; esac
        block=$(exec 2>/dev/null; dd bs=65536 count=1 | tr -d '\000'; echo .)
        if [ "$block" = . ] || [ "${#request}" -gt 1048576 ]; then
            kill $timer
            say "mdbackup error standard input ended, or went on and on, without a line with the request"
            exit 1
        fi
        request=$request${block%.}
    done
    kill $timer
    case ${request#*"$newline"} in
        stop"$newline"*)
            say "mdbackup error stopped on request"
            exit 1 ;;
    esac
    case $request in
        '{"id": "'*'", "chroot": '*)
            MDBACKUP_ID=${request#'{"id": "'}
            MDBACKUP_ID=${MDBACKUP_ID%%'", "chroot": '*} ;;
        '{'*'}'*) ;;
        *)
            say "mdbackup error the request is not understood"
            exit 1 ;;
    esac
    case $MDBACKUP_ID in *[!\ -~]*) MDBACKUP_ID= ;; esac
    main "$@" 3<&0 </dev/null
}
