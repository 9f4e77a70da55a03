#!/bin/bash
# What the programs take, what their --help says, and what their man pages say are the same.
# usage: tests/proc_manual.sh   SIDEKV_BIN: see process.sh
. "$(dirname "$0")/process.sh"
cd "$(dirname "$0")/.." || exit 1
bin=$(realpath "$bin") sidekv=$bin/sidekv

# options SOURCE: the names that its getopt_long() takes
options() { sed -n 's/^.*{"\([a-z-]*\)", \(no\|required\)_argument, .*/--\1/p' "$1" | sort -u; }
# named: the options that the text on stdin speaks of, a man page's too
named() { sed 's/\\f[BRI]//g; s/\\-/-/g' | grep -oE '(^|[^a-z-])--[a-z][a-z-]*' | grep -oE '\-\-.*' | sort -u; }
# same NAME FILE FILE: says what stands in one of two lists alone
same() {
    diff "$2" "$3" >"$work/out"
    status=$?
    ok "$1" [ "$status" = 0 ]
}
# entries PAGE: the lines that begin an entry in its chapters of commands and options
entries() { sed -n '/^\.SH \(OPTIONS\|COMMANDS\)/,/^\.SH [^OC]/p' "man/$1" | sed 's/\\f[BRI]//g' | grep -A1 '^\.TP' | grep -v '^\.TP\|^--$'; }
# speaks NAME PAGE: the options that its help speaks of, and those with an entry in its man page, are those that it takes, in
# $work/takes
speaks() {
    named <"$work/help" >"$work/said"
    same "$1: --help names the options that it takes" "$work/takes" "$work/said"
    entries "$2" | named >"$work/said"
    same "$1: its man page has an entry for each" "$work/takes" "$work/said"
}

options daemon/options.c >"$work/takes"
"$bin/sidekvd" --help >"$work/help"
speaks sidekvd sidekvd.8
options client/cli_replay.c >"$work/takes"
"$sidekv" replay --help >"$work/help"
speaks "sidekv replay" sidekv-replay.1
cat client/cli_*.c | grep -oE 'getenv\("[A-Z_]*' | sed 's/.*"//' | sort >"$work/takes"
sed -n '/^\.SH ENVIRONMENT/,/^\.SH [^E]/s/^\.B \([A-Z_]*\)$/\1/p' man/sidekv-replay.1 | sort | comm -13 - "$work/takes" >"$work/said"
ok "sidekv replay: its man page has what it looks at of the environment" [ -s "$work/takes" -a ! -s "$work/said" ]
options client/cli_main.c >"$work/takes"
commands=$(sed -n '/} commands\[\]/,/^};/s/^ *{"\([a-z]*\)", .*/\1/p' client/cli_main.c)
"$sidekv" --help >"$work/help"
for command in $(echo "$commands" | grep -v replay); do
    "$sidekv" help "$command" >>"$work/help"
done
speaks sidekv sidekv.1

echo "$commands" | sort >"$work/takes"
"$sidekv" --help | sed -n '/^commands:/,/^$/s/^  \([a-z]*\) .*/\1/p' | sort >"$work/said"
same "sidekv: --help names the commands that it takes" "$work/takes" "$work/said"
entries sidekv.1 |
    sed -n 's/^\(\.[BIR]* \)\{0,1\}\([a-z][a-z]*\).*/\2/p' | sort >"$work/said"
same "sidekv: its man page has an entry for each" "$work/takes" "$work/said"
for command in $(echo "$commands" | grep -v replay); do # the line that its --help begins with, and the entry's first
    "$sidekv" help "$command" | sed -n '1s/^usage: sidekv //p' | named >"$work/takes"
    entries sidekv.1 | grep -E "^(\.[BIR]* )?$command( |\$)" | named | grep -v -- --count >"$work/said"
    same "sidekv $command: its line in the man page has the options of its help" "$work/takes" "$work/said"
done

# The README's commands are for programs that take what they are given.
cat daemon/options.c client/cli_main.c client/cli_replay.c >"$work/sources"
options "$work/sources" >"$work/takes"
grep -E 'bin/sidekv|`--' README.md | sed 's/pkg-config.*//' | named | comm -23 - "$work/takes" >"$work/said"
ok "the README names no option that there is not" [ ! -s "$work/said" ]

# members: of a JSON object on stdin, and of those in it
members() { grep -oE '"[a-z_0-9]+": ?' | tr -d '": ' | sort -u; }
replay --generate --users 2 --events-total 32 --compare --json
tail -1 "$work/out" >"$work/json"
members <"$work/json" >"$work/takes"
sed -n '/^\.SH OUTPUT/,/^\.SH EXIT/p' man/sidekv-replay.1 | grep -oE '[a-z_0-9]+' | sort -u | comm -13 - "$work/takes" >"$work/said"
ok "sidekv replay: its man page has every member of its JSON" [ "$(wc -l <"$work/takes")" -gt 40 -a ! -s "$work/said" ]
finish
