#!/bin/bash
# The unit of contrib/ under a real systemd, whose fd store holds the pool while keeper, daemon or both are killed: a private systemd,
# PID 1 of namespaces of its own, on the first GPU or else the host. Skips where there is none, or where it cannot be run.
# usage: tests/proc_systemd.sh   SIDEKV_BIN: see process.sh; SYSTEMD: the program, if need be of a Debian package that was only unpacked,
#        /tmp/systemd/lib/systemd/systemd, with the libraries that are there
. "$(dirname "$0")/process.sh"
bin=$(cd "$bin" && pwd)
sidekv=$bin/sidekv socket=/run/sidekv/sidekv.sock
unshared="" init="" cgroup=sidekv-test.$$
skip() {
    echo "SKIPPED proc_systemd: $1"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
}

# ---- a systemd of our own ----

for systemd in ${SYSTEMD:-/usr/lib/systemd/systemd /lib/systemd/systemd}; do [ -x "$systemd" ] && break; done
[ -x "$systemd" ] || skip "no systemd on this machine ($systemd)"
[ "$(id -u)" = 0 ] || skip "namespaces and mounts need root"
root=${systemd%/lib/systemd/systemd}
root=${root%/usr}
libraries="" # what it needs, where it is not the machine's
[ -z "$root" ] || libraries=LD_LIBRARY_PATH=$(echo "$root"/lib/*-linux-gnu "$root"/usr/lib/*-linux-gnu "$root"/usr/lib/*-linux-gnu/systemd | tr ' ' :)

# What it mounts ends with the namespace, and all its processes with PID 1; its cgroups do not.
clean_up() {
    kill -KILL "${init:-$unshared}"
    wait
    unshare --mount sh -c "mount -t cgroup2 none $work/cgroup && cd $work/cgroup && for _ in 1 2 3 4 5; do
        [ ! -d $cgroup ] || find $cgroup -depth -type d -exec rmdir {} + || sleep 0.2; done"
    rm -rf "$work"
} 2>/dev/null

mkdir -p "$work"/cgroup "$work"/lib "$work"/default "$work"/prefix/sbin "$work"/units/sidekvd.service.d
touch "$work/kmsg" "$work/log" "$work/init"
ln -s "$bin/sidekv-keeper" "$work/prefix/sbin"
sed "s|@PREFIX@|$work/prefix|" "$(dirname "$0")/../contrib/sidekvd.service.in" >"$work/units/sidekvd.service"
printf '[Service]\nStandardError=append:%s\n' "$work/log" >"$work/units/sidekvd.service.d/log.conf" # there is no journal
for target in sysinit basic multi-user shutdown; do echo "[Unit]" >"$work/units/$target.target"; done
{
    echo "SIDEKVD_OPTIONS=--device auto --pool-bytes 192M --store-bytes 256M"
    env | grep '^LD_LIBRARY_PATH=\|^[A-Z]*SAN_OPTIONS='
} >"$work/default/sidekvd"
# PID 1, until it is systemd. /dev is a mount then, and left as it is, GPUs and all; the machine's settings cannot be changed.
cat >"$work/enter" <<ENTER
set -e
read -r pid rest </proc/self/stat # what it is outside
echo \$pid >$work/init
mount -t proc none /proc
mount -t cgroup2 none $work/cgroup
mkdir $work/cgroup/$cgroup
echo 0 >$work/cgroup/$cgroup/cgroup.procs
umount $work/cgroup
exec unshare --cgroup sh -ec '
umount --recursive /sys/fs/cgroup 2>/dev/null || true # some kernels do not mount over it
mount -t cgroup2 none /sys/fs/cgroup
mount --rbind /dev /dev
[ ! -e /dev/kmsg ] || mount --bind $work/kmsg /dev/kmsg
for there in /etc /proc/sys; do mount --bind \$there \$there; mount -o remount,bind,ro \$there; done
mount --bind $work/default /etc/default
mount --bind $work/lib /var/lib
mount -t tmpfs none /run
exec env -i container=test PATH="$PATH" SYSTEMD_UNIT_PATH=$work/units SYSTEMD_GENERATOR_PATH=/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/none \
    $libraries $systemd --system --unit=multi-user.target --log-target=kmsg --show-status=0'
ENTER
trap clean_up EXIT
unshare --pid --fork --kill-child --mount sh "$work/enter" >"$work/out" 2>"$work/err" </dev/null &
unshared=$!
inside() { nsenter -t "$init" -p -m -- "$@"; }
systemctl() { inside env $libraries "$root/bin/systemctl" "$@"; }
is_up() {
    for _ in $(seq 200); do
        kill -0 $unshared 2>/dev/null || return
        read -r init <"$work/init"
        [ -n "$init" ] && version=$(systemctl show -P Version 2>/dev/null) && return
        sleep 0.05
    done
    return 1
}
is_up || skip "systemd does not run here: $(tail -n 1 "$work/kmsg") $(head -n 1 "$work/err")"
echo "# systemd $version"

# ---- what it is asked ----

unit() { systemctl show -P "$1" sidekvd; }
daemon_pid() { inside "$sidekv" --socket $socket ping -c 1 2>/dev/null | sed -n 's/.*process \([0-9]*\).*/\1/p'; }
count_of() { inside "$sidekv" --socket $socket stats 2>/dev/null | sed -n "s/^$1 *\([0-9]*\).*/\1/p"; }
# becomes VALUE COMMAND...: within 20 s
becomes() {
    for _ in $(seq 400); do
        [ "$("${@:2}")" = "$1" ] && return
        sleep 0.05
    done
    return 1
}
# replay OPTION...: against the unit's daemon
replay() {
    inside "$sidekv" --socket $socket replay --generate --users 40 --json "$@" >"$work/out" 2>"$work/err"
    status=$?
}
right() { [ "$status" = 0 ] && [ "$(field scores_wrong)" = 0 ] && [ "$(field rows_wrong)" = 0 ] && [ "$(field scores_checked)" -gt 0 ]; }
# dies keeper|daemon|both [COMMAND...]: killed, once the command has ended; another daemon serves, under another keeper if that one was killed
dies() {
    local keeper daemon now who
    keeper=$(unit MainPID) daemon=$(daemon_pid)
    case $1 in
    keeper) who=$keeper ;;
    daemon) who=$daemon ;;
    both) who="$keeper $daemon" ;;
    esac
    [ "$keeper" -gt 1 ] && [ -n "$daemon" ] && "${@:2}" || return
    inside sh -c "kill -KILL $who" 2>/dev/null # systemd may be faster
    for _ in $(seq 400); do
        now=$(daemon_pid)
        [ -n "$now" ] && [ "$now" != "$daemon" ] && break
        sleep 0.05
    done
    systemctl reset-failed sidekvd # systemd allows five starts in 10 s
    [ -n "$now" ] && { [ "$1" = daemon ] || [ "$(unit MainPID)" != "$keeper" ]; }
}
# dies_under_workers WHO: once both workers of a replay are connected, which goes on for longer
dies_under_workers() {
    local died
    (replay --events-total $events --batch 1 --verify 0.1; exit "$status") &
    run=$!
    dies "$1" becomes 3 count_of sessions
    died=$?
    wait $run
    status=$?
    run=""
    return $died
}

# ---- what it does ----

systemctl start sidekvd
status=$?
ok "the unit starts" [ $status = 0 ]
ok "and is ready when systemd says so" [ -n "$(daemon_pid)" ]
replay --events-total 1500 --verify 0.3
ok "two workers fill the pool" right
echo "# device $(field device)"
[ "$(field device)" = host ] && events=4000 || events=50000 # some seconds
users=$(count_of users_resident)
held=$((192 / 2 + 3)) # extents; tables, sidekvd
ok "systemd holds the pool, and no worker that has ended" becomes $held unit NFileDescriptorStore

for who in keeper both daemon; do
    ok "$who killed: another serves" dies $who
    ok "all users are in its pool" [ "$(count_of users_resident)" = "$users" ]
    ok "systemd holds it all again" becomes $held unit NFileDescriptorStore
done
replay --events-total 1500 --verify 0.3
ok "all scores and rows are right" right
ok "and nothing came from the store" [ "$(field hit_store_tokens)" = 0 ]

    for who in keeper daemon both; do
    ok "$who killed under workers: another serves" dies_under_workers $who
    ok "their scores and rows are right" right
    ok "nothing had to come from the store" [ "$(field hit_store_tokens)" = 0 ]
    ok "and they went on with it" [ "$(count_of acquires)" -gt 10 ]
done

users=$(count_of users_resident)
before=$(unit MainPID)
systemctl restart sidekvd
ok "systemctl restart: another keeper" [ "$(unit MainPID)" != "$before" ]
ok "all users are in its pool" [ "$(count_of users_resident)" = "$users" ]
systemctl stop sidekvd
ok "systemctl stop ends it in order" [ "$(unit Result) $(unit ActiveState)" = "success inactive" ]
ok "and systemd holds nothing" becomes 0 unit NFileDescriptorStore
systemctl start sidekvd
replay --events-total $events --batch 1 --verify 0.1 # the log that was served last
ok "after a start scores and rows are right" right
ok "of users from the store" [ "$(field hit_store_tokens)" -gt 0 ]
ok "systemd knows all that the unit asks for" [ -z "$(grep 'sidekvd.service:[0-9]' "$work/kmsg")" ]

finish
