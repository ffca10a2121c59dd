# Build the provider index where the provider has no Python 3.6: what indexer.py does, in POSIX sh.
#
# The consumer puts assignments of MDBACKUP_CHROOT and MDBACKUP_INDEX before this text, and a "set --" of the
# sources, each quoted, and sends it all to the standard input of a shell. Nothing runs before the last line
# has arrived. Same output, exit status and index as indexer.py, with two differences: entries whose names
# must be escaped come after all others, and a file that changes while it is hashed is not hashed again.
#
# Needs the usual tools (GNU or busybox), xargs with -0 among them. Names with LF, CR or backslash, which the
# tools do not handle alike, are kept apart and travel as records that end in NUL: path NUL md5-or-reason NUL.

LC_ALL=C
export LC_ALL

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
    # Nor the index itself, nor what this or any killed build keeps beside it.
    [ "$path" = ".$MDBACKUP_INDEX" ] && continue
    case $path in
        "$MDBACKUP_TEMPORARY".*.tmp | "$MDBACKUP_TEMPORARY".*.tmp/*)
            numbers=${path#"$MDBACKUP_TEMPORARY".}
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
md5sum "$@" 2>/dev/null
ls -lnd "$@" 2>/dev/null | awk "{ sum += \$5 } END { printf \"%.0f\n\", sum }" >>"$MDBACKUP_WORK/sizes"'

hash_awkward='
for path; do
    md5=$(md5sum 2>/dev/null <"$path") && md5=${md5%% *}
    if [ "${#md5}" -eq 32 ]; then
        printf "%s\0%s\0" "${path#.}" "$md5" || rm -f "$MDBACKUP_WORK/intact"
        ls -lnd "$path" 2>/dev/null | awk "NR == 1 { print \$5 }" >>"$MDBACKUP_WORK/sizes"
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

# Ends with this shell even if that is killed; holds none of its output open, or the caller would wait for it.
heartbeat() {
    while sleep 5 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null && [ -d "$work" ]; do
        say "mdbackup progress files=$(lines "$work/hashed") bytes=$(total) seconds=$(seconds)"
    done
}

clean_up() {
    [ -z "$beat" ] || kill "$beat" 2>/dev/null
    rm -rf "$work"
}

list_files() {
    if [ $# -gt 0 ]; then
        find "$@" \( -type d -o -type f \) -exec sh -c "$sort_out" sort_out {} + \
            3>"$work/plain" 4>"$work/awkward" 5>>"$work/refused" 2>"$work/complaints"
        status=$?
        # It complains of what it cannot read; without a word it only fails if it was killed.
        if [ "$status" -gt 125 ] || { [ "$status" -ne 0 ] && ! [ -s "$work/complaints" ]; }; then
            fail "$index" "find ended with status $status"
        fi
        # Names that find could not even tell are not missed silently: then no source counts as complete.
        if grep -v -e 'Permission denied$' -e 'No such file or directory$' "$work/complaints" >/dev/null; then
            for path; do
                path=${path#.}
                refuse "${path:-/}" "find: $(head -n 1 "$work/complaints" | tr ':' ',')"
            done
        fi
    fi
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
        records entry <"$work/records" | sort -u >"$work/awkward-entries" || rm -f "$work/intact"
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
    } >"$work/index" && chmod 644 "$work/index" && sync "$work/index" &&
        [ -e "$work/intact" ] && mv -f "$work/index" ".$index" && sync "$directory" ||
        fail "$index" "cannot be written (is the disk full?)"
}

main() {
    # Else a file that is opened later takes the place of a closed standard output, and gets the report.
    { : >&1; } 2>/dev/null || exec >/dev/null
    umask 022
    trap '' HUP PIPE
    for tool in awk chmod cut date find grep head ls md5sum mkdir mv od rm sed sort sync tr uniq wc xargs; do
        if ! command -v "$tool" >/dev/null; then
            say "mdbackup error the provider has no program $tool, nor Python 3.6 or newer: install either"
            exit 1
        fi
    done
    index=$MDBACKUP_INDEX started=$(date +%s) beat=
    check_path "$index"
    [ $# -gt 0 ] || fail "$index" "no source is given, name at least one directory"
    for source; do
        [ "$source" = / ] || check_path "$source"
    done
    cd "${MDBACKUP_CHROOT%/}/" || fail "$MDBACKUP_CHROOT" "the chroot is not a directory on the provider"

    directory=.${index%/*}
    MDBACKUP_TEMPORARY=$directory/.${index##*/}
    work=$MDBACKUP_TEMPORARY.$$.$started.tmp
    MDBACKUP_WORK=$work
    export MDBACKUP_INDEX MDBACKUP_TEMPORARY MDBACKUP_WORK
    rest=${index#/} prefix=.
    while :; do
        case $rest in */*) prefix=$prefix/${rest%%/*} rest=${rest#*/} ;; *) break ;; esac
        [ ! -L "$prefix" ] || fail "${prefix#.}" "must be a directory, not a symlink, to hold the index"
    done
    [ ! -d ".$index" ] || fail "$index" "is a directory, and must be a file or missing"
    mkdir -p "$directory" && mkdir -m 700 "$work" ||
        fail "$index" "its directory cannot be written (the index account must be able to)"
    trap clean_up EXIT
    trap 'fail "$index" "stopped by a signal"' INT TERM
    for file in plain awkward refused sizes intact entries awkward-entries hashed; do
        : >"$work/$file" || fail "$index" "cannot be written (is the disk full?)"
    done
    heartbeat &
    beat=$!

    # The sources that can be walked replace the sources that were given, one round through all of them.
    for source; do
        shift
        if can_walk "$source" && ! lies_in_another "$source" "$@"; then
            if [ "$source" = / ]; then set -- "$@" .; else set -- "$@" ".$source"; fi
        fi
    done
    list_files "$@"
    hash_files
    write_index

    records unreadable-log <"$work/refused" | sort -u 2>/dev/null | head -n 20 2>/dev/null
    say "mdbackup done files=$files bytes=$bytes hashed=$files unreadable=$unreadable seconds=$(seconds).0"
    [ "$unreadable" -eq 0 ] || exit 3
    exit 0
}

main "$@" </dev/null; exit
